"""Where things really are: shards of the state, and the collectives of the compiled step."""

import math

import numpy as np
import pytest

from lmeff.parallel.hlo import collectives
from lmeff.parallel.mesh import AXES
from tests.layouts.test_equality import MESHES
from tests.layouts.trial import MODELS, ROWS, TOKENS, Mesh, compile_step, make_inputs, make_runtime, run

DATA8, FSDP8, TENSOR8, ACCUMULATED, PRODUCT = MESHES[0], MESHES[1], MESHES[2], MESHES[10], MESHES[8]
WEIGHT = 64  # elements; every matrix and its shards are larger, every scalar metric smaller


def groups_over(mesh, *axes):
    """The groups of devices that a collective over these mesh axes joins."""
    ids = np.arange(8).reshape([getattr(mesh, axis) for axis in AXES])
    own = [AXES.index(axis) for axis in axes]
    rows = np.moveaxis(ids, own, range(-len(own), 0)).reshape(-1, math.prod(ids.shape[i] for i in own))
    return frozenset(frozenset(map(int, row)) for row in rows)


def program(mesh, feature="plain"):
    return collectives(run(mesh, feature).text)


def moved(found, kind, **conditions):
    return [c for c in found if c.kind == kind and all(getattr(c, k) == v for k, v in conditions.items())]


SHARDS = {
    # (path in the parameters, shape, shard) on each mesh
    DATA8: {"wq": ((2, 64, 8, 8), (2, 64, 8, 8)), "table": ((96, 64), (96, 64))},
    FSDP8: {"wq": ((2, 64, 8, 8), (2, 8, 8, 8)), "table": ((96, 64), (96, 8)), "down": ((2, 128, 64), (2, 128, 8))},
    TENSOR8: {"wq": ((2, 64, 8, 8), (2, 64, 1, 8)), "table": ((96, 64), (12, 64)), "down": ((2, 128, 64), (2, 16, 64))},
    PRODUCT: {"wk": ((2, 64, 4, 8), (2, 32, 2, 8)), "wo": ((2, 8, 8, 64), (2, 4, 8, 32)), "w": ((64, 96), (32, 48))},
}


@pytest.mark.parametrize("mesh", [DATA8, FSDP8, TENSOR8, pytest.param(PRODUCT, marks=pytest.mark.slow)])
def test_parameters_and_moments_lie_in_shards(mesh):
    shards = run(mesh, "plain").shards
    for leaf, expected in SHARDS[mesh].items():
        own = {path: found for path, found in shards.items() if path.endswith(f"['{leaf}']")}
        assert len(own) == 4, own.keys()  # the parameter, both moments, the kept gradient
        assert set(own.values()) == {expected}
    kept = {path: found for path, found in shards.items() if not path.startswith(".opt[0]")}  # not read by the step
    held = sum(math.prod(shard) for _, shard in kept.values())
    whole = sum(math.prod(shape) for shape, _ in kept.values())
    uncut = sum(math.prod(shape) for path, (shape, _) in kept.items() if "norm" in path)
    assert held <= whole / (mesh.fsdp * mesh.tensor) + uncut + 8
    memory = run(mesh, "plain").memory
    batch = 5 * 4 * ROWS * TOKENS // (mesh.data * mesh.fsdp)
    assert memory.argument_size_in_bytes == 4 * held + batch
    assert memory.alias_size_in_bytes == 4 * held, "the state is donated whole"


