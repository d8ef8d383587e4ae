"""The page on moving between meshes: its run moves as the page says, and what it calls exact and refused is."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lmeff.config import LocalUpdates, Reduce
from lmeff.config.files import check_resume, load_experiment, write
from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.data.loader import build
from lmeff.parallel.compressed import make_reducer
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.rows import own_rows, place_batch
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.metrics import read_metrics
from lmeff.train.step import abstract_start
from tests.conftest import CACHE
from tests.docs.page import ROOT, blocks, shown
from tests.layouts.trial import Mesh, make_runtime

PAGE = "docs/meshes.md"
METRICS = "stages/model/metrics.jsonl"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "PYTHONPATH": str(ROOT),
}
TRAININGS = [each for each in shown(PAGE) if each.words[:2] == ["lmeff", "train"]]
MESHES = {
    "fsdp-tensor": (MeshPlan(fsdp=4, tensor=2), 8),
    "two": (MeshPlan(fsdp=2), 2),
    "pipe": (MeshPlan(pipe=2, fsdp=2), 4),
    "context": (MeshPlan(context=4, fsdp=2), 8),
    "one": (MeshPlan(), 1),
}


def write_page_s_config(folder):
    (code,) = (text for language, text in blocks(PAGE) if language == "python")
    (folder / "moving.py").write_text(code)
    return folder / "moving.py"


def started(words, folder):
    command = [sys.executable, "-m", "lmeff.cli", *words[1:]]
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def stop_after(process, step, metrics):
    """SIGTERM once a step is told, and what it printed."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        rows = read_metrics(metrics)
        if rows and rows[-1]["step"] >= step:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    out, _ = process.communicate(timeout=300)
    return out


@pytest.mark.slow
def test_the_run_moves_from_mesh_to_mesh(tmp_path):
    write_page_s_config(tmp_path)
    metrics, stops = tmp_path / "runs/moving" / METRICS, []
    for i, each in enumerate(TRAININGS[:-1]):
        process = started(each.words, tmp_path)
        told = stop_after(process, 20 * (i + 1), metrics)
        assert process.returncode == 42, told
        stops.append(read_metrics(metrics)[-1]["step"])
    last = started(TRAININGS[-1].words, tmp_path)
    told, _ = last.communicate(timeout=300)
    assert last.returncode == 0, told
    assert stops == sorted(set(stops))
    moved = read_metrics(metrics)
    assert [row["step"] for row in moved] == list(range(1, 121))

    stayed = started([*TRAININGS[0].words, "--name", "stayed"], tmp_path)
    told, _ = stayed.communicate(timeout=300)
    assert stayed.returncode == 0, told
    want = np.array([row["loss"] for row in read_metrics(tmp_path / "runs/stayed" / METRICS)])
    got = np.array([row["loss"] for row in moved])
    apart, first = np.abs(got / want - 1), stops[0]

    np.testing.assert_array_equal(got[:first], want[:first])  # the same mesh
    assert apart.max() <= 1e-6
    (report,) = (tmp_path / "runs/moving").glob("report*.json")
    assert report.stat().st_size


def test_batches_are_the_same_on_every_mesh(tmp_path):
    experiment = load_experiment(write_page_s_config(tmp_path))
    corpus = build(experiment.data, tmp_path / "data", experiment.seed, batch=experiment.train.batch)
    found = {}
    for name, (plan, devices) in MESHES.items():
        layout = make_layout(plan, jax.devices()[:devices])
        order = layout.token_order(experiment.data.sequence)
        digest = hashlib.sha256()
        for step in (0, 1, 57):
            placed = np.asarray(place_batch(corpus.train.batch(step), layout).tokens)
            digest.update((placed if order is None else placed[:, np.argsort(order)]).tobytes())
        found[name] = digest.hexdigest()
    assert len(set(found.values())) == 1, found
    layout = make_layout(MeshPlan(fsdp=4), jax.devices()[:4])
    halves = [own_rows(layout, experiment.train.batch, jax.devices()[at : at + 2]) for at in (0, 2)]
    whole = corpus.train.batch(3).tokens
    parts = [next(corpus.train.batches(3, rows)).tokens for rows in halves]  # as two processes make them
    np.testing.assert_array_equal(np.concatenate(parts), whole[np.concatenate(halves)])


OWN = {
    "trainable": {"local": LocalUpdates(every=2)},  # each worker's parameters
    "reduction": {"reduce": Reduce(method="powersgd")},  # what each device has not sent yet
}
PLACES = {
    "zero-1": Mesh(fsdp=4, tensor=2, zero=1),
    "pipe": Mesh(pipe=2, fsdp=4, accumulate=2),
    "one": Mesh(),
}


def runtime(setting, mesh):
    """What trains on a mesh."""
    rt = make_runtime(mesh, "plain")
    return dataclasses.replace(rt, local=setting.get("local"), reducer=make_reducer(setting.get("reduce"), rt.specs))


def shapes(setting, mesh):
    """Of the state that training begins with, as a restore asks for it."""
    return abstract_start(runtime(setting, mesh))


def filled(setting, mesh):
    """A state with numbers that no two leaves share, on the mesh."""
    draw = np.random.default_rng(0)

    def leaf(x):
        return jax.device_put((draw.integers(1, 999, x.shape) / 7).astype(x.dtype), x.sharding)

    return jax.tree.map(leaf, shapes(setting, mesh))


def test_state_moves_bit_for_bit(tmp_path):
    """Parameters, moments and the step, from a mesh to others and to one device."""
    state = filled({}, Mesh(fsdp=4, tensor=2))
    with Checkpointer(tmp_path, keep=1) as saved:
        saved.save(1, state, {})
    want = [np.asarray(x) for x in jax.tree.leaves(state)]
    for name, mesh in PLACES.items():
        with Checkpointer(tmp_path, keep=1) as found:
            moved, _ = found.restore(shapes({}, mesh))
        for a, b in zip(jax.tree.leaves(moved), want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b, err_msg=name)


@pytest.mark.parametrize("name", OWN)
def test_what_is_a_device_s_own_does_not_move(name, tmp_path):
    before, after = Mesh(data=2, tensor=4), Mesh(data=4, tensor=2)
    with Checkpointer(tmp_path, keep=1) as saved:
        saved.save(1, getattr(filled(OWN[name], before), name), {})
    with (
        Checkpointer(tmp_path, keep=1) as found,
        pytest.raises(CheckpointError, match="step 1 does not fit: it has other shapes"),
    ):
        found.restore(getattr(shapes(OWN[name], after), name))
    with Checkpointer(tmp_path, keep=1) as found:
        found.restore(getattr(shapes(OWN[name], before), name))


def test_what_may_change_is_what_the_page_says(tmp_path):
    experiment = load_experiment(write_page_s_config(tmp_path))
    write(experiment, tmp_path)
    moved = dataclasses.replace(
        experiment,
        mesh=MeshPlan(fsdp=2),
        train=dataclasses.replace(experiment.train, accumulate=2, remat="full", log_every=7, keep=9),
    )
    check_resume(moved, tmp_path)
    for name, value in {"batch": 32, "steps": 7, "reduce": Reduce()}.items():
        changed = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **{name: value}))
        with pytest.raises(ConfigError, match=f"train.{name}"):
            check_resume(changed, tmp_path)
