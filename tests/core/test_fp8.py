"""fp8 against ml_dtypes' own float8: the grid by all of its codes, rounding by the table, and what the law of formats says about it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.core.numerics import (
    QFormat,
    dequantize,
    encode,
    fake_quantize,
    fake_quantize_min_max,
    parse_format,
    quantize,
    round_to_grid,
)
from lmeff.core.ops import Numerics, make_einsum
from lmeff.kernels.table import packed_product

FP8 = parse_format("fp8")
CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
GRID = np.unique(CODES[np.isfinite(CODES)])


def rounded_by_table(x):
    """The nearest number of the grid; of two as near, the one whose last bit is 0; beyond the end, the end."""
    x = np.clip(np.asarray(x, np.float64), GRID[0], GRID[-1])
    above = np.clip(np.searchsorted(GRID, x), 1, len(GRID) - 1)
    low, high = GRID[above - 1], GRID[above]
    even = (
        np.arange(len(GRID)) % 2 == np.flatnonzero(GRID == 0)[0] % 2
    )  # codes of a sign are in the order of their values
    nearer_high = (high - x < x - low) | ((high - x == x - low) & even[above])
    return np.where(nearer_high, high, low)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_rounding_is_that_of_the_table(jit):
    """All numbers of the grid, the middles between neighbours and what lies just beside them, and random ones over all binades."""
    middles = ((GRID[1:] + GRID[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(sign * np.inf)) for sign in (-1, 1)]
    random = np.random.default_rng(0).normal(size=4096) * 2.0 ** np.random.default_rng(1).integers(-14, 10, 4096)
    x = np.concatenate([GRID, middles, *beside, random, [464.0, 465.0, 1e6, -1e30, 3e38, 1e-30]]).astype(np.float32)
    fn = jax.jit(encode, static_argnums=(3, 4)) if jit else encode
    got = fn(jnp.asarray(x), jnp.float32(1), None, FP8, (-1,))
    np.testing.assert_array_equal(np.asarray(got, np.float64), rounded_by_table(x))
    inside = np.abs(x) <= 448
    np.testing.assert_array_equal(got[inside], x[inside].astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    stored = quantize(jnp.asarray(x), FP8, (-1,), scale=jnp.ones((1,), jnp.float32))
    assert stored.q.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(stored.q).astype(np.float32), got)


def test_beyond_the_end_the_grid_goes_on_so_that_gradients_know_what_is_clipped():
    got = round_to_grid(jnp.float32([448, 463.9, 464, 464.1, 500, -5000]), FP8)
    np.testing.assert_array_equal(got, [448, 448, 448, 480, 512, -5120])
    assert np.isnan(
        jnp.float32(500).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    )  # why nothing is cast before it is clipped


def test_gradients_are_those_of_lsq():
    w = jax.random.normal(jax.random.key(0), (40, 6))
    g = jax.random.normal(jax.random.key(1), w.shape)
    scale = jnp.abs(w).max(0, keepdims=True) / 448 * 0.5  # so that some are clipped
    d_w, d_scale = jax.grad(lambda w, s: jnp.sum(g * fake_quantize(w, s, None, FP8, (-2,))), argnums=(0, 1))(w, scale)
    steps = np.asarray(w, np.float64) / np.asarray(scale)
    inside = np.abs(steps) <= 464
    assert 0.02 < 1 - inside.mean() < 0.9
    np.testing.assert_array_equal(d_w, np.where(inside, g, 0))
    slope = np.where(inside, rounded_by_table(steps) - steps, np.sign(steps) * 448)
    want = (np.asarray(g, np.float64) * slope).sum(0, keepdims=True) / np.sqrt(40 * 448)
    np.testing.assert_allclose(d_scale, want, rtol=2e-4)


@pytest.mark.parametrize("text", ["fp8", "fp8/tensor", "fp8/g7"])
def test_codes_reach_the_end_and_quantizing_twice_is_quantizing_once(text):
    format = parse_format(text)
    axes = (-2, -1) if format.granularity == "tensor" else (-2,)
    w = jax.random.normal(jax.random.key(2), (40, 6)) * jnp.exp(jax.random.normal(jax.random.key(3), (40, 6)) * 4)
    once = quantize(w, format, axes)
    twice = quantize(dequantize(once), format, axes)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32))
    codes = np.abs(np.asarray(once.q).astype(np.float32))
    assert codes.max() == 448
    assert (np.sort(codes.max(0)) == 448).all() or format.granularity == "tensor"


def test_a_relative_error_is_at_most_a_sixteenth():
    """Normal codes have 4 significant bits; below 2^-6 steps errors are at most half of 2^-9 steps."""
    w = jax.random.normal(jax.random.key(4), (512, 8))
    packed = quantize(w, FP8, (-2,))
    error, scale = np.abs(np.asarray(dequantize(packed) - w)), np.asarray(packed.scale)
    assert (error <= np.maximum(np.abs(w) / 16 * (1 + 1e-6), scale * 2.0**-10)).all()
    assert (error / np.abs(w)).max() > 1 / 18


def test_half_precision_weights_are_rounded_once():
    w = jax.random.normal(jax.random.key(5), (64, 4), jnp.bfloat16)
    seen = fake_quantize_min_max(w, FP8, (-2,))
    packed = quantize(w, FP8, (-2,))
    want = (np.asarray(packed.q).astype(np.float32) * np.asarray(packed.scale)).astype(ml_dtypes.bfloat16)
    assert seen.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(seen), want)


@pytest.mark.parametrize("text", ["fp8", "fp8/tensor", "fp8/g32", "int4/g32", "int8-affine/tensor", "int3-affine"])
def test_texts_of_formats_are_read_back(text):
    assert str(parse_format(text)) == text


def test_formats_that_do_not_exist_are_refused():
    for text in ("fp4", "fp8-affine", "fp8/channel", "float8", "fp8/g"):
        with pytest.raises(ConfigError, match=rf"got '{text}', expected intBITS.*or fp8"):
            parse_format(text)
    for kind, bits, symmetric in itertools.product(["float"], [8, 4], [True, False]):
        if (bits, symmetric) != (8, True):
            with pytest.raises(ConfigError, match="expected 8 bits and symmetric"):
                QFormat(kind=kind, bits=bits, symmetric=symmetric)
    with pytest.raises(ConfigError, match="got 'nf', expected one of"):
        QFormat(kind="nf")


@pytest.mark.parametrize("text", ["fp8", "fp8/tensor", "fp8/g8"])
@pytest.mark.parametrize("tokens", [1, 40], ids=["decoding", "prompt"])
def test_the_form_of_a_platform_takes_fp8_like_any_code(text, tokens):
    """Whatever form computes a product with a packed weight on this platform, with activations in integers or none."""
    x, w = jax.random.normal(jax.random.key(8), (tokens, 64)), jax.random.normal(jax.random.key(9), (64, 24))
    format = parse_format(text)
    packed = quantize(w, format, (-2, -1) if format.granularity == "tensor" else (-2,))
    for activations in ((), (("s", parse_format("int8")),)):
        numerics = Numerics(activations)
        plain = make_einsum(numerics, {})("TD,DF->TF", x, packed, site="s")
        form = make_einsum(numerics, {}, packed=functools.partial(packed_product, "cpu"))
        np.testing.assert_allclose(form("TD,DF->TF", x, packed, site="s"), plain, rtol=0, atol=1e-5)
        np.testing.assert_allclose(plain, x @ dequantize(packed), rtol=0, atol=0.2 if activations else 1e-5)


@pytest.mark.parametrize(
    ("activation", "weight"), [("int8", "fp8"), ("fp8", "int4/g8"), ("fp8", "fp8"), ("fp8/tensor", "fp8/g7")]
)
def test_products_with_fp8_are_floating_products_of_numbers_on_their_grids(activation, weight):
    """With integers as with fp8 on the other side: codes of a float cannot be summed as integers."""
    x, w = jax.random.normal(jax.random.key(6), (3, 40)), jax.random.normal(jax.random.key(7), (40, 6))
    format, packed = parse_format(activation), quantize(w, parse_format(weight), (-2,))
    got = make_einsum(Numerics((("s", format),)), {"s": jnp.array([-1.5, 2.0])})("TD,DF->TF", x, packed, site="s")
    steps = np.abs(x).max(1, keepdims=True) if format.granularity == "channel" else np.full((3, 1), 2.0)
    steps = np.asarray(steps, np.float64) / (448 if format.is_float else 127)
    seen = steps * (rounded_by_table(x / steps) if format.is_float else np.round(x / steps))
    np.testing.assert_allclose(got, seen @ np.asarray(dequantize(packed), np.float64), rtol=0, atol=2e-3)
    assert np.abs(got - x @ dequantize(packed)).max() > 1e-2  # the activation's own rounding is seen
