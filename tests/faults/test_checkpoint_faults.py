"""What storage and kill -9 do to checkpoints."""

import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.errors import CheckpointError
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.metrics import read_metrics
from tests.train.tiny_run import fingerprint, make_job, run

ROOT = Path(__file__).resolve().parents[2]
FLIPS = 40


def test_every_flipped_bit_is_refused(tmp_path):
    """Single bits at random places of the files of a checkpoint: half of them drawn by bytes, half by files (most files are small)."""
    key = jax.random.key(0)
    tree = {
        "w": jax.random.normal(key, (64, 64)),
        "b": jax.random.normal(key, (4, 64)).astype(jnp.bfloat16),
        "m": jnp.arange(64) % 2 == 0,
    }
    with Checkpointer(tmp_path, keep=2) as c:
        c.save(1, tree, {"a": 1})
        c.save(2, tree, {"a": 2})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    rng = random.Random(0)
    files = sorted(p for p in (tmp_path / "2").rglob("*") if p.is_file() and p.stat().st_size)
    sizes = [p.stat().st_size for p in files]
    refused = 0
    for trial in range(FLIPS):
        file = rng.choices(files, sizes)[0] if trial % 2 else rng.choice(files)
        good = file.read_bytes()
        changed = bytearray(good)
        changed[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with Checkpointer(tmp_path, keep=2) as c:
            try:
                c.restore(abstract)
            except CheckpointError as error:
                refused += "step 2 is damaged" in str(error) and "to go on from step 1 instead" in str(error)
        file.write_bytes(good)
    print(f"{refused} of {FLIPS} flipped bits refused")
    assert refused == FLIPS
    with Checkpointer(tmp_path, keep=2) as c:
        assert c.restore(abstract)[1] == {"a": 2}


def child(directory, at):
    """Runs the tiny run in a process of its own, killed by SIGKILL when it asks for the batch of step `at`."""
    command = [sys.executable, str(ROOT / "tests" / "train" / "tiny_run.py"), str(directory), str(at)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_killed_while_saving_and_resumed_is_bitwise_the_uninterrupted(tmp_path):
    """The batch of step 8 is asked for right after the checkpoint of step 8 began to be written in the background."""
    straight, _ = run(make_job(tmp_path / "straight"))
    killed = child(tmp_path / "run", 8)
    assert killed.returncode == -9, killed.stderr
    steps = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert steps
    assert steps[0] == 4  # the earlier step outlives the kill
    resumed = child(tmp_path / "run", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert f"digest {sum(fingerprint(straight).values())}" in resumed.stdout
    rows, expected = (
        read_metrics(tmp_path / "run" / "metrics.jsonl"),
        read_metrics(tmp_path / "straight" / "metrics.jsonl"),
    )
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in expected]
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))  # nothing half-written is left lying


SAVE = """
import os, signal, sys, threading, time
import jax.numpy as jnp
from pathlib import Path
from lmeff.train.checkpoint import Checkpointer
with Checkpointer(Path(sys.argv[1]), keep=2) as c:
    for step in range(1, 1000):
        c.save(step, {"x": jnp.full((512, 512), step)}, {"step": step})
        c.latest_step()
        if step == 2:
            threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    """Ten kills at moments spread over a loop that does nothing but save and delete."""
    for trial in range(10):
        directory = tmp_path / str(trial)
        script = [sys.executable, "-c", SAVE, str(directory), str(0.05 + 0.037 * trial)]
        done = subprocess.run(
            script, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
        )
        assert done.returncode == -9
        with Checkpointer(directory, keep=2) as c:
            tree, metadata = c.restore({"x": jax.ShapeDtypeStruct((512, 512), jnp.int32)})
        assert metadata["step"] == c_step(directory) >= 2
        assert bool((tree["x"] == metadata["step"]).all())


def c_step(directory):
    with Checkpointer(directory, keep=2) as c:
        return c.latest_step()
