"""A pod on this machine: killed again and again, and told to stop, it ends bit for bit as if nothing had happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lmeff.train.metrics import read_metrics
from tests.faults.test_processes import config_of, weights

PROCESSES = 4
STEPS, SAVED_EVERY = 48, 5
TINY = (
    "--model.layers",
    "1",
    "--evaluate.batches",
    "1",
    "--optim.eps",
    "1e-6",
    "--mesh.fsdp",
    "2",
    "--mesh.tensor",
    "2",
)
RUN = ("--train.steps", STEPS, "--train.checkpoint-every", SAVED_EVERY, "--processes", PROCESSES)
MOMENTS = ("starting", "compiling", "training", "saving")
KILLS = (
    "starting",
    "training",
    "starting",
    "saving",
    "compiling",
    "starting",
    "training",
    "starting",
    "saving",
    "starting",
)
DELAYS = {"starting": 8.0, "compiling": 1.0, "training": 0.05, "saving": 0.01}  # seconds, at most
CLOCKS = ("time", "tokens_per_second")


class Kill(NamedTuple):
    """victim: the process's number. during: what the pod was doing, as its files and its terminal told. resumed: the step the next attempt goes on from."""

    victim: int
    during: str
    resumed: int


class Pod:
    """A launcher, what it has told, and the run that it works on."""

    def __init__(self, config: Path, name: str, *options: object) -> None:
        folder = config.parent
        self.stage = folder / "runs" / name / "stages/model"
        self.log, self.out = folder / f"{name}.stderr", folder / f"{name}.stdout"
        words = ("train", config, *TINY, *RUN, "--name", name, "--json", *options)
        settings = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),  # not one that others share: killed processes write it
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TMPDIR": str(folder / "tmp"),
        }
        (folder / "tmp").mkdir(exist_ok=True)
        with self.log.open("ab") as err, self.out.open("wb") as out:
            self.began = self.log.stat().st_size
            self.since = time.time()
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "lmeff.cli", *map(str, words)], env=os.environ | settings, stdout=out, stderr=err
            )

    def told(self) -> str:
        """What this attempt has told."""
        return self._text().rpartition("lmeff: restart ")[2]

    def restarts(self) -> int:
        """How many were told."""
        return self._text().count("lmeff: restart ")

    def _text(self) -> str:
        return self.log.read_bytes()[self.began :].decode(errors="replace")  # the end may be half a letter

    def processes(self) -> list[int]:
        """By number; fewer than all while they are started."""
        found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        rows = (tuple(map(int, line.split())) for line in found.splitlines())
        return sorted(pid for pid, parent in rows if parent == self.launcher.pid)

    def saved(self) -> int:
        """The last step that is saved whole, 0 for none."""
        found = [file.parent.name for file in self.stage.glob("checkpoints/*/commit_success.txt")]
        steps = [int(name) for name in found if name.isdigit()]  # one that is being committed has another name
        return max(
            (step for step in steps if (self.stage / f"checkpoints/{step}/_CHECKPOINT_METADATA").exists()), default=0
        )

    def does(self) -> str:
        """One of `MOMENTS`."""
        told = self.told()
        if " step " in told:
            return "saving" if self._writing() else "training"
        return "compiling" if "model: from" in told else "starting"

    def _writing(self) -> bool:
        """Whether there is a checkpoint of this attempt that is not sealed yet; what a killed one left stays until the next is saved."""
        for file in self.stage.glob("checkpoints/*"):
            with contextlib.suppress(FileNotFoundError):  # renamed or deleted meanwhile
                if file.stat().st_mtime >= self.since and not (file / "SHA256SUMS").exists():
                    return True
        return False

    def wait_until(self, moment: str, beyond: int = -1) -> None:
        """Until the attempt does this, or something later where it is too short to be seen, and a later step than `beyond` is saved."""
        deadline = time.monotonic() + 500
        while (
            MOMENTS.index(self.does()) < MOMENTS.index(moment)
            or self.saved() <= beyond
            or len(self.processes()) < PROCESSES
        ):
            assert self.launcher.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, (moment, self.log.read_text())
            time.sleep(0.03)

    def kill_one(self, dice: random.Random, moment: str) -> Kill:
        """Waits for the moment, where there is something to lose for a step that was not saved before, and kills."""
        before = self.restarts()
        self.wait_until(moment, beyond=self.saved() if moment in ("training", "saving") else -1)
        time.sleep(dice.uniform(0.0, DELAYS[moment]))
        victim, during = dice.randrange(PROCESSES), self.does()
        os.kill(self.processes()[victim], signal.SIGKILL)
        while self.restarts() == before:
            assert self.launcher.poll() is None, self.log.read_text()
            time.sleep(0.02)
        self.since = time.time()
        return Kill(victim, during, self.saved())

    def finish(self) -> int:
        """The exit code; nothing temporary is left."""
        code = self.launcher.wait(timeout=500)
        assert not list((self.log.parent / "tmp").iterdir())
        return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pod")


@pytest.fixture(scope="module")
def config(folder):
    return config_of(folder)


@pytest.fixture(scope="module")
def expected(config):
    """The run of the same processes that nobody disturbed."""
    pod = Pod(config, "undisturbed")
    assert pod.finish() == 0, pod.log.read_text()
    return pod


@pytest.mark.slow
def test_killed_ten_times_and_told_to_stop(config, expected, capsys):
    """The babysitter restarts after each kill; its budget is spent when one process is told to stop: all save the same step, and the command ends."""
    dice = random.Random(6)
    pod = Pod(config, "disturbed", "--restarts", len(KILLS))
    kills = [pod.kill_one(dice, moment) for moment in KILLS]
    told_at = told_to_stop(pod, dice)
    with capsys.disabled():
        show(kills, told_at)
    assert len(kills) >= 10
    assert len({kill.during for kill in kills}) >= 3
    assert len({kill.victim for kill in kills}) == PROCESSES
    resumed = [kill.resumed for kill in kills]
    assert resumed == sorted(resumed)
    assert 0 < resumed[-1] < STEPS
    again = Pod(config, "disturbed")
    assert again.finish() == 0, again.log.read_text()
    assert rows(again) == rows(expected)
    ours, theirs = weights(config.parent, "disturbed"), weights(config.parent, "undisturbed")
    assert [a.tobytes() for a in ours] == [b.tobytes() for b in theirs]
    assert all(np.isfinite(a).all() for a in ours)


def told_to_stop(pod, dice):
    """The step that all saved after SIGTERM to one of them."""
    pod.wait_until("training")
    pids = pod.processes()
    os.kill(pids[dice.randrange(PROCESSES)], signal.SIGTERM)
    assert pod.finish() == 42, pod.log.read_text()
    assert json.loads(pod.out.read_text())["exit_code"] == 42
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    step = pod.saved()
    assert read_metrics(pod.stage / "metrics.jsonl")[-1]["step"] == step
    saved_by = sorted(file.name for file in (pod.stage / f"checkpoints/{step}/arrays/array_metadatas").iterdir())
    assert saved_by == [f"process_{i}" for i in range(PROCESSES)]
    assert not pod._writing()
    return step


def rows(pod):
    """The metric lines without what the clock says."""
    found = read_metrics(pod.stage / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in found]


def show(kills, told_at):
    print("\nkill  process  during      goes on from step")
    for number, kill in enumerate(kills, 1):
        print(f"{number:4}  {kill.victim:7}  {kill.during:10}  {kill.resumed:17}")
    print(f"SIGTERM to one process: all saved step {told_at} of {STEPS}")
