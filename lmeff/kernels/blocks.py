"""Products of few tokens with a packed weight on CPUs: a block of the weight is turned into numbers, multiplied and forgotten.

XLA for CPUs writes all of a weight in float32 before it multiplies: decoding, which reads every weight once a token, would then move more bytes than without
packing. Of a block that stays in cache only the codes move through the memory. Blocks cut one dim of the weight; where it is summed over their products are added,
else they are put side by side. The numbers are those of `dequantize`, bit for bit; only the order of sums is another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.numerics import QTensor, dequantize

BLOCK_BYTES = 3 << 20  # of a block in float32
SHORT = 64  # rows of a block: with fewer, loops cost more than reading columns, which are not contiguous
UNROLLED = 4  # so few blocks are written out: a loop would first copy the layer's codes out of the stack


class Cut(NamedTuple):
    """Blocks of a matrix: `count` runs of `size` along `dim`, and a shorter one with the rest."""

    dim: int
    size: int
    count: int
    rest: int


def cut(w: QTensor) -> Cut:
    """Blocks of rows, or of columns where rows are long; in whole groups, and as even as can be."""
    rows = _along(w, 0)
    return rows if rows.size >= min(SHORT, w.shape[0]) else _along(w, 1)


def _along(w: QTensor, dim: int) -> Cut:
    length, group = w.shape[dim], _group(w, dim)
    fit = max(1, BLOCK_BYTES // (4 * w.shape[1 - dim]))
    even = -(-length // -(-length // fit))
    size = min(length, -(-even // group) * group)
    return Cut(dim, size, *divmod(length, size))


def _group(w: QTensor, dim: int) -> int:
    """How many numbers along a dim have a scale together; 1 where groups, if any, run along the other."""
    return w.format.group if w.format.group is not None and w.axes[-1] == dim - 2 else 1


def part_of(w: QTensor, dim: int, start: Any, size: int) -> QTensor:
    """A run of a packed matrix along a dim; it starts with a group, and ends with one or with the dim."""
    group = _group(w, dim)

    def run(x: Any, step: int) -> Any:
        shared = x is None or x.shape[dim] == 1
        return x if shared else jax.lax.dynamic_slice_in_dim(x, start // step, -(-size // step), dim)

    return QTensor(run(w.q, 1), run(w.scale, group), run(w.zero, group), w.format, w.axes, w.dtype)


def blocked_product(x_NI: jax.Array, w: QTensor, outputs_first: bool) -> jax.Array:
    """Tokens times a packed weight [I, O], or [O, I] with `outputs_first`: float32 [N, O]."""
    x_NI = x_NI.astype(jnp.float32)
    dim, size, count, rest = cut(w)
    summed = (dim == 1) == outputs_first

    def product(start: Any, size: int) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x_NI, start, size, 1) if summed else x_NI
        values = dequantize(part_of(w, dim, start, size)).astype(jnp.float32)
        # Written so and not as an einsum: XLA then reads the codes of one token's product as it multiplies.
        return own @ (values.T if outputs_first else values)

    if summed:
        total = _over(count - 1, lambda total, i: (total + product((i + 1) * size, size), None), product(0, size))[0]
        return total + product(count * size, rest) if rest else total
    parts_PNO = _over(count, lambda none, i: (none, product(i * size, size)), None)[1]
    total = parts_PNO.swapaxes(0, 1).reshape(x_NI.shape[0], count * size)
    return jnp.concatenate([total, product(count * size, rest)], 1) if rest else total


def _over(count: int, step: Any, carry: Any) -> Any:
    return jax.lax.scan(step, carry, jnp.arange(count), unroll=max(1, count) if count <= UNROLLED else 1)
