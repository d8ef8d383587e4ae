"""The einsum of two packed operands: integer products and sums, scales applied once at the end.

With `x = (qx - zx) sx` and `w = (qw - zw) sw`, the sum over the contracted dims of `(qx - zx)(qw - zw)` is
`sum qx qw - zx sum qw - zw sum qx + n zx zw`: four integer terms, so the result equals the fake-quantized float einsum up to
the rounding of float32 sums. Groups of the weight stay apart until their scales have been applied.

NVIDIA GPUs multiply the codes as bfloat16 numbers, which hold them exactly, and add in float32: of some shapes XLA's integer products are wrong there
(twice the right numbers where 43 codes are summed; jaxlib 0.11.2 on an H200).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.dims import contracted, split_einsum
from lmeff.core.numerics import QFormat, QTensor, codes_of

GROUP = "z"  # the position within a group; letters of tensors are capitals, so it cannot collide


class _Operand(NamedTuple):
    """Codes ready to contract, and the packed tensor they came from with its own letters."""

    codes: jax.Array
    letters: str
    tensor: QTensor
    tensor_letters: str


def are_integers(x: QFormat, w: QFormat) -> bool:
    """Whether a product of these formats can be one of integers: `packed_einsum` takes no others."""
    return not (x.is_float or w.is_float)


def packed_einsum(equation: str, x: QTensor, w: QTensor) -> jax.Array:
    """`einsum(equation, x, w)` in float32 from integer codes. `x` has one scale per token or one for all; `w` any format."""
    assert are_integers(x.format, w.format), (x.format, w.format)
    left, right, out = split_einsum(equation)
    summed = contracted(equation)
    lhs = _Operand(codes_of(x).astype(jnp.int8), left, x, left)
    rhs = _Operand(codes_of(w).astype(jnp.int8), right, w, right)
    if w.format.granularity != "group":
        count = jnp.int32(math.prod(w.shape[right.index(letter)] for letter in summed)).reshape((1,) * len(out))
        return _scaled(lhs, rhs, out, summed, count)
    assert w.format.group is not None
    letter = summed[-1]
    grouped_out = out + summed  # only the run within a group is summed in integers
    count = _group_sizes(w.shape[right.index(letter)], w.format.group).reshape((1,) * (len(grouped_out) - 1) + (-1,))
    lhs, rhs = _split(lhs, letter, w.format.group), _split(rhs, letter, w.format.group)
    return _scaled(lhs, rhs, grouped_out, GROUP, count).sum(axis=tuple(range(-len(summed), 0)))


def _scaled(x: _Operand, w: _Operand, out: str, inner: str, count: jax.Array) -> jax.Array:
    """The integer sum of `(qx - zx)(qw - zw)` over `inner`, times both scales, in the letters of `out`."""
    equation = f"{x.letters},{w.letters}->{out}"
    steps = jax.lax.platform_dependent(
        x.codes,
        w.codes,
        default=functools.partial(integer_sums, equation),
        cuda=functools.partial(floating_sums, equation),
    )
    zero_x, zero_w = _zero(x, out), _zero(w, out)
    if zero_x is not None:
        steps = steps - zero_x * _sum_out(w, inner, out)
    if zero_w is not None:
        steps = steps - zero_w * _sum_out(x, inner, out)
    if zero_x is not None and zero_w is not None:
        steps = steps + zero_x * zero_w * count
    scale_x = _align(x.tensor.scale, x.tensor_letters, out)
    scale_w = _align(w.tensor.scale, w.tensor_letters, out)
    return steps.astype(jnp.float32) * scale_x * scale_w


def integer_sums(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of two arrays of int8 codes, in int32."""
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.int32)


def floating_sums(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The same by way of floating-point numbers: exact up to 2^24, 1,024 products of the largest codes; beyond that rounded as float32 is."""
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32).astype(jnp.int32)


def _zero(operand: _Operand, out: str) -> jax.Array | None:
    zero = operand.tensor.zero
    return None if zero is None else _align(zero, operand.tensor_letters, out)


def _group_sizes(size: int, group: int) -> jax.Array:
    """How many real entries each group has; only a ragged last one has fewer than `group`."""
    starts = jnp.arange(0, size, group, dtype=jnp.int32)
    return jnp.minimum(size - starts, group)


def _split(operand: _Operand, letter: str, group: int) -> _Operand:
    """Cuts the dim `letter` into (letter, GROUP); a ragged last group is padded with code 0, which adds nothing to any sum."""
    codes, letters = operand.codes, operand.letters
    position = letters.index(letter)
    missing = -codes.shape[position] % group
    padded = jnp.pad(codes, [(0, missing if i == position else 0) for i in range(codes.ndim)])
    split = padded.reshape(*codes.shape[:position], -1, group, *codes.shape[position + 1 :])
    return operand._replace(codes=split, letters=letters.replace(letter, letter + GROUP))


def _sum_out(operand: _Operand, inner: str, out: str) -> jax.Array:
    axes = tuple(operand.letters.index(letter) for letter in inner)
    kept = "".join(letter for letter in operand.letters if letter not in inner)
    return _align(operand.codes.astype(jnp.int32).sum(axis=axes), kept, out)


def _align(value: jax.Array, letters: str, out: str) -> jax.Array:
    """Reorders `value` so that it broadcasts against `out`; a dim that is not in `out` has size 1 and goes."""
    value = jax.lax.squeeze(value, tuple(i for i, letter in enumerate(letters) if letter not in out))
    kept = [letter for letter in letters if letter in out]
    order = sorted(range(len(kept)), key=lambda i: out.index(kept[i]))
    sizes = {kept[i]: value.shape[i] for i in order}
    return jnp.transpose(value, order).reshape([sizes.get(letter, 1) for letter in out])
