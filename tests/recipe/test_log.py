"""The command line with sinks and profiles: a run is seen elsewhere while it trains, afterwards, and after it was killed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from lmeff.report.schema import Report
from lmeff.train.metrics import read_metrics
from lmeff.train.sinks import PACKAGES
from tests.conftest import CACHE
from tests.runs import lmeff, lmeff_json, write_config, write_text
from tests.train.test_sinks import scalars, wandb_found

RECIPE = """Stage(name="a", steps=6), Stage(name="b", start="a", compress=(Quantize(),), steps=0, export=True),"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    return write_config(folder, write_text(folder), recipe=RECIPE, claims="")


@pytest.fixture(scope="module")
def logged(config):
    """The folder of a run with a sink and a profile, and what it told."""
    code, out, err = lmeff("run", config, "--json", "--profile", "2:3", "--log.sinks", "tensorboard")
    assert code == 0, err
    assert json.loads(out)["name"] == "small"
    return config.parent / "runs" / "small", err


def losses(run):
    return [(row["step"], pytest.approx(row["loss"])) for row in read_metrics(run / "stages/a/metrics.jsonl")]


def untimed(run, stage):
    """Without what each report measures anew."""
    return {tag: values for tag, values in scalars(run, stage).items() if tag != "artifact/ms_per_token"}


@pytest.mark.slow
def test_a_run_with_a_sink(logged):
    run, _ = logged
    found, packed = scalars(run, "a"), scalars(run, "b")
    assert found["loss"] == losses(run)
    assert len(found["loss"]) == 6
    report = Report.read(run / "report.json")
    assert found["artifact/loss"] == [(6, pytest.approx(report.row("a").loss))]
    assert packed["artifact/stored_bytes"] == [(0, report.row("b").stored_bytes)]
    assert packed["artifact/stored_bytes"][0][1] < found["artifact/stored_bytes"][0][1]
    assert "loss" not in packed


@pytest.mark.slow
def test_a_run_with_a_profile(logged):
    run, told = logged
    assert f"a: profiled steps 2 to 3: xprof --logdir {run}/profile/a " in told
    assert (run / "profile/a/plugins/profile/steps_2_3/process_0.xplane.pb").stat().st_size > 1000
    assert [path.name for path in (run / "profile").iterdir()] == ["a"]  # b does not train


@pytest.mark.slow
def test_it_goes_on_under_other_sinks(logged, config):
    run, _ = logged
    before = scalars(run, "a")
    code, _, err = lmeff("run", config, "--json", "--profile", "2:3")
    assert code == 0, err
    assert "a: done before, so not profiled" in err
    assert scalars(run, "a") == before


@pytest.mark.slow
def test_replays_a_run_into_a_sink(logged):
    run, _ = logged
    before = untimed(run, "a"), untimed(run, "b")
    shutil.rmtree(run / "tensorboard")
    assert lmeff_json("log", run, "--sinks", "tensorboard") == {"run": str(run), "sinks": ["tensorboard"]}
    assert (untimed(run, "a"), untimed(run, "b")) == before


@pytest.mark.slow
def test_replaying_tells_what_failed(logged):
    run, _ = logged
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("in the way")
    code, out, _ = lmeff("log", run, "--sinks", "tensorboard", "--json")
    assert code == 1
    assert "tensorboard of a, tensorboard of b failed" in json.loads(out.splitlines()[-1])["error"]
    (run / "tensorboard").unlink()


def test_replaying_refuses(tmp_path):
    code, out, _ = lmeff("log", tmp_path, "--sinks", "tensorboard", "--json")
    assert code == 5
    assert "holds no run" in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (("--profile", "3:2"), 2, "--profile: got '3:2', expected 1 or more and the last step no earlier"),
        (("--profile", "ten"), 2, "--profile: got 'ten', expected FIRST:LAST or one step, as 10:13"),
        (("--profile", "5:9"), 2, "--profile: got steps 5 to 9, expected steps that a stage takes: a 6."),
        (("--log.sinks", "wandb", "--log.no-offline"), 3, "log.sinks: wandb has no API key here"),
    ],
    ids=["backwards", "no number", "beyond", "no key"],
)
def test_refused_before_anything_is_written(config, monkeypatch, tmp_path, options, code, reason):
    if "wandb" in options:
        pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    found, out, _ = lmeff("run", config, "--json", "--name", "refused", *options)
    assert (found, json.loads(out)["error"][: len(reason)]) == (code, reason)
    assert not (config.parent / "runs" / "refused").exists()


@pytest.mark.slow
def test_several_processes_trace_each_its_own_devices_and_log_once(config, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    options = ("--devices", 2, "--processes", 2, "--mesh.data", 2, "--recipe.a.steps", 4)
    code, _, err = lmeff(
        "train", config, "--stage", "a", "--name", "pair", *options, "--profile", "2:3", "--log.sinks", "tensorboard"
    )
    assert code == 0, err
    run = config.parent / "runs" / "pair"
    names = sorted(str(file.relative_to(run / "profile")) for file in (run / "profile").rglob("*") if file.is_file())
    session = "a/plugins/profile/steps_2_3"
    assert names == ["a/perfetto_trace.json.gz", f"{session}/process_0.xplane.pb", f"{session}/process_1.xplane.pb"]
    assert scalars(run, "a")["loss"] == losses(run)
    assert len(losses(run)) == 4


def trackio_found(folder, run):
    """The losses of the only run in a store of trackio, from a process of its own: the store's place is read once."""
    code = (
        "import json, trackio.sqlite_storage as s; store = s.SQLiteStorage; (name,) = [n for n in store.get_runs('lmeff') if '-a-' in n]; "
        "print(json.dumps([(r['step'], r['loss']) for r in store.get_logs('lmeff', name) if 'loss' in r]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "store"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [tuple(pair) for pair in json.loads(out.stdout)]


FOUND = {
    "tensorboardX": lambda folder, run: scalars(run, "a")["loss"],
    "wandb": lambda folder, run: wandb_found(run, "a")[0]["loss"],
    "trackio": trackio_found,
}


@pytest.mark.slow
def test_killed_and_resumed_every_sink_has_each_step_once(config, tmp_path):
    """All sinks that are installed at once, and JSON alone on stdout."""
    there = {name: package for name, package in PACKAGES.items() if importlib.util.find_spec(package)}
    assert there
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # that of this process
    environment |= {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(CACHE), "TRACKIO_DIR": str(tmp_path / "store")}
    environment |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    options = ["--name", "killed", "--json", "--log.sinks", *there, "--recipe.a.steps", "300"]
    command = [sys.executable, "-m", "lmeff.cli", "run", str(config), *options, "--train.checkpoint-every", "20"]
    run = config.parent / "runs" / "killed"
    metrics, deadline = run / "stages/a/metrics.jsonl", time.monotonic() + 200
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and len(read_metrics(metrics)) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    assert first.wait() != 0, "it ended before it was killed"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["name"] == "killed"
    assert "is dropped" not in again.stderr
    for package in there.values():
        found = FOUND[package](tmp_path, run)
        assert [step for step, _ in found] == [*range(1, 301)], package
        assert found == losses(run), package
