"""A whole run killed at any moment goes on with the same command and ends bit for bit as if it had not been."""

import json
import random
import time

import pytest

from tests.runs import finish, start, write_config, write_text

RECIPE = """
            Stage(name="teacher", steps=60),
            Stage(
                name="composed",
                start="teacher",
                compress=(Prune(sparsity=0.5, end=10), Quantize(method="lsq")),
                distill=Distill(teacher="teacher"),
                steps=20,
            ),
            Stage(name="packed", start="composed", steps=0, export=True),
"""


def steps_told(run):
    """Lines of metrics of all stages so far."""
    return sum(len(file.read_text().splitlines()) for file in run.glob("stages/*/metrics.jsonl"))


def kill_after(process, run, steps, seconds):
    """Kills a run so many steps and seconds from now; False where it ended before."""
    target = steps_told(run) + steps
    while process.poll() is None and steps_told(run) < target:
        time.sleep(0.01)
    time.sleep(seconds)
    alive = process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    return alive


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    config = write_config(tmp_path, write_text(tmp_path), recipe=RECIPE, claims="")
    whole = finish(start(config, "whole"))
    moments, kills = random.Random(0), 0
    for _ in range(5):  # by steps and not by the clock: a machine may be four times as fast from one run to the next
        steps, seconds = moments.randint(1, 12), moments.uniform(0, 0.05)
        kills += kill_after(start(config, "killed"), tmp_path / "runs/killed", steps, seconds)
    again = finish(start(config, "killed"))
    assert kills >= 2
    assert [row["loss"] for row in again["artifacts"]] == [row["loss"] for row in whole["artifacts"]]
    for stage in ("teacher", "composed"):
        rows = [
            [
                json.loads(line)
                for line in (tmp_path / "runs" / name / "stages" / stage / "metrics.jsonl").read_text().splitlines()
            ]
            for name in ("whole", "killed")
        ]
        assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]


@pytest.mark.slow
def test_forced_devices_and_a_second_process_on_the_same_run(tmp_path):
    config = write_config(tmp_path, write_text(tmp_path), recipe='Stage(name="a", steps=400),', claims="")
    first = start(config, "busy", "--devices", "4", "--mesh.fsdp", "2", "--train.log-every", "1")
    lock, deadline = tmp_path / "runs/busy/.lock", time.monotonic() + 120
    while not (lock.exists() and lock.read_text().startswith("process")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = start(config, "busy", "--devices", "4", "--mesh.fsdp", "2", "--train.log-every", "1")
    _, err = second.communicate(timeout=120)
    assert second.returncode == 5
    assert "in use by process" in err
    report = finish(first)
    assert report["environment"]["devices"].startswith("4 x")
    assert report["environment"]["mesh"] == "data 2, fsdp 2"