def test_state_of_a_compression_lies_with_its_weight():
    mesh, shards = PRODUCT, run(PRODUCT, "weights").shards
    factors = {path: found for path, found in shards.items() if "'wq'" in path and found[0] == (2, 4, 8, 8)}
    assert len(factors) == 5, shards.keys()  # factor, its moments and kept gradient; the scale it began with
    assert {shard for _, shard in factors.values()} == {(2, 4, 8 // mesh.tensor, 8)}
    masks = run(MESHES[6], "mask").shards
    assert masks[".auxiliary[0]['blocks']['attn']['wq'].value.keep"] == ((2, 64, 8, 8), (2, 16, 4, 8))


def test_data_parallel_only_reduces_gradients():
    found = program(DATA8)
    assert {c.kind for c in found} == {"all-reduce"}
    assert all(c.groups == groups_over(DATA8, "data") for c in found)


def test_fsdp_gathers_the_layer_in_the_loop_and_reduces_it_there():
    """XLA for the CPU writes the reduce-scatter of a gradient as an all-reduce and a slice."""
    found = program(FSDP8)
    layer = [shape[1:] for shape, _ in _matrices(run(FSDP8, "plain"))]
    for backward in (False, True):
        inside = [c for c in moved(found, "all-gather", loop=True) if ("transpose" in c.origin) == backward]
        rows = (8, 64)  # of a chunk of the loss, gathered for all parts of the vocabulary
        gathered = sorted(math.prod(s) for c in inside for s in c.shapes if math.prod(s) > WEIGHT and s != rows)
        assert gathered == sorted(map(math.prod, layer))
        assert all(c.groups == groups_over(FSDP8, "fsdp") for c in inside)
    reduced = [c for c in found if c.kind in ("all-reduce", "reduce-scatter") and c.loop]
    whole = [s for c in reduced for s in c.shapes if math.prod(s) > WEIGHT]
    assert sum(math.prod(s) for s in whole) == sum(math.prod(s) for s in layer)
    outside = [s for c in moved(found, "all-gather", loop=False) for s in c.shapes]
    assert (MODELS["grouped"].vocab, 64) not in outside, "the embedding table is gathered whole"
    assert not [s for s in outside if len(s) > 2 and s[0] == 2], "the stack of layers is gathered whole"


def test_tensor_parallel_moves_activations_and_no_weights():
    found = program(TENSOR8)
    assert not [c for c in found if c.kind in ("all-to-all", "collective-permute")]
    activations = {(ROWS, TOKENS, 64), (ROWS, TOKENS // 8, 64), (ROWS * TOKENS, 64)}
    for c in found:
        if c.kind == "all-gather":
            assert set(c.shapes) <= activations, c
        big = {s for s in c.shapes if math.prod(s) > 2 * WEIGHT}
        assert big <= activations, c
    # Between blocks T is cut: each of the two sublayers gathers it on its way in, forward and (its gradient) backward.
    gathers = moved(found, "all-gather", loop=True)
    assert [("transpose" in c.origin) for c in gathers].count(False) == 2
    assert [("transpose" in c.origin) for c in gathers].count(True) == 2


def test_the_residual_stream_is_kept_cut_over_time():
    """With full remat the backward loop is given each layer's input and nothing else: [L, B, T, D] with B over fsdp and T over tensor."""
    mesh = MESHES[7]
    assert (mesh.remat, mesh.degrees) == ("full", {"fsdp": 2, "tensor": 4})
    text = run(mesh, "all").text
    assert f"f32[2,{ROWS // 2},{TOKENS // 4},64]" in text
    assert f"f32[2,{ROWS // 2},{TOKENS},64]" not in text


@pytest.mark.parametrize("feature", ["plain", pytest.param("teacher", marks=pytest.mark.slow)])
def test_logits_and_table_stay_cut_over_the_vocabulary(feature):
    vocab = MODELS["tied"].vocab
    for c in program(TENSOR8, feature):
        assert not any(vocab in shape for shape in c.shapes), c


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=8, accumulate=4, remat="full"),
        Mesh(fsdp=8, accumulate=4),
        Mesh(data=2, fsdp=2, tensor=2, accumulate=4, model="tied"),
    ],
)
def test_accumulation_reduces_gradients_after_its_loop(mesh):
    """How much is reduced then is in `test_bytes`."""
    rt = make_runtime(mesh, "plain")
    inputs = make_inputs(rt, mesh, rows=mesh.accumulate * mesh.data * mesh.fsdp)
    found = collectives(compile_step(rt, *inputs).as_text())
    reductions = [c for c in found if c.kind in ("all-reduce", "reduce-scatter")]
    over_rows = [c for c in reductions if not c.groups <= groups_over(mesh, "tensor")]
    assert [c for c in over_rows if c.largest > WEIGHT]
    assert not [c for c in over_rows if c.loop]


def _matrices(trial):
    """(shape, shard) of the stacked matrices among the parameters."""
    return [
        found
        for path, found in trial.shards.items()
        if path.startswith(".trainable.params['blocks']") and "norm" not in path
    ]
