"""The arguments of a compiled program, read off its text: what each is called in Python, and the bytes that it takes where it is stored."""

import math
import re
from typing import NamedTuple

from lmeff.parallel.collective import bits
from lmeff.parallel.hlo import computations

_PARAMETER = re.compile(
    r"= (\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})? parameter\(\d+\)(?:.*op_name=\"([^\"]*)\")?"
)


class Argument(NamedTuple):
    """An argument as one device has it.

    name:  its path, such as "state.trainable.params['embed']['table']"; "" where XLA does not tell.
    bytes: as stored, a TPU's tiles filled up. host: whether it lies in the host's memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    host: bool


def arguments_of(text: str) -> list[Argument]:
    """All arguments of a program, from `compiled.as_text()`."""
    found = (_PARAMETER.search(line) for line in computations(text)["ENTRY"])
    return [_argument(*match.groups()) for match in found if match]


def _argument(dtype: str, dims: str, order: str | None, attributes: str | None, name: str | None) -> Argument:
    """`f32[4,64,256]{2,1,0:T(8,128)S(5)}` is stored in tiles of 8 x 128 of its last two dims by `order`, in memory space 5: the host's."""
    shape, attributes = _numbers(dims), attributes or ""
    tile = re.search(r"T\(([\d,]+)\)", attributes)
    stored = [shape[i] for i in reversed(_numbers(order or ""))] if tile else list(shape)  # outermost first
    if tile:
        sides = _numbers(tile[1])
        stored = [1] * (len(sides) - len(stored)) + stored  # a scalar fills a tile
        first = len(stored) - len(sides)
        stored[first:] = [-(-size // side) * side for size, side in zip(stored[first:], sides, strict=True)]
    size = -(-math.prod(stored) * bits(dtype) // 8)
    return Argument((name or "").replace("\\'", "'"), dtype, shape, size, "S(5)" in attributes)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
