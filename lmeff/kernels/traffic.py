"""What a Pallas kernel's operands move between a TPU's memory and its cores, told by the blocks that the call itself is made of.

A block stays where it is as long as the grid's next step wants the same one, so its bytes count whenever the index changes from one step to the next. The last
block of a dim counts with what it holds.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128  # of a vector register of 32-bit numbers: the last two dims of a tile


class Blocks(NamedTuple):
    """An operand, cut into blocks. index: `(*grid, *scalars) -> index of the block`, what a `BlockSpec` has as its index map."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int, ...]
    index: Callable[..., tuple[Any, ...]]

    @property
    def spec(self) -> pl.BlockSpec:
        """The same for `pallas_call`."""
        return pl.BlockSpec(self.block, self.index)


class Call(NamedTuple):
    """A kernel's grid, innermost dim last, and its operands; the last one is its result."""

    grid: tuple[int, ...]
    operands: tuple[Blocks, ...]


def run(kernel: Callable[..., None], call: Call, sums: Any, given: Sequence[Any], interpret: bool) -> jax.Array:
    """A matrix product's kernel on its operands: the grid is (outputs, steps of the sum), and a block of results is summed up in the core in dtype `sums`."""
    *inputs, out = call.operands
    return pl.pallas_call(
        kernel,
        grid=call.grid,
        in_specs=[operand.spec for operand in inputs],
        out_specs=out.spec,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        scratch_shapes=[pltpu.VMEM(out.block, sums)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(*given)


def bytes_moved(call: Call, scalars: Sequence[Any] = ()) -> int:
    """Bytes read and written by one call. scalars: what index maps are given besides the grid."""
    return sum(_moved(call.grid, operand, scalars) for operand in call.operands)


def _moved(grid: tuple[int, ...], operand: Blocks, scalars: Sequence[Any]) -> int:
    bits, moved, last = bits_of(operand.dtype), 0, None
    for step in itertools.product(*map(range, grid)):
        index = tuple(int(i) for i in operand.index(*step, *scalars))
        if index != last:
            held = (min(b, n - i * b) for b, n, i in zip(operand.block, operand.shape, index, strict=True))
            moved += math.prod(held) * bits
        last = index
    return moved // 8


def bits_of(dtype: Any) -> int:
    """Bits of a number, 4 of an int4."""
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def block_size(length: int, multiple: int, most: int) -> int:
    """The size of blocks of a dim: all of it if that is at most `most`, else a multiple of `multiple` with the least left over, and of these the largest."""
    if length <= most:
        return length
    sizes = range(multiple, most + 1, multiple)
    return min(reversed(sizes[len(sizes) // 2 :] or sizes), key=lambda size: -length % size)
