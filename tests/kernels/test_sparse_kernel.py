"""N:M sparse weights, compressed and multiplied, against NumPy; what cannot be compressed; and the bytes that blocks move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import ConfigError, DataError
from lmeff.kernels.sparse import Sparse, compress, expand, place_bits, sparse_call, sparse_product
from lmeff.kernels.traffic import Call, bits_of, bytes_moved
from tests.kernels.cases import error, shapes, tokens

FAST = [((3, 43, 70), 2, 4), ((2, 2600, 130), 2, 4)]
SLOW = [
    ((1, 128, 128), 2, 4),
    ((1, 3, 5), 2, 4),
    ((8, 4096, 512), 2, 4),
    ((2, 2600, 1100), 1, 4),
    ((4, 100, 64), 2, 8),
    ((2, 5000, 300), 2, 8),
    ((2, 16, 8), 4, 4),
    ((1, 300, 600), 1, 2),
]


def pruned(inputs, outputs, n, m):
    """A weight whose runs of m inputs keep their n largest."""
    w = np.random.default_rng(0).normal(size=(inputs + -inputs % m, outputs)).astype(np.float32)
    w[inputs:] = 0
    runs = w.reshape(-1, m, outputs)
    rank = np.argsort(np.argsort(-np.abs(runs), axis=1), axis=1)
    return np.where(rank < n, runs, 0).reshape(-1, outputs)[:inputs]


@pytest.mark.parametrize(("shape", "n", "m"), shapes(FAST, SLOW))
def test_products_equal_numpy(shape, n, m):
    rows, inputs, outputs = shape
    w, x = pruned(inputs, outputs, n, m), tokens(rows, inputs)
    packed = compress(w, n, m)
    np.testing.assert_array_equal(expand(packed), w)
    want = np.asarray(x, np.float64) @ w.astype(np.float64)
    assert error(sparse_product(x, packed, interpret=True), want) < 1e-6


def test_runs_with_fewer_than_n_and_none():
    w = pruned(64, 24, 1, 4)
    w[:8] = 0
    np.testing.assert_array_equal(expand(compress(w, 2, 4)), w)


def test_values_may_be_codes():
    w = np.round(pruned(64, 24, 2, 4) * 30).astype(np.int8)
    x, packed = tokens(2, 64), compress(w, 2, 4)
    assert packed.values.dtype == jnp.int8
    want = np.asarray(x, np.float64) @ w.astype(np.float64)
    assert error(sparse_product(x, packed, interpret=True), want) < 1e-6


@pytest.mark.parametrize(
    ("n", "m", "dtype", "share"),
    [(2, 4, jnp.bfloat16, 9 / 16), (2, 4, jnp.int8, 5 / 8), (2, 8, jnp.bfloat16, 5 / 16), (1, 4, jnp.float32, 9 / 32)],
)
def test_bytes_moved_are_the_compressed_ones(n, m, dtype, share):
    runs, outputs = 4096 // m, 4096
    places = jax.ShapeDtypeStruct((runs, outputs), jnp.int4 if n * place_bits(n, m) <= 4 else jnp.int8)
    values = jax.ShapeDtypeStruct((n, runs, outputs), dtype)
    call = sparse_call(4, Sparse(values=values, places=places, n=n, m=m, inputs=4096), jnp.bfloat16)
    dense = 4096 * 4096 * bits_of(dtype) / 8
    assert bytes_moved(Call(call.grid, call.operands[1:-1])) == share * dense
    assert bytes_moved(call) == pytest.approx(share * dense, rel=0.05)


def test_what_is_not_sparse_is_refused():
    with pytest.raises(DataError, match="got 4 of 4 inputs that are not zero, expected at most 2"):
        compress(np.ones((8, 3)), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(4, 8), (0, 4), (5, 4)])
def test_runs_whose_places_do_not_fit_are_refused(n, m):
    with pytest.raises(ConfigError, match=f"got {n}:{m}"):
        compress(np.zeros((8, 3)), n, m)
