"""The model's products as products of two matrices, which is what kernels know: tokens [N, I] by a packed weight [I, O] or [O, I]."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lmeff.core.dims import contracted, split_einsum
from lmeff.core.numerics import QTensor


class Matrices(NamedTuple):
    """A product as a matrix product.

    w:             packed, two dims, with one scale for all, one for each output or one for each run of `format.group` inputs of an output.
    outputs_first: whether w is [O, I] (a tied head) and not [I, O].
    shape:         of the result, [N, O] before.
    """

    x_NI: jax.Array
    w: QTensor
    outputs_first: bool
    shape: tuple[int, ...]


def outputs_first(equation: str) -> bool | None:
    """Whether the summed letters are the weight's last ones; None where they are neither these nor the first, or letters change their order."""
    left, right, out = split_einsum(equation)
    inner = contracted(equation)
    tokens, outer = left.removesuffix(inner), right.removeprefix(inner)
    if inner and left == tokens + inner and right == inner + outer and out == tokens + outer:
        return False
    outer = right.removesuffix(inner)
    return True if inner and left == tokens + inner and right == outer + inner and out == tokens + outer else None


def matrices(equation: str, x: jax.Array, w: QTensor) -> Matrices | None:
    """The product as matrices; None where it is none, or where groups end inside a row of what becomes one dim."""
    turned = outputs_first(equation)
    inner = len(contracted(equation))
    if turned is None or (w.format.granularity != "tensor" and w.axes != _summed_axes(w.ndim, inner, turned)):
        return None
    group = w.format.group
    if group is not None and inner > 1 and w.shape[w.axes[-1]] % group:
        return None
    split = w.ndim - inner if turned else inner

    def flat(t: Any) -> Any:
        return None if t is None else t.reshape(math.prod(t.shape[:split]), math.prod(t.shape[split:]))

    axes = (-2, -1) if w.format.granularity == "tensor" else (-1,) if turned else (-2,)
    packed = QTensor(flat(w.q), flat(w.scale), flat(w.zero), w.format, axes, w.dtype)
    tokens = x.shape[: x.ndim - inner]
    outer = w.shape[:split] if turned else w.shape[split:]
    return Matrices(x.reshape(math.prod(tokens), -1), packed, turned, (*tokens, *outer))


def _summed_axes(ndim: int, inner: int, turned: bool) -> tuple[int, ...]:
    axes: Sequence[int] = range(-inner, 0) if turned else range(-ndim, inner - ndim)
    return tuple(axes)
