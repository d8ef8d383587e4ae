"""Whole runs that are told to stop: 42 wherever they are, nothing half-written, and the same command ends as if they had not been."""

import json
import os
import signal

import pytest

from lmeff.train.metrics import read_metrics
from tests.faults.test_processes import children, command, finish, free_port, wait_for
from tests.runs import write_config, write_text

HOOK = """
import importlib, os, signal
if "PLACE" in os.environ:  # MODULE:FUNCTION:N: the Nth call is told to stop
    module, name, nth = os.environ["PLACE"].split(":")
    module, calls = importlib.import_module(module), []
    called = getattr(module, name)

    def hook(*args, **kwargs):
        calls.append(name)
        if len(calls) == int(nth):
            os.kill(os.getpid(), signal.SIGTERM)
        return called(*args, **kwargs)

    setattr(module, name, hook)
"""
RECIPE = """
            Stage(name="a", steps=9),
            Stage(
                name="b",
                start="a",
                compress=(Prune(sparsity=0.5, end=2), Quantize(method="lsq")),
                activations=Activations(rules=((".*", "int8/tensor"),), batches=1),
                distill=Distill(teacher="a"),
                steps=3,
            ),
            Stage(name="c", start="b", steps=0, export=True),
"""
PLACES = (
    "lmeff.data.loader:write:1",  # data building
    "lmeff.train.loop:compile_step:1",
    "lmeff.train.loop:place_batch:4",  # training
    "lmeff.train.evaluate:safe_point:2",  # evaluation inside training
    "lmeff.recipe.run:save:1",  # between stages
    "lmeff.recipe.stage:calibrate:1",
    "lmeff.recipe.summary:held_out:2",  # final measuring
    "lmeff.recipe.run:write_html:1",
)
CLOCK = ("time", "tokens_per_second")


def config_of(folder, recipe):
    config = write_config(folder, write_text(folder), recipe=recipe, claims="")
    config.write_text(HOOK + config.read_text())
    return config


def trace(run):
    """Of each stage the metric lines and, path by path, the digests of what it made."""
    found = {}
    for stage in sorted((run / "stages").iterdir()):
        lines = [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(stage / "metrics.jsonl")]
        manifest = json.loads((stage / "artifact/0/manifest/metadata").read_text())
        found[stage.name] = lines, {path: leaf["digest"] for path, leaf in manifest["leaves"].items()}
    return found


def leftovers(runs):
    """What is neither whole nor cleared away. Orbax clears its own when it next writes there."""
    return [path for path in runs.rglob("*") if ".tmp" in path.name or ".building-" in path.name]


