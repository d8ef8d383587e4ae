"""A whole train step on rows that are cut over devices is that of one device, in every form and with everything composed."""

import math

import numpy as np
import pytest

from lmeff.parallel.hlo import collectives
from lmeff.train.evaluate import make_eval_step
from tests.layouts.traffic import compared, received, step_of
from tests.layouts.trial import MODELS, ROWS, TOKENS, Mesh, assert_equals_one_device, make_inputs, make_runtime, run

SEQUENCE_PARALLEL = Mesh(context=4, tensor=2, remat="full", model="tied")
STEPS = {
    # feature, mesh
    "ring-context8": ("all", Mesh(context=8)),
    "ring-context4-tensor2-remat": ("plain", SEQUENCE_PARALLEL),
    "ring-data2-context2-tensor2-accumulated": ("teacher", Mesh(data=2, context=2, tensor=2, accumulate=2)),
    "ring-fsdp2-context4-names": ("weights", Mesh(fsdp=2, context=4, remat="names")),
    "gather-context8": ("mask", Mesh(context=8, sequence="gather")),
    "gather-fsdp2-context4-accumulated": ("plain", Mesh(fsdp=2, context=4, accumulate=2, sequence="gather")),
    "gather-context4-tensor2": ("all", Mesh(context=4, tensor=2, sequence="gather")),
    "gather-pipe2-context4": ("plain", Mesh(pipe=2, context=4, accumulate=4, sequence="gather")),
    "ulysses-context8-remat": ("plain", Mesh(context=8, sequence="ulysses", remat="full")),
    "ulysses-data2-context2-tensor2": ("plain", Mesh(data=2, context=2, tensor=2, sequence="ulysses")),
    "ulysses-fsdp2-context4-accumulated": ("all", Mesh(fsdp=2, context=4, accumulate=2, sequence="ulysses")),
}
FAST = {
    "ring-data2-context2-tensor2-accumulated",
    "gather-fsdp2-context4-accumulated",
    "ulysses-data2-context2-tensor2",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in STEPS])
def test_equals_one_device(name):
    feature, mesh = STEPS[name]
    assert_equals_one_device(mesh, feature)


def groups_over(mesh, axis):
    """The groups of devices along one axis of the mesh."""
    names, sizes = list(mesh.degrees), list(mesh.degrees.values())
    ids = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), names.index(axis), -1)
    return frozenset(frozenset(map(int, row)) for row in ids.reshape(-1, mesh.degrees[axis]))


def test_residuals_are_cut_over_context_and_tensor():
    """With full remat the backward loop is given each layer's input and nothing else: [L, B, T, D] with T over both axes."""
    text = run(SEQUENCE_PARALLEL, "plain").text
    assert f"f32[2,{ROWS},{TOKENS // 8},64]" in text
    assert f"f32[2,{ROWS},{TOKENS // 4},64]" not in text
    assert f"f32[{ROWS},{TOKENS},64]" not in text, "no activation is ever whole"


def test_over_context_only_keys_and_sums_move():
    """Embedding, ffn and head work on their own tokens: over context go keys, in attention, and sums of gradients and of scalars."""
    mesh = SEQUENCE_PARALLEL
    trial = run(mesh, "plain")
    found, over_tensor = collectives(trial.text), groups_over(mesh, "tensor")
    others = [c for c in found if c.kind != "collective-permute" and not c.groups <= over_tensor]
    assert others
    own = {math.prod(shard) for path, (_, shard) in trial.shards.items() if path.startswith(".trainable")}
    layer = {size // MODELS[mesh.model].layers for size in own}
    for c in others:
        if c.kind == "all-gather":
            assert set(c.dtypes) == {"s32"}, c
            assert "attention" in c.origin, c  # documents
            continue
        assert c.kind == "all-reduce", c
        assert {math.prod(shape) for shape in c.shapes} <= own | layer | {1}, c
    permutes = [c for c in found if c.kind == "collective-permute"]
    assert permutes
    assert all("attention" in c.origin for c in permutes)


@pytest.mark.parametrize("name", sorted(FAST))
def test_a_step_moves_what_the_formula_says_to_the_byte(name):
    """Keys, documents, gradients over context, and all else; others are compared in `tests/layouts/test_bytes_composed.py`."""
    feature, mesh = STEPS[name]
    got, want = compared(run(mesh, feature).text, step_of(mesh, feature))
    assert got == pytest.approx(want)


def test_a_ring_that_runs_forward_again_shares_a_send():
    """Full remat runs each layer's forward pass twice; the second one's first send is also the first of the backward pass, and XLA does it once."""
    mesh = SEQUENCE_PARALLEL
    cfg = MODELS[mesh.model]
    keys = 2 * ROWS * (TOKENS // 4) * (cfg.kv_heads // 2) * cfg.head_size * 4
    moved = received(run(mesh, "plain").text)
    forward, backward = 3 * keys, 3 * keys + 3 * keys
    assert moved["collective-permute", "f32"] == cfg.layers * (2 * forward + backward - keys)


@pytest.mark.parametrize("sequence", ["ring", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_token_losses_come_back_in_the_order_of_the_row(sequence):
    losses = {}
    for mesh in (Mesh(), Mesh(data=2, context=4, sequence=sequence)):
        rt = make_runtime(mesh, "plain")
        state, batch, _ = make_inputs(rt, mesh)
        step = make_eval_step(rt.student, rt.layout, rt.policy)
        losses[mesh] = np.asarray(step(state.trainable.params, state.compression, None, batch))
    want, got = losses.values()
    assert len(np.unique(want)) > TOKENS
    np.testing.assert_allclose(got, want, atol=1e-5)
