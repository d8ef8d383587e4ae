"""Leaves from files onto meshes and back: equal to the unsharded ones, each byte read once, and little of it on the host at a time."""

import gc
import math
import os
import socket
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmeff.interop import place
from lmeff.interop.place import fetch, fetch_tensor, place_leaf, tensors_of
from lmeff.interop.tensors import open_tensors, write_tensors
from lmeff.parallel.mesh import MeshPlan, make_layout

BF16 = np.dtype(ml_dtypes.bfloat16)

PLANS = {
    "one device": MeshPlan(),
    "data": MeshPlan(data=8),
    "data x tensor": MeshPlan(data=2, tensor=4),
    "fsdp": MeshPlan(fsdp=8),
    "fsdp x tensor": MeshPlan(fsdp=4, tensor=2),
    "data x pipe x tensor": MeshPlan(data=2, pipe=2, tensor=2),
    "fsdp x expert": MeshPlan(fsdp=2, expert=4),
}
# letters, shape, how many dims are stacked. D = 16, F = 24, V = 40, L = 4, E = 4.
LEAVES = {
    "matrices of layers": ("LDF", (4, 16, 24), 1),
    "matrices of experts": ("LEDF", (4, 4, 16, 24), 2),
    "vectors of layers": ("LD", (4, 16), 1),
    "embedding": ("VD", (40, 16), 0),
    "one vector": ("D", (16,), 0),
}


def layout_of(name: str):
    return make_layout(PLANS[name], jax.devices()[:1] if name == "one device" else None)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Every leaf's tensors in a file, as matrices turned around ([out, in]); and the leaves themselves."""
    rng = np.random.default_rng(0)
    tensors, leaves = {}, {}
    for name, (_, shape, stacked) in LEAVES.items():
        leaves[name] = rng.standard_normal(shape, np.float32)
        for at in np.ndindex(*shape[:stacked]):
            tensors[".".join((name, *map(str, at)))] = np.ascontiguousarray(leaves[name][at].T)
    folder = tmp_path_factory.mktemp("place") / "m"
    write_tensors(folder, tensors, tensors.__getitem__, shard_bytes=5000)
    return open_tensors(folder), leaves


