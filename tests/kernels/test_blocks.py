"""Products by blocks: every cut of a matrix gives the numbers of NumPy, and pairs of codes those of codes by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.numerics import codes_of, dequantize, pair
from lmeff.core.ops import lookup
from lmeff.kernels import blocks
from lmeff.kernels.blocks import blocked_product, cut
from lmeff.kernels.table import stored_for
from tests.kernels.cases import error, packed, product, shapes, tokens

SIZES = [(96, 40), (100, 250)]
slow = pytest.mark.slow
BLOCKS = [pytest.param(1 << 11, id="some rows"), *(pytest.param(n, marks=slow) for n in (64, 1 << 13, 1 << 20))]
FORMATS = ["int8", "int4/g32"]
FORMATS += [pytest.param(name, marks=slow) for name in ("int8-affine/tensor", "int4-affine/g12", "fp8/g16")]


@pytest.mark.parametrize("block_bytes", BLOCKS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("outputs_first", [False, True])
def test_blocks_equal_numpy(outputs_first, format, block_bytes, monkeypatch):
    """Blocks of one row, of a few, ragged last ones, the whole; pairs of codes too."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(blocks, "SHORT", 4)
    made = jax.jit(blocked_product, static_argnums=2)
    for inputs, outputs in SIZES:
        w, x = packed(inputs, outputs, format, outputs_first), tokens(3, inputs)
        dense = np.asarray(dequantize(w), np.float64)
        want = np.asarray(x, np.float64) @ (dense.T if outputs_first else dense)
        assert error(made(x, w, outputs_first), want) < 1e-6, (format, inputs, outputs, cut(w))
        if w.format.width == 4:
            assert error(made(x, pair(w), outputs_first), want) < 1e-6, (format, inputs, outputs)


@pytest.mark.parametrize("format", ["int4", "int4/g32", "int4-affine/g8", "int3/tensor"])
@pytest.mark.parametrize("outputs_first", [False, True])
def test_pairs_hold_the_same_codes(format, outputs_first):
    w = packed(96, 40, format, outputs_first)
    twos = stored_for("cpu", w)
    assert twos.paired
    assert twos.q.dtype == jnp.uint8
    assert twos.shape == w.shape
    assert twos.q.size * 2 == w.q.size
    np.testing.assert_array_equal(codes_of(twos), w.q.astype(jnp.int8))
    np.testing.assert_array_equal(dequantize(twos), dequantize(w))
    np.testing.assert_array_equal(lookup(twos, jnp.array([3, 1])), lookup(w, jnp.array([3, 1])))
    x = tokens(2, 96)
    made = jax.jit(blocked_product, static_argnums=2)(x, twos, outputs_first)
    assert error(made, product(x, w, outputs_first)) < 1e-6


@pytest.mark.parametrize(
    ("platform", "format", "outputs_first", "paired"),
    [
        ("cpu", "int4", True, True),
        ("cpu", "int8", True, False),
        ("cpu", "int4/g5", True, False),
        ("cpu", "int4/g5", False, True),
        ("tpu", "int4", True, False),
        ("gpu", "int4", True, False),
    ],
)
def test_what_is_stored_in_pairs(platform, format, outputs_first, paired):
    assert stored_for(platform, packed(20, 40, format, outputs_first)).paired == paired


def test_an_odd_last_dim_is_not_paired():
    assert not stored_for("cpu", packed(20, 41, "int4", False)).paired


LARGE = [((768, 2048), False), ((50304, 768), True), ((768, 50304), False), ((8192, 2048), False), ((50257, 768), True)]


@pytest.mark.parametrize(("shape", "outputs_first"), shapes(LARGE, []))
def test_blocks_of_large_matrices_stay_in_cache(shape, outputs_first):
    w = jax.eval_shape(lambda: packed(*(shape[::-1] if outputs_first else shape), "int8", outputs_first))
    found = cut(w)
    length, other = w.shape[found.dim], w.shape[1 - found.dim]
    assert found.size * found.count + found.rest == length
    assert blocks.BLOCK_BYTES / 2 <= 4 * found.size * other <= blocks.BLOCK_BYTES
