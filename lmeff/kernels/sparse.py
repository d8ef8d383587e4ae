"""Products with N:M sparse weights (Mishra et al. 2021, https://arxiv.org/abs/2104.08378) as a Pallas kernel for TPUs, which reads them compressed.

Of each run of m inputs of an output at most n are not zero. Kept are these n values and a byte, or half of one, that says where in the run they stand. The
cores put them back in place: all first inputs of runs are one matrix, all second ones another, and each is multiplied with its own part of the tokens. So
no number moves within a vector. TPUs have no sparse units: what is saved is memory traffic, which is what products of few tokens take their time for.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from lmeff.core.errors import ConfigError, DataError
from lmeff.kernels.traffic import LANES, Blocks, Call, block_size, run

MOST_RUNS, MOST_OUTPUTS = 512, 512  # of a block


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "places"), meta_fields=("n", "m", "inputs"))
@dataclass(frozen=True, kw_only=True)
class Sparse:
    """A weight [I, O] of which at most n of each m inputs of an output are kept. Also a spec.

    values: [n, ceil(I / m), O]; zeros where a run has fewer.
    places: [ceil(I / m), O], int4 or int8: `sum_i place_i << (bits * i)`, where in the run value i stands; bits as m needs.
    """

    values: Any
    places: Any
    n: int
    m: int
    inputs: int


def place_bits(n: int, m: int) -> int:
    """Bits of one place. Raises `ConfigError` for runs whose places do not fit in a byte."""
    bits = (m - 1).bit_length()
    if not 1 <= n <= m or n * bits > 8:
        raise ConfigError(
            f"sparse kernel: got {n}:{m}, expected n of m with n places in one byte, such as 2:4, 1:4, 2:8 or 4:4"
        )
    return bits


def compress(w: Any, n: int, m: int) -> Sparse:
    """A weight [I, O] as values and places, on the host. Raises `DataError` where more than n of a run are not zero."""
    bits, w = place_bits(n, m), np.asarray(w)
    inputs, outputs = w.shape
    w_RMO = np.pad(w, [(0, -inputs % m), (0, 0)]).reshape(-1, m, outputs)
    count = int((w_RMO != 0).sum(1).max(initial=0))
    if count > n:
        raise DataError(
            f"sparse weight: got {count} of {m} inputs that are not zero, expected at most {n}; prune it to {n}:{m} first"
        )
    order_RnO = np.argsort(w_RMO == 0, axis=1, kind="stable")[:, :n]
    values = np.take_along_axis(w_RMO, order_RnO, axis=1).swapaxes(0, 1)
    places = sum(order_RnO[:, i] << (bits * i) for i in range(n))
    dtype = jnp.int4 if n * bits <= 4 else jnp.int8
    places = np.asarray(places).astype(np.uint8).view(np.int8)
    places = places if dtype == jnp.int8 else ((places << 4) >> 4)
    return Sparse(values=jnp.asarray(values), places=jnp.asarray(places, dtype), n=n, m=m, inputs=inputs)


def expand(w: Sparse) -> np.ndarray:
    """The weight [I, O] again, on the host: what the kernel is checked against."""
    bits, values = place_bits(w.n, w.m), np.asarray(w.values)
    places_RO = np.asarray(w.places).astype(np.int32)
    w_RMO = np.zeros((places_RO.shape[0], w.m, places_RO.shape[1]), values.dtype)
    for i in range(w.n):
        place_R1O = ((places_RO >> (bits * i)) & (2**bits - 1))[:, None]
        np.put_along_axis(w_RMO, place_R1O, np.take_along_axis(w_RMO, place_R1O, 1) + values[i][:, None], 1)
    return w_RMO.reshape(-1, w_RMO.shape[2])[: w.inputs]


def sparse_call(tokens: int, w: Sparse, x_dtype: Any) -> Call:
    """Grid and operands: tokens by their place in a run, values, places, result."""
    n, runs, outputs = w.values.shape
    size_r, size_o = block_size(runs, LANES, MOST_RUNS), block_size(outputs, LANES, MOST_OUTPUTS)
    grid = (-(-outputs // size_o), -(-runs // size_r))
    whole = (w.m, tokens, grid[1] * size_r)  # read once, and not once for each block of outputs
    x = Blocks(whole, x_dtype, whole, lambda o, r: (0, 0, 0))
    values = Blocks(w.values.shape, w.values.dtype, (n, size_r, size_o), lambda o, r: (0, r, o))
    places = Blocks(w.places.shape, w.places.dtype, (size_r, size_o), lambda o, r: (r, o))
    return Call(
        grid, (x, values, places, Blocks((tokens, outputs), jnp.float32, (tokens, size_o), lambda o, r: (0, o)))
    )


def sparse_product(x_NI: jax.Array, w: Sparse, *, interpret: bool = False) -> jax.Array:
    """Tokens times an N:M sparse weight, float32 [N, O]; values may be floats, or integer codes that are exact in the dtype of `x`."""
    call = sparse_call(x_NI.shape[0], w, x_NI.dtype)
    runs = call.operands[0].shape[2]
    x_NI = jnp.pad(x_NI, [(0, 0), (0, runs * w.m - x_NI.shape[1])])
    x_MNR = jnp.moveaxis(x_NI.reshape(-1, runs, w.m), 2, 0)
    kernel = functools.partial(_kernel, n=w.n, m=w.m, runs=w.values.shape[1])
    return run(kernel, call, jnp.float32, (x_MNR, w.values, w.places), interpret)


def _kernel(
    x_ref: Any, values_ref: Any, places_ref: Any, out_ref: Any, acc_ref: Any, *, n: int, m: int, runs: int
) -> None:
    step, size, bits = pl.program_id(1), places_ref.shape[0], place_bits(n, m)

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    places_RO = places_ref[...].astype(jnp.int32)
    where = [(places_RO >> (bits * i)) & (2**bits - 1) for i in range(n)]
    if runs % size:  # what lies beyond the end may be anything: no place of a run is -1
        row = step * size + jax.lax.broadcasted_iota(jnp.int32, places_RO.shape, 0)
        where = [jnp.where(row < runs, place_RO, -1) for place_RO in where]
    values = [values_ref[i].astype(jnp.float32) for i in range(n)]
    exact = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    total = acc_ref[...]
    for place in range(m):
        found = (jnp.where(at_RO == place, value_RO, 0.0) for at_RO, value_RO in zip(where, values, strict=True))
        dense_RO = functools.reduce(jnp.add, found)
        if x_ref.shape[2] == size:
            x_NR = x_ref[place]
        else:
            x_NR = x_ref[place, :, pl.ds(pl.multiple_of(step * size, LANES), size)]
        total += jnp.dot(x_NR, dense_RO.astype(x_NR.dtype), precision=exact, preferred_element_type=jnp.float32)
    acc_ref[...] = total

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[...] = acc_ref[...]
