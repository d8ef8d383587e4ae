"""Products of few tokens with a packed weight on CPUs: a block of the weight is turned into numbers, multiplied and forgotten.

XLA for CPUs writes all of a weight in float32 before it multiplies: decoding, which reads every weight once a token, would then move more bytes than without
packing. Of a block that stays in cache only the codes move through the memory. Blocks cut one dim of the weight; where it is summed over, their products are
added, else they are put side by side. The numbers are those of `dequantize`, bit for bit; only the order of sums is another.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.numerics import QTensor, dequantize, halves

BLOCK_BYTES = 4 << 20  # of a block in float32
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
    length, group = w.shape[dim], math.lcm(_group(w, dim), 2 if w.paired and dim == 1 else 1)
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

    def run(x: Any, step: int) -> Any:  # of scales
        if x is None or x.shape[dim] == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, start // step, -(-size // step), dim)

    bytes_start, bytes_size = (start // 2, size // 2) if w.paired and dim == 1 else (start, size)
    q = jax.lax.dynamic_slice_in_dim(w.q, bytes_start, bytes_size, dim)
    return QTensor(q, run(w.scale, group), run(w.zero, group), w.format, w.axes, w.dtype)


def halves_of(w: QTensor) -> tuple[QTensor, QTensor]:
    """The even and the odd columns of a matrix whose codes are two a byte: no code has to move to be read."""
    group, columns = w.format.group, w.shape[1]
    along = group is not None and w.axes[-1] == -1
    assert group is None or not along or group % 2 == 0, "groups of pairs"
    format = dataclasses.replace(w.format, group=group // 2) if group is not None and along else w.format

    def own(x: Any, i: int) -> Any:
        return x if x is None or x.shape[1] != columns else x[:, i::2]

    even, odd = (
        QTensor(q, own(w.scale, i), own(w.zero, i), format, w.axes, w.dtype) for i, q in enumerate(halves(w.q))
    )
    return even, odd


def multiply(x_NI: jax.Array, w: QTensor, outputs_first: bool) -> jax.Array:
    """Tokens times a matrix turned into numbers, in one piece."""
    if w.paired:
        return _multiply_pairs(x_NI, w, outputs_first)
    values = dequantize(w).astype(jnp.float32)
    # Written so and not as an einsum: XLA then reads the codes of one token's product as it multiplies.
    return x_NI @ (values.T if outputs_first else values)


def _multiply_pairs(x_NI: jax.Array, w: QTensor, outputs_first: bool) -> jax.Array:
    even, odd = (dequantize(half).astype(jnp.float32) for half in halves_of(w))
    if outputs_first:  # as an einsum: halves of bytes are better not read as XLA multiplies
        return jnp.einsum("NI,OI->NO", x_NI[:, ::2], even) + jnp.einsum("NI,OI->NO", x_NI[:, 1::2], odd)
    return jnp.stack([x_NI @ even, x_NI @ odd], -1).reshape(x_NI.shape[0], -1)


def blocked_product(x_NI: jax.Array, w: QTensor, outputs_first: bool) -> jax.Array:
    """Tokens times a packed weight [I, O], or [O, I] with `outputs_first`: float32 [N, O]."""
    x_NI = x_NI.astype(jnp.float32)
    dim, size, count, rest = cut(w)
    summed = (dim == 1) == outputs_first

    def product(start: Any, size: int) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x_NI, start, size, 1) if summed else x_NI
        return multiply(own, part_of(w, dim, start, size), outputs_first)

    if summed:
        total = _over(count - 1, lambda total, i: (total + product((i + 1) * size, size), None), product(0, size))[0]
        return total + product(count * size, rest) if rest else total
    parts_PNO = _over(count, lambda none, i: (none, product(i * size, size)), None)[1]
    total = parts_PNO.swapaxes(0, 1).reshape(x_NI.shape[0], count * size)
    return jnp.concatenate([total, product(count * size, rest)], 1) if rest else total


def _over(count: int, step: Any, carry: Any) -> Any:
    return jax.lax.scan(step, carry, jnp.arange(count), unroll=max(1, count) if count <= UNROLLED else 1)
