"""The kernels of quantized weights, run step by step, against NumPy; and the bytes that their blocks move."""

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.numerics import parse_format, quantize, stored_bits
from lmeff.kernels.quantized import integer_product, product_call, refusal, weight_product
from lmeff.kernels.traffic import Call, bytes_moved
from tests.kernels.cases import error, packed, product, shapes, tokens, values

# (tokens, inputs, outputs), format, outputs first. Whole tiles, none, several blocks, ragged last ones.
FAST = [((3, 43, 70), "int8", False), ((2, 2600, 200), "int4-affine/g32", False), ((5, 300, 600), "int8-affine", True)]
SLOW = [
    ((1, 128, 128), "int8", False),
    ((1, 1, 5), "int8", False),
    ((8, 2048, 512), "int4", False),
    ((3, 300, 1100), "int4", False),
    ((1, 5000, 640), "int8", False),
    ((9, 4096, 700), "int8-affine", True),
    ((2, 2600, 256), "int4/g32", False),
    ((2, 2600, 300), "int4-affine/g128", True),
    ((2, 2600, 300), "int4/g256", True),
    ((2, 200, 300), "int4-affine/g32", False),
    ((4, 96, 40), "int8/tensor", True),
    ((4, 96, 40), "int8-affine/tensor", False),
    ((17, 4100, 513), "int8", False),
    ((2, 3000, 130), "int3/g64", False),
    ((2, 72, 130), "int8/g8", False),
]
INTEGERS_FAST = [((3, 43, 70), "int8", False), ((2, 300, 600), "int4", True)]
INTEGERS_SLOW = [
    ((1, 128, 128), "int8", False),
    ((8, 2048, 512), "int4", False),
    ((1, 5000, 640), "int8", False),
    ((9, 4096, 700), "int8", True),
    ((4, 96, 40), "int8/tensor", True),
    ((17, 4100, 513), "int8", False),
]


@pytest.mark.parametrize(("shape", "format", "outputs_first"), shapes(FAST, SLOW))
def test_weights_equal_numpy(shape, format, outputs_first):
    n, inputs, outputs = shape
    x, w = tokens(n, inputs), packed(inputs, outputs, format, outputs_first)
    made = weight_product(x, w, outputs_first, interpret=True)
    assert made.dtype == jnp.float32
    assert error(made, product(x, w, outputs_first)) < 1e-6


@pytest.mark.parametrize("scale", ["int8", "int8/tensor"])
@pytest.mark.parametrize(("shape", "format", "outputs_first"), shapes(INTEGERS_FAST, INTEGERS_SLOW))
def test_integers_equal_numpy(shape, format, outputs_first, scale):
    n, inputs, outputs = shape
    parsed, w = parse_format(scale), packed(inputs, outputs, format, outputs_first)
    x = quantize(tokens(n, inputs), parsed, (-2, -1) if parsed.granularity == "tensor" else (-1,))
    made = integer_product(x, w, outputs_first, interpret=True)
    assert error(made, product(values(x), w, outputs_first)) < 2e-7, "sums are exact; three roundings follow"


def test_bfloat16_tokens_round_grouped_weights_once():
    x, w = tokens(4, 300, jnp.bfloat16), packed(300, 70, "int4/g32", False)
    rounded = values(w).astype(jnp.bfloat16).astype(float)
    want = jax.device_get(x).astype(float) @ rounded
    assert error(weight_product(x, w, False, interpret=True), want) < 1e-6


BYTES = [
    ((1, 4096, 4096), "int8", False),
    ((8, 4096, 4096), "int4/g128", False),
    ((8, 4096, 14336), "int4/g32", False),
    ((3, 768, 50304), "int8", True),
    ((2, 2600, 1100), "int4-affine/g32", False),
    ((1, 1000, 1100), "int4", False),
]


@pytest.mark.parametrize(("shape", "format", "outputs_first"), shapes(BYTES, []))
def test_bytes_moved_are_the_packed_ones(shape, format, outputs_first):
    n, inputs, outputs = shape
    w = jax.eval_shape(lambda: packed(inputs, outputs, format, outputs_first))
    call = product_call(n, w, outputs_first, jnp.bfloat16)
    weight = bytes_moved(Call(call.grid, call.operands[1:-1]))
    # Zero points are int32 where it counts them as bytes.
    stored = stored_bits(w) / 8 + (0 if w.zero is None else 3 * w.zero.size)
    assert weight == pytest.approx(stored, rel=1e-9), "every code and every scale once"
    assert bytes_moved(call) == pytest.approx(stored, rel=0.05), "few tokens add little"


def test_tokens_are_read_once_and_not_for_each_block_of_outputs():
    w = jax.eval_shape(lambda: packed(8192, 8192, "int8", False))
    call = product_call(16, w, False, jnp.bfloat16)
    assert min(call.grid) > 1
    assert bytes_moved(Call(call.grid, call.operands[:1])) == 16 * 8192 * 2


def test_bytes_count_blocks_that_are_fetched_again():
    w = jax.eval_shape(lambda: packed(8192, 8192, "int8", False))
    call = product_call(16, w, False, jnp.bfloat16)
    x = call.operands[0]._replace(block=(16, 1024), index=lambda o, i: (0, i))
    again = bytes_moved(Call((3, 8), (x,)))
    assert again == 3 * 16 * 8192 * 2


@pytest.mark.parametrize(
    ("case", "word"),
    [((64, 1 << 15, False, 32), "core's memory"), ((1, 64, True, 32), "128"), ((1, 64, False, 12), "multiple of 8")],
    ids=["tokens", "groups of the last dim", "groups of the first"],
)
def test_what_does_not_fit_is_refused_in_words(case, word):
    assert word in refusal(*case)
    assert refusal(1, 64, False, 32) is None
