"""Integer execution equals the fake-quantized float einsum, for every weight format and activation format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.numerics import dequantize, parse_format, quantize
from lmeff.core.ops import Numerics, make_einsum
from lmeff.core.packed import floating_sums, integer_sums, packed_einsum

EQUATIONS = {
    "BTD,DHC->BTHC": ((2, 5, 40), (40, 4, 8)),
    "BTHC,HCD->BTD": ((2, 5, 4, 10), (4, 10, 24)),
    "BTF,FD->BTD": ((2, 5, 43), (43, 16)),
}
WEIGHTS = ["int8", "int8-affine", "int4/g8", "int4-affine/g8", "int8/tensor", "int3/g16"]
ACTIVATIONS = ["int8", "int8-affine", "int8/tensor", "int8-affine/tensor"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_packed_equals_fake_quantized(equation):
    shape_x, shape_w = EQUATIONS[equation]
    x = jax.random.normal(jax.random.key(0), shape_x) + 0.3
    w = jax.random.normal(jax.random.key(1), shape_w)
    w_letters = equation.split(",")[1].split("->")[0]
    contract = [i - len(w_letters) for i, c in enumerate(w_letters) if c not in equation.split("->")[1]]
    ranges = {"s": jnp.array([x.min() * 0.9, x.max() * 0.9])}
    for weight in WEIGHTS:
        format = parse_format(weight)
        axes = tuple(range(-w.ndim, 0)) if format.granularity == "tensor" else tuple(contract)

        @jax.jit  # a program a format, where one by one each operation would be one
        def products(x, packed, ranges):
            made = []
            for activation in ACTIVATIONS:
                einsum = make_einsum(Numerics((("s", parse_format(activation)),)), ranges)
                made.append([einsum(equation, x, weights, site="s") for weights in (packed, dequantize(packed))])
            return made

        packed = jax.jit(quantize, static_argnums=(1, 2))(w, format, axes)
        for activation, (integer, fake) in zip(ACTIVATIONS, products(x, packed, ranges), strict=True):
            error = float(jnp.max(jnp.abs(integer - fake)) / jnp.max(jnp.abs(fake)))
            assert error < 1e-6, (weight, activation, error)


@pytest.mark.parametrize("inner", [1, 43, 1024])
def test_codes_as_numbers_have_the_same_sums(inner):
    x, w = (
        jax.random.randint(jax.random.key(i), s, -127, 128, jnp.int8) for i, s in enumerate(((3, inner), (inner, 7)))
    )
    largest = jnp.full((1, inner), 127, jnp.int8)
    for left, right in ((x, w), (largest, largest.T)):
        integer, floating = (sums("NI,IO->NO", left, right) for sums in (integer_sums, floating_sums))
        assert integer.dtype == floating.dtype == jnp.int32
        np.testing.assert_array_equal(integer, floating)


@pytest.mark.parametrize(("platform", "multiplied"), [("cpu", "xi8>"), ("tpu", "xi8>"), ("cuda", "xbf16>")])
def test_what_a_platform_multiplies(platform, multiplied):
    """Seen in what is given to XLA, no device of the platform needed."""
    x = quantize(jnp.ones((2, 43)), parse_format("int8"), (-1,))
    w = quantize(jnp.ones((43, 16)), parse_format("int4/g8"), (-2,))
    lowered = jax.jit(lambda x, w: packed_einsum("NI,IO->NO", x, w)).trace(x, w).lower(lowering_platforms=(platform,))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert products
    assert all(line.count(multiplied) == 2 for line in products), products
