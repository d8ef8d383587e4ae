"""Two processes of four devices each do what one of eight does, and one that dies ends both."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.rows import own_rows, place_batch
from lmeff.recipe.artifact import Recipe, load
from lmeff.train.metrics import read_metrics
from tests.conftest import CACHE
from tests.layouts.trial import make_batch
from tests.runs import lmeff, write_config, write_text

MESH = ("--mesh.fsdp", "2", "--mesh.tensor", "2")
TINY = ("--model.layers", "1", "--evaluate.batches", "1", "--train.steps", "3", "--optim.eps", "1e-6")
RUN = "import sys; from lmeff.cli import main; sys.exit(main())"
TWO = ("--processes", "2", "--devices", "8")


def config_of(folder, recipe='Stage(name="model"),'):
    return write_config(folder, write_text(folder), recipe=recipe, claims="")


def command(*words, before="", **environment):
    """The command line in a process of its own, compiled in half the time. before: Python code that the process runs first."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{RUN}", *map(str, words)],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def rows_of(folder, name, stage="model"):
    return read_metrics(folder / "runs" / name / "stages" / stage / "metrics.jsonl")


def weights(folder, name):
    layout = make_layout(MeshPlan(), jax.devices()[:1])
    found = load("model", Recipe(), folder / "runs" / name / "stages/model/artifact", layout, jnp.float32)
    return [np.asarray(x) for x in jax.tree.leaves(found.params)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process that those of several are held to."""
    folder = tmp_path_factory.mktemp("processes")
    config = config_of(folder)
    code, out, err = finish(command("train", config, *TINY, *MESH, "--devices", "8", "--name", "single", "--json"))
    assert code == 0, err
    return folder, config, json.loads(out)


def equals_single(single, name, out):
    folder, _, expected = single
    got = json.loads(out)  # one object and nothing else, whatever connects the processes prints
    assert got["artifacts"] == json.loads((folder / "runs" / name / "report-model.json").read_text())["artifacts"]
    assert abs(got["artifacts"][0]["loss"] - expected["artifacts"][0]["loss"]) < 1e-6
    ours, theirs = rows_of(folder, name), rows_of(folder, "single")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 3]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    pairs = zip(weights(folder, name), weights(folder, "single"), strict=True)
    assert max(float(np.abs(a - b).max()) for a, b in pairs) < 1e-6


def test_two_processes_equal_one(single):
    """On data x fsdp x tensor, where each process holds half of the rows."""
    code, out, err = finish(command("train", single[1], *TINY, *MESH, *TWO, "--name", "halves", "--json"))
    assert code == 0, err
    assert err.count(" on cpu, 2 processes") == 1
    assert err.count("step 3/3") == err.count("mesh: ") == 1
    equals_single(single, "halves", out)


@pytest.mark.slow
def test_processes_that_hold_the_same_rows_equal_one(single):
    """Where the axis that goes across processes cuts no rows, both feed all of them."""
    words = ("--processes", "2", "--devices", "2", "--mesh.tensor", "2", "--name", "same", "--json")
    code, out, err = finish(command("train", single[1], *TINY, *words))
    assert code == 0, err
    equals_single(single, "same", out)


@pytest.mark.slow
def test_a_cluster_that_jax_detects_is_joined(single):
    """Two steps of a Slurm job, as its environment says; the second one's own output stays empty."""
    port = free_port()
    words = ("train", single[1], *TINY, *MESH, "--devices", "4", "--distributed", "--name", "cluster", "--json")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": port}
    hosts = [command(*words, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    (code, out, err), (other, silent, _) = finish(hosts[0]), finish(hosts[1])
    assert (code, other, silent) == (0, 0, ""), err
    equals_single(single, "cluster", out)


@pytest.mark.parametrize("index", ["0", "1"])
def test_a_host_that_is_alone_says_so_and_ends(index):
    """Started on one host of two, the one that the others join or another."""
    hurried = "from lmeff.parallel import processes; processes.NOTICE, processes.JOINING = 0.5, 2.0"
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": index}
    alone = slurm | {"SLURM_PROCID": index, "JAX_COORDINATOR_PORT": free_port()}
    code, out, err = finish(command("doctor", "--distributed", before=hurried, **alone))
    assert (code, out) == (1, ""), err
    assert "lmeff: waiting for the other hosts; --distributed is to be started on every one of them" in err
    assert "not all hosts came within 2 s, expected the same command on every one" in err.splitlines()[-1]
    assert "stack trace" not in err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("plan", "halves"),
    [
        (MeshPlan(data=4, tensor=2), [range(8), range(8, 16)]),
        (MeshPlan(data=2, fsdp=4), [range(8), range(8, 16)]),
        (MeshPlan(tensor=8), [range(16), range(16)]),
    ],
)
def test_rows_follow_the_devices_of_a_process(plan, halves):
    layout = make_layout(plan)
    devices = layout.mesh.devices.reshape(2, -1)
    assert [own_rows(layout, 16, half).tolist() for half in devices] == [list(rows) for rows in halves]
    assert own_rows(layout, 16).tolist() == list(range(16))
    batch = make_batch(16)
    for placed, host in zip(place_batch(batch, layout, 16), batch, strict=True):
        assert np.array_equal(placed, host)


def test_a_wrong_config_is_told_once(tmp_path):
    code, out, err = lmeff("train", config_of(tmp_path), *TWO, "--mesh.fsdp", "3", "--json")
    assert (code, json.loads(out)["exit_code"]) == (3, 3)
    assert err.startswith("lmeff: mesh: got")
    assert err.count("\n") == 1


def test_what_only_a_process_can_find_wrong_is_told_once(tmp_path):
    words = (*TWO, "--data.path", tmp_path / "absent.txt", "--json")
    code, out, err = finish(command("train", config_of(tmp_path), *words))
    assert (code, json.loads(out)["exit_code"]) == (4, 4)
    assert err.startswith("lmeff: ")
    assert err.count("does not exist") == err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(tmp_path):
    words = ("train", config_of(tmp_path), *TINY, *MESH, "--train.steps", "60", "--train.checkpoint-every", "10")
    metrics = tmp_path / "runs/small/stages/model/metrics.jsonl"
    process = command(*words, *TWO)
    wait_for(lambda: len(read_metrics(metrics)) >= 25, process)
    pids = children(process.pid)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 137
    assert err == (
        "lmeff: process 1 of 2 was killed by signal 9; the others were stopped; the same command goes on from the last checkpoint\n"
    )
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    before = read_metrics(metrics)
    code, _, err = finish(command(*words, *TWO))
    assert code == 0, err
    after = read_metrics(metrics)
    assert [row["step"] for row in after] == list(range(1, 61))
    kept = sum(a == b for a, b in zip(before, after, strict=False))
    assert kept >= 10  # lines before the checkpoint are those of the first run
    assert kept % 10 == 0
    code, _, err = finish(command(*words, "--devices", "8", "--name", "alone"))
    assert code == 0, err
    alone = rows_of(tmp_path, "alone")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(after, alone, strict=True)) < 1e-5


def wait_for(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid):
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return sorted(int(line.split()[0]) for line in found.splitlines() if int(line.split()[1]) == pid)