@pytest.fixture
def offsets_read(monkeypatch):
    """(file, offset) of every byte of data that is read, in order of reading."""
    found: list[tuple[str, int]] = []
    os_preadv = os.preadv

    def preadv(descriptor, buffers, offset):
        count = os_preadv(descriptor, buffers, offset)
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        found.extend((file, offset + i) for i in range(count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return found


class TestPlaceLeaf:
    @pytest.mark.parametrize("leaf", LEAVES)
    @pytest.mark.parametrize("plan", PLANS)
    def test_equals_the_whole_leaf_and_reads_each_byte_once(self, stored, offsets_read, plan, leaf):
        tensors, leaves = stored
        letters, shape, stacked = LEAVES[leaf]
        sharding = layout_of(plan).sharding(letters, shape)

        def read(index, *at):
            return tensors.read(".".join((leaf, *map(str, at))), index[::-1]).T

        placed = place_leaf(shape, np.float32, sharding, read, stacked=stacked, outer=len(shape) - stacked - 1)
        assert placed.sharding == sharding
        np.testing.assert_array_equal(np.asarray(placed), leaves[leaf])
        assert len(offsets_read) == len(set(offsets_read)) == leaves[leaf].nbytes

    def test_values_are_cast_once(self):
        whole = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
        placed = place_leaf((8, 16), BF16, layout_of("fsdp").sharding("VD", (8, 16)), lambda index: whole[index])
        assert placed.dtype == BF16
        np.testing.assert_array_equal(np.asarray(placed), whole.astype(BF16))

    @pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.int4, np.int8, np.uint8, np.bool_, np.int32])
    def test_any_dtype_is_placed_and_fetched(self, dtype):
        whole = (np.arange(64).reshape(8, 8) % 7).astype(dtype)
        placed = place_leaf(
            (8, 8), dtype, layout_of("fsdp x tensor").sharding("DF", (8, 8)), lambda index: whole[index]
        )
        assert placed.dtype == dtype
        np.testing.assert_array_equal(np.asarray(placed).astype(np.int32), whole.astype(np.int32))
        np.testing.assert_array_equal(fetch(placed, [slice(3, 6)]).astype(np.int32), whole[3:6].astype(np.int32))

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)], ids=str)
    @pytest.mark.parametrize(
        ("source", "target"), [(BF16, BF16), (np.float32, BF16), (BF16, np.float32), (np.int8, np.int8)]
    )
    def test_turned_values_are_copied_in_strips(self, order, source, target):
        values = np.arange(3 * 37 * 20).reshape(3, 37, 20).astype(source).transpose(order)
        placed = place_leaf(values.shape, target, layout_of("one device").replicated, lambda index: values[index])
        np.testing.assert_array_equal(np.asarray(placed), values.astype(target))

    def test_a_number(self):
        placed = place_leaf((), np.float32, layout_of("data").replicated, lambda index: np.float32(3).reshape(()))
        assert float(placed) == 3

    def test_shards_are_asked_for_in_order_and_layers_within_them(self):
        asked = []

        def read(index, layer):
            asked.append((layer, index[0].start))
            return np.zeros([s.stop - s.start for s in index], np.float32)

        place_leaf((4, 8, 2), np.float32, NamedSharding(layout_of("fsdp").mesh, P(None, "fsdp")), read, stacked=1)
        assert asked == [(layer, row) for row in range(8) for layer in range(4)]

    def test_a_large_tensor_is_asked_for_in_pieces(self, monkeypatch):
        monkeypatch.setattr(place, "LEAST_BYTES", 4 * 64)
        monkeypatch.setattr(place, "MOST_BYTES", 4 * 64)
        whole = np.arange(40 * 16, dtype=np.float32).reshape(40, 16)
        asked = []

        def read(index):
            asked.append(tuple(part.stop - part.start for part in index))
            return whole[index]

        sharding = layout_of("one device").replicated
        for outer, expected in ((0, (4, 16)), (1, (40, 1))):
            asked.clear()
            placed = place_leaf((40, 16), np.float32, sharding, read, outer=outer)
            np.testing.assert_array_equal(np.asarray(placed), whole)
            assert set(asked) == {expected}

    def test_a_reader_of_another_shape_is_an_error(self):
        with pytest.raises(AssertionError, match="expected \\(2, 3\\)"):
            place_leaf((2, 3), np.float32, layout_of("one device").replicated, lambda index: np.zeros((3, 2)))


class TestFetch:
    @pytest.mark.parametrize("leaf", LEAVES)
    @pytest.mark.parametrize("plan", PLANS)
    def test_tensors_of_a_leaf_are_those_that_it_was_made_of(self, stored, plan, leaf):
        letters, shape, stacked = LEAVES[leaf]
        whole = stored[1][leaf]
        placed = jax.device_put(whole, layout_of(plan).sharding(letters, shape))
        found = dict(tensors_of(placed, stacked=stacked))
        assert [*found] == [*np.ndindex(*shape[:stacked])]
        for at, values in found.items():
            np.testing.assert_array_equal(values, whole[at])

    @pytest.mark.parametrize(
        "index", [(), (slice(1, 3),), (slice(0, 4), slice(5, 11), slice(7, 20)), (slice(2, 2),)], ids=str
    )
    def test_a_part_over_the_edges_of_shards(self, index):
        whole = np.arange(4 * 16 * 24, dtype=np.float32).reshape(4, 16, 24)
        placed = jax.device_put(whole, layout_of("fsdp x tensor").sharding("LDF", whole.shape))
        np.testing.assert_array_equal(fetch(placed, index), whole[index])

    def test_shards_that_are_not_asked_for_stay_where_they_are(self, monkeypatch):
        moved = []
        real = place._local
        monkeypatch.setattr(place, "_local", lambda *args: moved.append(args[2]) or real(*args))
        placed = jax.device_put(np.zeros((4, 16, 24)), layout_of("data x pipe x tensor").sharding("LDF", (4, 16, 24)))
        fetch_tensor(placed, 1)
        assert moved == [((1, 2), (0, 16), (0, 12)), ((1, 2), (0, 16), (12, 24))]

    def test_the_array_keeps_no_copy_on_the_host(self):
        placed = jax.device_put(jnp.zeros((64, 64)), layout_of("data").replicated)
        fetch(placed)
        assert all(shard.data._npy_value is None for shard in placed.addressable_shards)


