"""The model's products as products of two matrices, which is what kernels know: tokens [N, I] by a packed weight [I, O] or [O, I]."""

import math
from typing import Any, NamedTuple

from lmeff.core.dims import contracted, split_einsum
from lmeff.core.numerics import QTensor, is_qtensor


class Matrices(NamedTuple):
    """A product as a matrix product.

    x:             [N, I], numbers, or codes with one scale for each token or one for all.
    w:             [I, O], or [O, I] with `outputs_first` (a tied head); with one scale for all, one for each output or one for each run of `format.group`
                   inputs of an output.
    shape:         of the result, [N, O] before.
    """

    x: Any
    w: QTensor
    outputs_first: bool
    shape: tuple[int, ...]


def outputs_first(equation: str) -> bool | None:
    """Whether the summed letters are the weight's last ones (True) or its first ones (False); None of what is no product of matrices."""
    left, right, out = split_einsum(equation)
    inner = contracted(equation)
    tokens = left.removesuffix(inner)
    for outer, last in ((right.removeprefix(inner), False), (right.removesuffix(inner), True)):
        if inner and left == tokens + inner and out == tokens + outer:
            return last
    return None


def fits(equation: str, w: QTensor) -> bool:
    """Whether the product is one of matrices whose scales are rows and columns, too: groups must not end inside a dim that is joined with another."""
    last, inner = outputs_first(equation), len(contracted(equation))
    if last is None:
        return False
    summed = tuple(range(-inner, 0)) if last else tuple(range(-w.ndim, inner - w.ndim))
    group = w.format.group
    whole = group is None or inner == 1 or w.shape[w.axes[-1]] % group == 0
    return w.format.granularity == "tensor" or (w.axes == summed and whole)


def matrices(equation: str, x: Any, w: QTensor) -> Matrices:
    """The product as matrices, where it `fits`."""
    last, inner = outputs_first(equation), len(contracted(equation))
    assert last is not None
    tokens, split = x.shape[: x.ndim - inner], w.ndim - inner if last else inner
    outer = w.shape[:split] if last else w.shape[split:]
    if is_qtensor(x):
        x = _flat(x, len(tokens), (-1,))
    else:
        x = x.reshape(math.prod(tokens), -1)
    return Matrices(x, _flat(w, split, (-1,) if last else (-2,)), last, (*tokens, *outer))


def _flat(t: QTensor, split: int, axes: tuple[int, ...]) -> QTensor:
    """Dims before and after `split` as one each; of scales too, which have the dims of codes."""

    def flat(x: Any) -> Any:
        return None if x is None else x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))

    axes = (-2, -1) if t.format.granularity == "tensor" else axes
    return QTensor(flat(t.q), flat(t.scale), flat(t.zero), t.format, axes, t.dtype)
