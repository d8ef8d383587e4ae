"""Mixture of experts: both forms equal a loop over tokens, drop whom they should, and are compressed expert by expert."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.activations import Activations
from lmeff.compress.calibrate import calibrate
from lmeff.compress.config import Prune, Quantize, build, describe
from lmeff.compress.importance import scores
from lmeff.compress.shrink import ShrinkConfig, plan, shrink
from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.core.grouped import FORMS, Rows, block_size, padded_rows
from lmeff.core.numerics import dequantize
from lmeff.core.ops import make_ops, recording
from lmeff.core.specs import count
from lmeff.core.tree import flatten, map_with_path
from lmeff.distill.objectives import Projection, head_objective
from lmeff.models.config import ModelConfig, MoE, preset, read
from lmeff.models.cost import active_parameters, flops_per_token
from lmeff.models.mlp import mlp_layer
from lmeff.models.moe import moe_layer, row_capacity, take_rows
from lmeff.models.transformer import forward, param_specs, project, sites
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.seam import layout_ops
from lmeff.train.optim import Kinds
from tests.models import oracle

ROWS, T = 3, 12
BASE = ModelConfig(vocab=23, width=16, layers=2, heads=2, kv_heads=1, ffn=12, moe=MoE(experts=4))
FORMS_OF_LAYER = {
    "dropless": MoE(experts=4),
    "one expert a token": MoE(experts=5, top_k=1, normalize=False, shared=2),
    "all experts": MoE(experts=3, top_k=3),
    "capacity": MoE(experts=4, capacity=0.75),
    "capacity, one of eight, shared": MoE(experts=8, top_k=1, capacity=1.0, shared=1, normalize=False),
    "capacity that drops none": MoE(experts=4, capacity=4.0),
}
ONE = make_layout(MeshPlan(), jax.devices()[:1])


def make_batch():
    """Rows of two documents; the last tokens of the second row and all of the third are padding."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, BASE.vocab, (ROWS, T), dtype=np.int32)
    segments = np.where(np.arange(T) < 5, 1, 2) * np.ones((ROWS, 1), np.int32)
    segments[1, -3:], segments[2] = 0, 0
    positions = np.where(np.arange(T) < 5, np.arange(T), np.arange(T) - 5) * np.ones((ROWS, 1), np.int32)
    weights = np.zeros((ROWS, T), np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    return Batch(tokens, np.roll(tokens, -1, 1), segments, positions, weights)


def with_moe(moe, **changes):
    return dataclasses.replace(BASE, moe=moe, **changes)


def make_params(cfg, size=0.4):
    """Weights at which experts differ and routers have opinions."""
    random = np.random.default_rng(0)

    def leaf(_, spec):
        return jnp.asarray((spec.init == "ones") + size * random.standard_normal(spec.shape), jnp.float32)

    return map_with_path(leaf, param_specs(cfg))


def layer_of(cfg):
    """The jitted layer `(params of one layer, x, batch) -> (y, what it kept)`."""

    def run(p, x_BTD, batch):
        scope = make_ops(attend=None)({})
        y_BTD = moe_layer(x_BTD, p, batch, cfg, cfg.moe, scope.ops)
        return y_BTD, {name.removeprefix("kept/moe."): x for name, x in scope.close().items()}

    return jax.jit(run)


def first_layer(cfg):
    return jax.tree.map(lambda w: w[0], make_params(cfg)["blocks"]["moe"])


def inputs(scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(2).standard_normal((ROWS, T, BASE.width)), jnp.float32)


@pytest.mark.parametrize("form", FORMS_OF_LAYER)
def test_equals_a_loop_over_tokens(form):
    cfg, x, batch = with_moe(FORMS_OF_LAYER[form]), inputs(), make_batch()
    p = first_layer(cfg)
    y, kept = layer_of(cfg)(p, x, batch)
    wide = {path: np.asarray(w, np.float64) for path, w in flatten(p).items()}
    for row in range(ROWS):
        want, told = oracle.experts(np.asarray(x[row], np.float64), batch.segments[row], wide, cfg)
        np.testing.assert_allclose(y[row], np.stack(want), atol=2e-5)
        weight = batch.weights[row].sum()
        for name, sums_B in kept.items():
            np.testing.assert_allclose(sums_B[row], told[name] * weight, rtol=2e-5, err_msg=name)
        if form == "capacity" and row == 0:
            assert 0 < told["dropped"] < 0.5, "the test drops some"
    assert set(kept) == ({"balance", "router_z"} if cfg.moe.capacity is None else {"balance", "router_z", "dropped"})
    if form == "capacity that drops none":
        dropless = layer_of(with_moe(MoE(experts=4)))(p, x, batch)[0]
        np.testing.assert_allclose(y, dropless, atol=1e-5)
        assert (kept["dropped"] == 0).all()


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_of_equally_liked_experts_the_first_are_taken(capacity):
    cfg = with_moe(MoE(experts=4, top_k=2, capacity=capacity))
    p = first_layer(cfg)
    p = {**p, "router": jnp.zeros_like(p["router"])}
    changed = {name: w if name == "router" else w.at[2:].mul(7.0) for name, w in p.items()}
    layer, x, batch = layer_of(cfg), inputs(), make_batch()
    y, kept = layer(p, x, batch)
    np.testing.assert_array_equal(y, layer(changed, x, batch)[0])  # experts 2 and 3 get nothing
    real, weight = (batch.segments > 0).sum(1), batch.weights.sum(1)
    np.testing.assert_allclose(kept["balance"], weight, rtol=1e-6)  # likes are even, whatever the shares
    np.testing.assert_allclose(kept["router_z"], np.log(4) ** 2 * weight, rtol=1e-6)
    if capacity is not None:
        room = row_capacity(cfg.moe, T)
        assert room == 3
        np.testing.assert_allclose(
            kept["dropped"], weight * np.maximum(real - room, 0) / np.maximum(real, 1), rtol=1e-6
        )
        assert (np.asarray(y)[0, room:] == 0).all(), "what is dropped passes through the residual stream"
        assert (np.abs(np.asarray(y)[0, :room]).max(-1) > 0).all()


@pytest.mark.parametrize("moe", [MoE(experts=1, top_k=1), MoE(experts=1, top_k=1, capacity=1.0)])
def test_one_expert_is_a_plain_ffn(moe):
    cfg, x, batch = with_moe(moe), inputs(), make_batch()
    p = first_layer(cfg)
    plain = {name: p[name][0] for name in ("up", "gate", "down")}
    dense = dataclasses.replace(cfg, moe=None)

    def loss(run, p):
        return (jnp.where(batch.segments[..., None] > 0, run(p), 0) ** 2).sum()

    got = jax.jit(jax.value_and_grad(lambda p: loss(lambda p: layer_of(cfg)(p, x, batch)[0], p)))(p)
    ops = make_ops(attend=None)({}).ops
    want = jax.jit(jax.value_and_grad(lambda p: loss(lambda p: mlp_layer(x, p, dense, ops), p)))(plain)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for name, gradient in want[1].items():
        np.testing.assert_allclose(got[1][name][0], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name)
    assert (got[1]["router"] == 0).all()


@pytest.mark.parametrize("moe", [MoE(experts=4), MoE(experts=4, capacity=0.75)])
def test_no_token_hears_a_later_one(moe):
    """By gradient, and by value: a later token that changes its experts takes nobody's place."""
    cfg, batch = with_moe(moe), make_batch()
    p, x, at = first_layer(cfg), inputs(), 6
    layer = layer_of(cfg)
    gradient = jax.jit(jax.grad(lambda x: (layer(p, x, batch)[0][0, at] ** 2).sum()))(x)
    assert (np.abs(gradient).max(-1) > 0).sum() == 1
    assert np.abs(gradient[0, at]).max() > 0
    other = x.at[0, at + 1 :].multiply(-3.0)
    np.testing.assert_array_equal(layer(p, x, batch)[0][0, : at + 1], layer(p, other, batch)[0][0, : at + 1])
    assert np.abs(layer(p, x, batch)[0][0, at + 1 :] - layer(p, other, batch)[0][0, at + 1 :]).max() > 0


def test_the_objective_adds_what_routers_cost():
    """Sums over weighted tokens: `balance` and `router_z` of the config times their rows' means, by the rows' targets, over all layers."""
    batch = jax.tree.map(jnp.asarray, make_batch())
    cfg, dear = (
        with_moe(MoE(experts=4, balance=0.0, router_z=0.0)),
        with_moe(MoE(experts=4, balance=0.3, router_z=0.02)),
    )
    params = make_params(cfg)

    def sums(cfg):
        out = forward(params, batch, cfg, make_ops=layout_ops(ONE))
        return head_objective(Projection(cfg))(ONE, out, None, batch), out.sums

    (free, metrics), kept = jax.jit(functools.partial(sums, cfg))()
    (paid, told), _ = jax.jit(functools.partial(sums, dear))()
    assert kept["moe.balance"].shape == (cfg.layers, ROWS)
    total = kept["moe.balance"].sum() * 0.3 + kept["moe.router_z"].sum() * 0.02
    np.testing.assert_allclose(paid - free, total, rtol=1e-4)
    assert metrics.keys() == {"loss", "balance", "router_z"}
    np.testing.assert_allclose(told["balance"], kept["moe.balance"].sum() / cfg.layers, rtol=1e-6)
    assert told["balance"] / batch.weights.sum() >= 1


# ---- products of groups


SIZES = np.array([3, 0, 17, 8], np.int32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("equation", ["ND,EDF->NF", "NF,EFD->ND"])
def test_products_of_groups_equal_a_loop(form, equation):
    random, block = np.random.default_rng(0), 8
    sizes = -(-SIZES // block) * block
    x = np.zeros((padded_rows(SIZES.sum(), 4, block), 6), np.float32)
    starts = np.cumsum(sizes) - sizes
    groups = [slice(start, start + size) for start, size in zip(starts, SIZES, strict=True)]
    for group in groups:
        x[group] = random.standard_normal(x[group].shape)
    x[sizes.sum() :] = np.nan  # nobody's rows
    w = random.standard_normal((4, 6, 5)).astype(np.float32)
    g = random.standard_normal((len(x), 5)).astype(np.float32)
    held = np.concatenate([np.arange(group.start, group.stop) for group in groups])
    g[np.setdiff1d(np.arange(len(x)), held)] = 0

    def call(x, w):
        return FORMS[form](equation, x, w, Rows(jnp.asarray(sizes), block))

    y, pull = jax.vjp(jax.jit(call), x, w)
    d_x, d_w = pull(jnp.asarray(g))
    for expert, group in enumerate(groups):
        np.testing.assert_allclose(y[group], x[group] @ w[expert], atol=1e-5)
        np.testing.assert_allclose(d_x[group], g[group] @ w[expert].T, atol=1e-5)
        np.testing.assert_allclose(d_w[expert], x[group].T @ g[group], atol=1e-5)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (7, 3), (64, 8), (5000, 8), (40, 64)])
def test_rows_have_room_however_they_fall(rows, groups):
    random, block = np.random.default_rng(0), block_size(rows, groups)
    room = padded_rows(rows, groups, block)
    assert room % block == 0
    for likes in (np.eye(groups)[0], np.ones(groups) / groups, random.dirichlet(np.full(groups, 0.3))):
        sizes = random.multinomial(rows, likes)
        assert (-(-sizes // block) * block).sum() <= room


def test_taking_rows_has_the_gradient_of_an_index():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    index, back = jnp.array([2, 0, 9, 2]), jnp.array([[1, 9], [9, 9], [3, 0], [9, 9]])

    def loss(take):
        return lambda x: (jnp.sin(take(x)) * jnp.arange(12.0).reshape(4, 3)).sum()

    got = jax.grad(loss(lambda x: take_rows(x, index, back)))(x)
    want = jax.grad(loss(lambda x: jnp.concatenate([x, jnp.zeros((6, 3))])[index]))(x)
    np.testing.assert_allclose(got, want, atol=1e-6)


# ---- compression


COMPRESSED = with_moe(MoE(experts=4, shared=1), width=16, ffn=16)


def test_every_expert_has_its_own_scales_and_its_own_sparsity():
    specs = param_specs(COMPRESSED)
    params = make_params(COMPRESSED)
    params["blocks"]["moe"]["up"] = params["blocks"]["moe"]["up"].at[:, 1].mul(100.0)
    formats = {
        ("minmax", "int8"): (2, 4, 1, 16),
        ("minmax", "int4/g8"): (2, 4, 2, 16),
        ("lsq", "int8/tensor"): (2, 4, 1, 1),
    }
    for (method, text), shape in formats.items():
        compression = build((Quantize(method=method, rules=(("blocks/moe/up", text), (".*", None))),))

        def both(params, compression=compression):
            state = compression.init(params, specs)
            return compression.export(params, state), compression.apply(params, state)

        packed, seen = (tree["blocks"]["moe"]["up"] for tree in jax.jit(both)(params))
        assert packed.scale.shape == shape
        np.testing.assert_array_equal(dequantize(packed), seen)
        apart = np.abs(seen - params["blocks"]["moe"]["up"]).mean((2, 3))
        assert (apart[:, 0] < 0.05 * apart[:, 1]).all(), "a large expert does not drown the others"
    for prune, axis in ((Prune(sparsity=0.75), None), (Prune(pattern="2:4"), -2)):
        compression = build((prune,))
        run = jax.jit(lambda params, own=compression: own.apply(params, own.init(params, specs)))
        seen = flatten(run(params))
        kept = np.asarray(seen["blocks/moe/up"] != 0)
        assert (kept.mean((2, 3)) == (0.25 if axis is None else 0.5)).all()
        assert (np.asarray(seen["blocks/moe/shared/up"] != 0).mean((1, 2)) < 1).all()
        assert (np.asarray(seen["blocks/moe/router"]) != 0).all()
        if axis is not None:
            assert (kept.reshape(2, 4, 4, 4, 16).sum(3) == 2).all(), "2 of 4 along D"
    rows = {path: text for path, _, _, text in describe((Quantize(),), specs)}
    assert rows["blocks/moe/down"] == rows["blocks/moe/shared/up"] == "int8"
    assert rows["blocks/moe/router"] != "int8"


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_a_packed_model_computes_what_was_trained(capacity):
    """With activations in integers too: dropless experts multiply dequantized codes, those with a capacity the codes themselves."""
    cfg = dataclasses.replace(COMPRESSED, moe=MoE(experts=4, shared=1, capacity=capacity), layers=1)
    params, batch = make_params(cfg), jax.tree.map(jnp.asarray, make_batch())
    compression = build((Quantize(),))
    state = compression.init(params, param_specs(cfg))
    make = layout_ops(ONE, Activations(rules=(("(moe|shared).*", "int8"), (".*", None))).resolve(cfg))

    def logits(params, view, state):
        out = forward(params, batch, cfg, make_ops=make, view=view, view_state=state)
        return project(out.hidden_BTD, out.head, cfg, make({}).ops)

    want = jax.jit(lambda p: logits(p, compression.apply, state))(params)
    got = jax.jit(lambda p: logits(p, lambda p, s: p, ()))(compression.export(params, state))
    plain = jax.jit(lambda p: logits(p, lambda p, s: p, ()))(params)
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    assert np.abs(plain - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("capacity", [None, 0.75])
def test_what_enters_the_experts_is_recorded_by_token(capacity):
    """And calibrated: the hidden state of every choice in the order of tokens, zeros for what was dropped."""
    cfg = dataclasses.replace(COMPRESSED, moe=MoE(experts=4, shared=1, capacity=capacity), layers=1)
    params, batch = make_params(cfg), make_batch()

    def seen(params):
        make = recording(layout_ops(ONE), lambda name, x: x if name in ("moe.up", "moe.down") else None)
        return forward(params, jax.tree.map(jnp.asarray, batch), cfg, make_ops=make).records

    records = {name.removeprefix("blocks/"): np.asarray(x[0], np.float64) for name, x in jax.jit(seen)(params).items()}
    p = {name: np.asarray(w[0], np.float64) for name, w in params["blocks"]["moe"].items() if name != "shared"}
    room = T if capacity is None else row_capacity(cfg.moe, T)
    want = np.zeros((ROWS, T, 2, cfg.ffn))
    for row in range(ROWS):
        taken = [0] * 4
        for t in np.flatnonzero(batch.segments[row]):
            v = records["moe.up"][row, t]
            for k, e in enumerate(np.argsort(-(v @ p["router"]), kind="stable")[:2]):
                taken[e] += 1
                if taken[e] <= room:
                    gate = v @ p["gate"][e]
                    want[row, t, k] = gate / (1 + np.exp(-gate)) * (v @ p["up"][e])
    np.testing.assert_allclose(records["moe.down"], want, atol=1e-4)
    assert (np.abs(want).max(-1) == 0)[batch.segments > 0].any() == (capacity is not None)
    ranges = calibrate(Activations(rules=((".*", "int8/tensor"),)), cfg, params, [batch], ONE)
    assert set(ranges) == set(sites(cfg))
    real = want[batch.segments > 0]
    np.testing.assert_allclose(ranges["moe.down"][0], [real.min(), real.max()], atol=1e-4)


def test_layers_and_heads_shrink_and_experts_do_not():
    cfg = dataclasses.replace(COMPRESSED, layers=3, heads=4, kv_heads=2)
    params, batch = make_params(cfg), make_batch()
    for importance in ("activation", "magnitude", "random"):
        config = ShrinkConfig(layers=2, kv_heads=1, importance=importance)
        cut = plan(config, cfg, scores(importance, cfg, params, [batch], ONE))
        new, small, _ = shrink(cfg, params, None, cut)
        assert new == config.apply(cfg) == dataclasses.replace(cfg, layers=2, kv_heads=1, heads=2, head_width=4)
        want = {path: spec.shape for path, spec in flatten(param_specs(new)).items()}
        assert {path: w.shape for path, w in flatten(small).items()} == want
        np.testing.assert_array_equal(small["blocks"]["moe"]["up"], params["blocks"]["moe"]["up"][cut.layers])
    with pytest.raises(ConfigError, match=r"shrink\.ffn: got 8 for a model with 4 experts"):
        ShrinkConfig(ffn=8).apply(cfg)


def test_optimizers_see_each_expert_as_a_matrix():
    specs = param_specs(COMPRESSED)
    dims = flatten(Kinds(flatten(specs)).muon(map_with_path(lambda _, spec: np.zeros(spec.shape), specs)))
    assert (dims["blocks/moe/up"].reduction_axis, dims["blocks/moe/up"].output_axis) == ((2,), (3,))
    assert (dims["blocks/attn/wq"].reduction_axis, dims["blocks/attn/wq"].output_axis) == ((1,), (2, 3))


# ---- sizes and refusals


def test_published_sizes():
    """Jiang et al. 2024 name 47B parameters, 13B of them active."""
    cfg = preset("mixtral_8x7b")
    assert count(param_specs(cfg)) == 46_702_792_704
    assert active_parameters(cfg) == 12_879_925_248
    attention = cfg.layers * 4 * cfg.heads * cfg.head_size * (4096 + 1) / 2
    assert flops_per_token(cfg, 4096) == pytest.approx(2 * (12_879_925_248 - 32_000 * 4096 - 65 * 4096) + attention)
    shared = with_moe(MoE(experts=4, top_k=1, shared=2))
    dense = dataclasses.replace(shared, moe=None, ffn=3 * shared.ffn)
    router = shared.layers * shared.width * 4
    assert active_parameters(shared) == active_parameters(dense) + router


def test_configs_come_back_from_json():
    for cfg in (BASE, preset("tiny"), preset("moe_tiny")):
        assert read(dataclasses.asdict(cfg)) == cfg


BAD = {
    r"moe\.experts: got 0": {"experts": 0},
    r"moe\.top_k: got 5 of 4 experts, expected 1 to 4": {"experts": 4, "top_k": 5},
    r"moe\.top_k: got 0": {"top_k": 0},
    r"moe\.shared: got -1": {"shared": -1},
    r"moe\.balance: got -0\.1": {"balance": -0.1},
    r"moe\.router_z: got -1": {"router_z": -1},
    r"moe\.capacity: got 0": {"capacity": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_mixtures_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        MoE(**BAD[message])


def test_experts_with_biases_are_refused():
    with pytest.raises(ConfigError, match=r"model\.bias: got 'all' with model\.moe"):
        ModelConfig(moe=MoE(), bias="all")