class TestMemory:
    """60 MB through the host: at most 1.3 times the largest leaf, arrays apart (on the CPU they are the host's memory, too)."""

    LARGEST = 24 << 20

    def test_placing_and_fetching_hold_little(self, tmp_path):
        shapes = {"embed": (6144, 1024), "layer": (512, 1024)}  # 24 MiB, and 12 of 2 MiB: a leaf of 24 MiB
        names = {"embed": shapes["embed"], **{f"layer.{i}": shapes["layer"] for i in range(12)}}
        specs = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in names.items()}
        write_tensors(tmp_path / "m", specs, lambda name: np.full(specs[name].shape, 1.0, np.float32))
        tensors = open_tensors(tmp_path / "m")
        device = layout_of("one device").replicated

        def embed():
            return place_leaf((1024, 6144), np.float32, device, lambda i: tensors.read("embed", i[::-1]).T, outer=1)

        def layers():
            shape = (12, 1024, 512)
            return place_leaf(
                shape, np.float32, device, lambda i, n: tensors.read(f"layer.{n}", i[::-1]).T, stacked=1, outer=1
            )

        for make in (embed, layers):
            assert _peak(make) <= 1.3 * self.LARGEST
        leaf = layers()
        fetch_tensor(leaf, 0)  # compiles
        assert _peak(lambda: [None for _ in tensors_of(leaf, stacked=1)]) <= 3.1 * math.prod(shapes["layer"]) * 4
        out = {f"out.{n}": specs["layer.0"] for n in range(12)}
        assert (
            _peak(lambda: write_tensors(tmp_path / "out", out, lambda name: fetch_tensor(leaf, int(name[4:])).T))
            <= 4 * math.prod(shapes["layer"]) * 4
        )


def _peak(run) -> int:
    """The most that NumPy and Python held at a time while it ran; buffers of XLA are not seen, so arrays count apart."""
    gc.collect()
    tracemalloc.start()
    try:
        result = run()
        peak = tracemalloc.get_traced_memory()[1]
        del result
    finally:
        tracemalloc.stop()
    return peak


def test_two_processes_place_their_own_shards_and_fetch_everything(tmp_path):
    """Arrays that span processes: each reads what its devices hold, and what it does not hold comes from its owner."""
    code = """
        import sys
        import jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
        from jax.sharding import NamedSharding, PartitionSpec as P
        from lmeff.interop.place import place_leaf, tensors_of
        whole = np.arange(4 * 8 * 6, dtype=np.int16).reshape(4, 8, 6)
        read = []
        def part(index, layer):
            read.append((layer, index[0].start))
            return whole[layer][index]
        mesh = jax.make_mesh((2, 2), ("a", "b"))
        leaf = place_leaf(whole.shape, np.int16, NamedSharding(mesh, P("a", "b")), part, stacked=1)
        assert len(read) == 4 and not leaf.is_fully_addressable
        found = dict(tensors_of(leaf, stacked=1))
        assert all((found[(i,)] == whole[i]).all() for i in range(4))
        both = place_leaf(whole.shape, np.int16, NamedSharding(mesh, P(None, "a")), part, stacked=1)
        assert all((value == whole[at]).all() for at, value in tensors_of(both, stacked=1))
        print("equal", flush=True)
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(Path(place.__file__).parents[2]), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(port)]
    started = [subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [output.splitlines()[-1:] for output in outputs] == [[b"equal"]] * 2  # behind what the network tells
