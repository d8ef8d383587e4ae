"""Fake quantization of weights: gradients by their definition, scales by what shares them, learned scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.config import Quantize, build
from lmeff.compress.quantize import FLOOR, fake_quantization, least_error_scale
from lmeff.core.numerics import expand, fake_quantize, find_scale, parse_format
from lmeff.core.specs import ParamSpec, initialize
from lmeff.core.tree import flatten
from lmeff.models.config import preset
from lmeff.models.transformer import param_specs

SPEC = ParamSpec(letters="LDF", shape=(2, 24, 10), contract="D")
FORMATS = ["int8", "int4", "int3-affine", "int4/g8", "int4-affine/g7", "int2/tensor"]


def random(shape=SPEC.shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def axes_of(format):
    return SPEC.own_axes if format.granularity == "tensor" else SPEC.axes


@pytest.mark.parametrize("text", FORMATS)
def test_gradients_are_those_of_lsq(text):
    """Element by element in float64: straight through within the grid, 0 outside; `round(v) - v` within, the end of the grid outside."""
    format = parse_format(text)
    axes, w, g = axes_of(format), random(), random(seed=1)
    scale, zero = find_scale(w, format, axes)
    scale = scale * 0.4  # so that some are clipped
    d_w, d_scale = jax.jit(jax.grad(lambda w, s: jnp.sum(g * fake_quantize(w, s, zero, format, axes)), argnums=(0, 1)))(
        w, scale
    )
    wide = np.broadcast_to(expand(scale, format, axes, w.shape), w.shape)
    shift = np.float32(0) if zero is None else np.broadcast_to(expand(zero, format, axes, w.shape), w.shape)
    steps = np.asarray(w) / wide
    code = np.round(steps) + shift
    inside = (code >= format.qmin) & (code <= format.qmax)
    assert 0.02 < 1 - inside.mean() < 0.9
    assert np.array_equal(d_w, np.where(inside, g, 0))
    assert not np.any(np.asarray(d_w)[~inside])
    slope = np.where(inside, np.round(steps) - steps, np.clip(code, format.qmin, format.qmax) - shift)
    each = np.asarray(g, np.float64) * slope
    if format.granularity == "group":
        starts = np.arange(0, 24, format.group)
        want = np.add.reduceat(each, starts, axis=1)
    else:
        want = each.sum(axis=axes, keepdims=True)
    want = want / np.sqrt(w.size / scale.size * format.qmax)
    assert want.shape == d_scale.shape
    np.testing.assert_allclose(d_scale, want, rtol=2e-4, atol=1e-5)


def test_clipped_values_move_with_the_scale():
    """Where everything is clipped the loss is smooth in the scale, so finite differences are an oracle free of conventions."""
    format = parse_format("int4")
    w = jnp.sign(random((12, 5))) * (2 + jnp.abs(random((12, 5))))
    g, scale = random((12, 5), 1), jnp.full((1, 5), 0.1)

    @jax.jit
    def loss(s):
        return jnp.sum(g * fake_quantize(w, s, None, format, (-2,)))

    step = 1e-2
    numeric = np.array(
        [(loss(scale.at[0, i].add(step)) - loss(scale.at[0, i].add(-step))) / (2 * step) for i in range(5)]
    )
    np.testing.assert_allclose(jax.grad(loss)(scale)[0] * np.sqrt(12 * 7), numeric, rtol=1e-3, atol=1e-3)


def test_min_max_passes_gradients_straight_through():
    compression = fake_quantization(parse_format("int4"))
    params, specs = {"w": random()}, {"w": SPEC}
    state = compression.init(params, specs)
    assert jax.tree.leaves(state) == []
    assert set(state.auxiliary) == {"w"}
    grads = jax.grad(lambda p: jnp.sum(compression.apply(p, state)["w"] * 2.5))(params)
    assert np.all(np.asarray(grads["w"]) == 2.5)


def test_scales_are_shared_along_contracted_dims_only():
    specs = param_specs(preset("tiny"))
    params = initialize(jax.random.key(0), specs)
    shapes = {}
    for text in ("int8", "int4/g4", "int8/tensor"):
        compression = build(
            (Quantize(rules=(("blocks/(attn/(wq|wo)|mlp/up)", text), ("embed/table", text), (".*", None))),)
        )
        packed = flatten(jax.eval_shape(lambda p, c=compression: c.export(p, c.init(p, specs)), params))
        shapes[text] = {path: leaf.scale.shape for path, leaf in packed.items() if hasattr(leaf, "scale")}
    names = ("embed/table", "blocks/attn/wq", "blocks/attn/wo", "blocks/mlp/up")
    assert [shapes["int8"][n] for n in names] == [(64, 1), (2, 1, 4, 8), (2, 1, 1, 32), (2, 1, 64)]
    assert [shapes["int4/g4"][n] for n in names] == [(64, 8), (2, 8, 4, 8), (2, 4, 2, 32), (2, 8, 64)]
    assert [shapes["int8/tensor"][n] for n in names] == [(1, 1), (2, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1)]


@pytest.mark.parametrize("text", FORMATS)
def test_a_learned_scale_starts_where_the_error_is_least(text):
    format = parse_format(text)
    axes, w = axes_of(format), random()

    @jax.jit
    def error(scale, zero):
        return jnp.sum((w - fake_quantize(w, scale, zero, format, axes)) ** 2)

    scale, zero = jax.jit(lambda w: least_error_scale(w, format, axes))(w)
    low_scale, low_zero = find_scale(w, format, axes)
    assert error(scale, zero) <= error(low_scale, low_zero)
    if format.bits <= 3:
        assert error(scale, zero) < 0.9 * error(low_scale, low_zero)
    assert np.all(np.asarray(scale) > 0)


def test_learning_the_scale_lowers_the_error_from_a_bad_start():
    compression = fake_quantization(parse_format("int3"), method="lsq")
    params, specs = {"w": random()}, {"w": SPEC}
    state = compression.init(params, specs)
    best = float(jnp.sum((compression.apply(params, state)["w"] - params["w"]) ** 2))
    state = state._replace(trainable=jax.tree.map(lambda f: f * 1.9, state.trainable))

    def error(trainable):
        return jnp.sum((compression.apply(params, state._replace(trainable=trainable))["w"] - params["w"]) ** 2)

    step = jax.jit(jax.value_and_grad(error))
    first, _ = step(state.trainable)
    trainable = state.trainable
    for _ in range(300):
        value, grads = step(trainable)
        trainable = jax.tree.map(lambda f, d: f - 0.02 * jnp.sign(d), trainable, grads)
    assert float(first) > 1.5 * best
    assert float(value) < 1.15 * best


def test_a_learned_scale_stays_positive_and_can_come_back():
    compression = fake_quantization(parse_format("int4"), method="lsq")
    params, specs = {"w": random()}, {"w": SPEC}
    state = compression.init(params, specs)
    start = np.asarray(state.auxiliary["w"].value.start)
    for factor in (FLOOR / 2, 0.0, -3.0):
        low = state._replace(trainable=jax.tree.map(lambda f, v=factor: jnp.full_like(f, v), state.trainable))
        packed = compression.export(params, low)["w"]
        assert np.array_equal(packed.scale, start * np.float32(FLOOR))
        # Every weight is clipped: the error falls as the scale grows, and the gradient says so.
        grads = jax.grad(
            lambda t, low=low: jnp.sum((compression.apply(params, low._replace(trainable=t))["w"] - params["w"]) ** 2)
        )(low.trainable)
        assert np.all(np.asarray(jax.tree.leaves(grads)[0]) < 0)


def test_integer_scales_times_codes_are_exact():
    """16 significant bits of scale and 8 of steps fit float32: no rounding in dequantization."""
    for text in ("int8", "int8-affine", "int8-affine/g5"):
        compression = fake_quantization(parse_format(text))
        params, specs = {"w": random() * 3e-3}, {"w": SPEC}
        packed = compression.export(params, compression.init(params, specs))["w"]
        scale = np.asarray(expand(packed.scale, packed.format, packed.axes, packed.shape), np.float64)
        zero = 0 if packed.zero is None else np.asarray(expand(packed.zero, packed.format, packed.axes, packed.shape))
        exact = (np.asarray(packed.q, np.float64) - zero) * scale
        shown = np.asarray(compression.apply(params, compression.init(params, specs))["w"], np.float64)
        assert np.array_equal(exact, shown)
        assert np.abs(shown - np.asarray(params["w"], np.float64)).max() <= scale.max() * 0.5001
