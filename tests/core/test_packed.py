"""Integer execution equals the fake-quantized float einsum, for every weight format and activation format."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.numerics import parse_format, quantize
from lmeff.core.ops import Numerics, make_einsum

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
    for weight, activation in itertools.product(WEIGHTS, ACTIVATIONS):
        format = parse_format(weight)
        axes = tuple(range(-w.ndim, 0)) if format.granularity == "tensor" else tuple(contract)
        packed = quantize(w, format, axes)
        einsum = make_einsum(Numerics((("s", parse_format(activation)),)), ranges)
        integer = einsum(equation, x, packed, site="s")
        from lmeff.core.numerics import dequantize

        fake = einsum(equation, x, dequantize(packed), site="s")
        error = float(jnp.max(jnp.abs(integer - fake)) / jnp.max(jnp.abs(fake)))
        assert error < 1e-6, (weight, activation, error)
