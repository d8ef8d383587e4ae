"""Checkpoints: bitwise round trips of every kind of leaf, misfits refused one by one, complete or not at all."""

import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmeff.core.errors import CheckpointError
from lmeff.core.numerics import QFormat, quantize
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.train.checkpoint import Checkpointer, lock
from lmeff.train.seal import NAME, broken, seal


class Pair(NamedTuple):
    first: object
    second: object


def make_tree(seed=0):
    w = jax.random.normal(jax.random.key(seed), (2, 16, 8))
    int4 = QFormat(bits=4, symmetric=False, granularity="group", group=8)
    return Pair(
        {"f32": w, "bf16": w.astype(jnp.bfloat16), "f16": w.astype(jnp.float16), "empty": {}, "none": None},
        (
            quantize(w, int4, (-2,)),
            None,
            w > 0,
            jnp.int32(7),
            jnp.zeros((0, 3)),
            Pair(quantize(w, QFormat(), (-2,)), quantize(w, QFormat(kind="float"), (-2,))),
        ),
    )


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 to 3 saved, the last two kept."""
    directory = tmp_path_factory.mktemp("saved") / "made" / "checkpoints"
    with Checkpointer(directory, keep=2) as c:
        for step in (1, 2, 3):
            c.save(step, make_tree(step), {"step": step, "pair": (1, 2.5)})
    return directory


def test_round_trip_is_bitwise(saved):
    with Checkpointer(saved, keep=2) as c:
        assert c.latest_step() == 3
        tree, metadata = c.restore(abstract(make_tree()))
        assert metadata == c.metadata() == {"step": 3, "pair": [1, 2.5]}
    assert_same(tree, make_tree(3))
    assert tree.second[0].q.dtype == jnp.int4
    assert sorted(p.name for p in saved.iterdir()) == ["2", "3"]
    assert broken(saved / "3") is None
    assert (saved / "3" / NAME).exists()


def test_round_trip_across_meshes(tmp_path):
    mesh = make_layout(MeshPlan(data=2, fsdp=2, tensor=2)).mesh
    written, read = NamedSharding(mesh, P(None, "fsdp", "tensor")), NamedSharding(mesh, P("data", ("fsdp", "tensor")))
    w = jax.random.normal(jax.random.key(0), (2, 16, 8))
    tree = {
        "w": jax.device_put(w, written),
        "mask": jax.device_put(w > 0, written),
        "int4": jax.device_put(w.astype(jnp.int4), written),
    }
    with Checkpointer(tmp_path, keep=1) as c:
        c.save(0, tree, {})
        one, _ = c.restore(abstract(tree))
        other, _ = c.restore(abstract(tree, read))
    assert_same(one, tree)
    assert_same(other, tree)
    assert other["int4"].sharding == read


def test_same_step_again_replaces_and_a_later_one_is_in_the_way(tmp_path):
    with Checkpointer(tmp_path, keep=3) as c:
        c.save(4, {"x": jnp.zeros(3)}, {"made": 1})
        c.save(4, {"x": jnp.ones(3)}, {"made": 2})
        tree, metadata = c.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
        assert (float(tree["x"].sum()), metadata) == (3.0, {"made": 2})
        with pytest.raises(CheckpointError, match="holds a checkpoint of step 4, but step 3 was to be saved"):
            c.save(3, {"x": jnp.zeros(3)}, {})


def test_reading_makes_nothing(tmp_path):
    missing = tmp_path / "nothing"
    with Checkpointer(missing, keep=1) as c:
        assert c.latest_step() is None
        with pytest.raises(CheckpointError, match="expected a checkpoint, found no complete one"):
            c.restore({})
        with pytest.raises(CheckpointError, match="found no complete one"):
            c.metadata()
        with pytest.raises(TypeError):
            c.save(0, {"x": jnp.zeros(3)}, {"not JSON": object()})
    assert not missing.exists()


def test_misfits_are_told_apart(saved):
    tree = abstract(make_tree())
    first, second = tree
    fewer = {k: v for k, v in first.items() if k != "bf16"}
    wrong = {
        "lacks leaves that this config has: first/more": Pair({**first, "more": first["f32"]}, second),
        "has leaves that this config has not: first/bf16": Pair(fewer, second),
        r"has other shapes: first/f32 \[2, 16, 8\], expected \[2, 16, 9\]": Pair(
            {**first, "f32": jax.ShapeDtypeStruct((2, 16, 9), jnp.float32)}, second
        ),
        "has other dtypes: first/f32 float32, expected bfloat16": Pair(
            {**first, "f32": jax.ShapeDtypeStruct((2, 16, 8), jnp.bfloat16)}, second
        ),
    }
    for message, asked in wrong.items():
        with (
            Checkpointer(saved, keep=2) as c,
            pytest.raises(CheckpointError, match=f"step 3 does not fit: it {message}") as error,
        ):
            c.restore(asked)
        assert "Go on with the config that wrote it" in str(error.value)
        assert "\n" not in str(error.value)
    many = {**first, **{f"more{i}": first["f32"] for i in range(5)}}
    with (
        Checkpointer(saved, keep=2) as c,
        pytest.raises(CheckpointError, match="more0; first/more1; first/more2 and 2 more"),
    ):
        c.restore(Pair(many, second))


def test_digests_alone_notice_changed_numbers(tmp_path):
    """A step killed between commit and seal has no sums; numbers that changed are noticed all the same."""
    tree = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpointer(tmp_path, keep=2) as c:
        c.save(1, tree, {})
    (tmp_path / "1" / NAME).unlink()
    with Checkpointer(tmp_path, keep=2) as c:
        assert_same(c.restore(abstract(tree))[0], tree)
    data = max((p for p in (tmp_path / "1" / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    assert data.stat().st_size > 12_000
    content = bytearray(data.read_bytes())
    content[6_000] ^= 1
    data.write_bytes(content)
    with (
        Checkpointer(tmp_path, keep=2) as c,
        pytest.raises(CheckpointError, match=r"step 1 is damaged.*start afresh: there is no earlier"),
    ):
        c.restore(abstract(tree))


def test_a_write_that_fails_is_reported_and_costs_nothing_else(tmp_path):
    with Checkpointer(tmp_path, keep=2) as c:
        c.save(1, {"x": jnp.ones(3)}, {})
    c = Checkpointer(tmp_path, keep=2)
    c.save(2, {"x": jnp.ones(3)}, {})
    c.wait()
    c._pending = (3, c._pool.submit(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))))
    with pytest.raises(
        CheckpointError, match=r"step 3 could not be saved .*No space left.*Earlier checkpoints are untouched"
    ):
        c.close()
    with Checkpointer(tmp_path, keep=2) as c:
        assert c.latest_step() == 2


def test_seal_notices_every_change(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"numbers")
    (tmp_path / "y").write_bytes(b"")
    seal(tmp_path)
    assert broken(tmp_path) is None
    sums = tmp_path / NAME
    good = sums.read_bytes()
    for i in range(len(good)):
        for bit in range(8):
            changed = bytearray(good)
            changed[i] ^= 1 << bit
            sums.write_bytes(changed)
            assert broken(tmp_path) is not None, (i, bit)
    sums.write_bytes(good)
    (tmp_path / "new").touch()
    assert broken(tmp_path) == f"'new' is not listed in {NAME}"
    (tmp_path / "new").unlink()
    (tmp_path / "y").unlink()
    assert broken(tmp_path) == f"'y' is listed in {NAME} and missing"


HOLD = """
import sys, time
from pathlib import Path
from lmeff.train.checkpoint import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_lock_is_for_one_process_and_ends_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                CheckpointError,
                match=f"in use by process {holder.pid} on .*expected a run folder that nobody writes to",
            ),
            lock(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with lock(tmp_path):  # what a killed process leaves does not block
        pass
    with lock(tmp_path):
        pass