@pytest.mark.slow
def test_one_command_told_everywhere(tmp_path):
    """The same command again and again, each time told to stop at a later place."""
    config = config_of(tmp_path, RECIPE)
    words = ("run", config, "--train.eval-every", "4", "--train.checkpoint-every", "5", "--json", "--devices", "1")
    code, out, err = finish(command(*words, "--name", "whole"))
    assert code == 0, err
    for place in PLACES:
        code, told, err = finish(command(*words, "--name", "told", PLACE=place))
        assert (code, json.loads(told)["exit_code"]) == (42, 42), (place, err)
        assert "lmeff: told to stop (SIGTERM)" in err, place
        assert "Traceback" not in err, place
        assert not leftovers(tmp_path / "runs"), place
    code, again, err = finish(command(*words, "--name", "told"))
    assert code == 0, err
    assert trace(tmp_path / "runs/told") == trace(tmp_path / "runs/whole")
    losses = [[row["loss"] for row in json.loads(text)["artifacts"]] for text in (out, again)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_commands_that_only_read_end_with_42_and_leave_nothing(tmp_path):
    """Each is told in the middle of its work, and the same command then does it."""
    code, _, err = finish(command("train", config_of(tmp_path, 'Stage(name="a", steps=1),'), "--devices", "1"))
    assert code == 0, err
    run, exported, imported = tmp_path / "runs/small", tmp_path / "exported", tmp_path / "imported"
    places = {
        f"eval {run}": "lmeff.commands.evaluate:evaluate:1",
        f"generate {run} --prompt the --max-tokens 4": "lmeff.commands.generate:generate:1",
        f"bench decode {run} --context 4 --tokens 2 --turns 1": "lmeff.commands.bench:make_variants:1",
        f"export {run} {exported}": "lmeff.recipe.transfer:tokenizer_files:1",
        f"import {exported} {imported}": "lmeff.core.files:refuse_existing:2",  # all is written, and not in its place yet
    }
    for line, place in places.items():
        words = line.split()
        code, told, err = finish(command(*words, "--json", before=HOOK, PLACE=place))
        assert (code, json.loads(told)["exit_code"]) == (42, 42), (words, err)
        assert "lmeff: told to stop (SIGTERM)" in err, words
        assert "Traceback" not in err, words
        assert not exported.exists() or words[0] == "import", words
        assert not imported.exists(), words
        assert not [*tmp_path.glob(".*")], words
        code, _, err = finish(command(*words, "--json"))
        assert code == 0, (words, err)
    assert imported.exists()


SLOW = """
import threading
import jax, jax.numpy as jnp
from pathlib import Path
from lmeff.train import loop

def compile_for_minutes(*given):
    def slow(x):
        for i in range(1500):
            x = jnp.sort(x * i + jnp.sin(x))
        return x

    lowered = jax.jit(slow).lower(jnp.ones(64))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    lowered.compile()
    Path(__file__).with_name("compiled").touch()
    raise RuntimeError("compiled to the end")

loop.compile_step = compile_for_minutes
"""


@pytest.mark.slow
def test_compilation_is_not_waited_for(tmp_path):
    config = config_of(tmp_path, 'Stage(name="a"),')
    config.write_text(config.read_text().replace("\nfrom lmeff.config", SLOW + "\nfrom lmeff.config", 1))
    code, out, err = finish(command("train", config, "--json", "--devices", "1"))
    assert (code, json.loads(out)["exit_code"]) == (42, 42), err
    assert not (tmp_path / "compiled").exists()
    assert "lmeff: told to stop" in err


SEVERAL = (
    "--model.layers",
    "1",
    "--evaluate.batches",
    "1",
    "--train.checkpoint-every",
    "100",
    "--train.eval-every",
    "7",
)
ONE = 'Stage(name="a", steps=40),'


@pytest.mark.slow
def test_one_of_several_processes_is_told_and_all_save_the_same_step(tmp_path):
    """Twice, the second time while they save."""
    words = ("train", config_of(tmp_path, ONE), *SEVERAL, "--mesh.tensor", "2", "--processes", "2", "--devices", "2")
    code, _, err = finish(command(*words, "--name", "whole"))
    assert code == 0, err
    stage = tmp_path / "runs/told/stages/a"
    process = command(*words, "--name", "told")
    wait_for(lambda: len(read_metrics(stage / "metrics.jsonl")) >= 3, process)
    told = children(process.pid)[1]
    os.kill(told, signal.SIGTERM)
    wait_for(lambda: list((stage / "checkpoints").glob("*")), process)
    os.kill(told, signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, err.splitlines()[-1].split(":")[:2]) == (42, ["lmeff", " told to stop (SIGTERM)"])
    (step,) = [int(place.name) for place in (stage / "checkpoints").glob("[0-9]*")]
    assert f"step {step} of 40 is saved" in err
    assert (stage / "checkpoints" / str(step) / "SHA256SUMS").exists()
    code, _, err = finish(command(*words, "--name", "told"))
    assert code == 0, err
    assert trace(tmp_path / "runs/told") == trace(tmp_path / "runs/whole")


@pytest.mark.slow
def test_every_host_of_a_cluster_ends_with_42(tmp_path):
    """One host is told, in training."""
    words = ("train", config_of(tmp_path, ONE), *SEVERAL, "--mesh.tensor", "2", "--devices", "1", "--distributed")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm["JAX_COORDINATOR_PORT"] = free_port()
    hosts = [command(*words, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    wait_for(lambda: len(read_metrics(tmp_path / "runs/small/stages/a/metrics.jsonl")) >= 3, hosts[0])
    os.kill(hosts[1].pid, signal.SIGTERM)
    ends = [finish(host) for host in hosts]
    assert [code for code, _, _ in ends] == [42, 42], ends
    assert all("of 40 is saved" in err for _, _, err in ends)
