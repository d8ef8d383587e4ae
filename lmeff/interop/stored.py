"""Where a parameter lies in somebody else's checkpoint: one description, read in both directions.

`Stored("layers.{L}.self_attn.q_proj.weight", "HC D")` says that every layer has a tensor of that name whose first dim holds heads times head width and whose
second is the model width. With the leaf's own letters ("LDHC") that is all there is to know: the stored shape, which part of a file a shard needs, the
transpose, and the way back. A "+" joins matrices that are stored as one ("HC+KC+KC D"); `part` says which of them the leaf is.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lmeff.interop.tensors import Tensors

Index = tuple[slice, ...]


class Stored(NamedTuple):
    """A leaf in files.

    name: of the tensor; "{L}" and "{E}" stand for layer and expert where every one has a tensor of its own, "{body}" and "{head}" for prefixes.
    dims: the stored dims, apart by spaces: letters that are flattened into one, outermost first; parts of a fused dim joined by "+".
    part: which part of the fused dim.
    """

    name: str
    dims: str
    part: int = 0

    def stacks(self, letters: str) -> str:
        """Those of the leaf's letters that the name counts: its leading dims."""
        return "".join(letter for letter in letters if f"{{{letter}}}" in self.name)

    def own(self) -> list[str]:
        """The letters of each stored dim, of this part alone."""
        return [parts[self.part if len(parts) > 1 else 0] for parts in _parts(self.dims)]


class Piece(NamedTuple):
    """What a leaf gives to one stored tensor: the leaf at `at` (an index for each stack)."""

    path: str
    letters: str
    at: tuple[int, ...]
    stored: Stored


def _parts(dims: str) -> list[list[str]]:
    return [dim.split("+") for dim in dims.split(" ")]


def _size(letters: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[letter] for letter in letters)


def stored_shape(stored: Stored, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a stored tensor, with all parts of a fused dim."""
    return tuple(sum(_size(part, sizes) for part in parts) for parts in _parts(stored.dims))


def names(stored: Stored, letters: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that hold a leaf, with the place of each in its stacks."""
    stacks = stored.stacks(letters)
    for at in itertools.product(*(range(sizes[letter]) for letter in stacks)):
        yield named(stored, letters, at), at


def named(stored: Stored, letters: str, at: tuple[int, ...]) -> str:
    """The tensor at a place of the leaf's stacks."""
    return stored.name.format(**dict(zip(stored.stacks(letters), at, strict=True)))


def pieces(leaves: Mapping[str, tuple[str, Stored]], sizes: Mapping[str, int]) -> dict[str, list[Piece]]:
    """Every stored tensor with what makes it up, parts in order, from the letters and the place of each leaf."""
    table: dict[str, list[Piece]] = {}
    for path, (letters, stored) in leaves.items():
        for name, at in names(stored, letters, sizes):
            table.setdefault(name, []).append(Piece(path, letters, at, stored))
    return {name: sorted(found, key=lambda piece: piece.stored.part) for name, found in table.items()}


def outermost(stored: Stored, letters: str) -> int:
    """The dim of one of the leaf's tensors (behind its stacks) that is outermost in the file."""
    return letters.removeprefix(stored.stacks(letters)).index(stored.own()[0][0])


def read_part(
    tensors: Tensors, stored: Stored, letters: str, sizes: Mapping[str, int], name: str, index: Index
) -> np.ndarray:
    """The values at `index` (a slice for each letter behind the stacks) of one of a leaf's tensors, in the stored dtype; only the rows they lie in are read."""
    own = letters.removeprefix(stored.stacks(letters))
    cuts = dict(zip(own, index, strict=True))
    rows = {letter: range(*cut.indices(sizes[letter])) for letter, cut in cuts.items()}
    groups = stored.own()
    block = tensors.read(name, tuple(_rows(stored, i, rows, sizes) for i in range(len(groups))))
    # The outermost letter of a group is cut in the file, those inside it here.
    flat = [(letter, i == 0) for group in groups for i, letter in enumerate(group)]
    block = block.reshape([len(rows[letter]) if outer else sizes[letter] for letter, outer in flat])
    block = block[tuple(slice(None) if outer else cuts[letter] for letter, outer in flat)]
    order = [letter for letter, _ in flat]
    return block.transpose([order.index(letter) for letter in own])


def _rows(stored: Stored, dim: int, wanted: Mapping[str, range], sizes: Mapping[str, int]) -> slice:
    """Where in a stored dim the part begins and ends, as far as its outermost letter is cut."""
    parts, group = _parts(stored.dims)[dim], stored.own()[dim]
    before = sum(_size(part, sizes) for part in parts[: stored.part]) if len(parts) > 1 else 0
    inner, rows = _size(group[1:], sizes), wanted[group[0]]
    return slice(before + rows.start * inner, before + rows.stop * inner)


def stored_value(
    found: list[Piece], fetch: Callable[[str, tuple[int, ...]], np.ndarray], sizes: Mapping[str, int]
) -> np.ndarray:
    """The stored tensor that these pieces make up, each fetched by the path of its leaf and its place there: the inverse of `read_part`."""
    values = [_stored_part(piece, fetch(piece.path, piece.at), sizes) for piece in found]
    fused = [i for i, parts in enumerate(_parts(found[0].stored.dims)) if len(parts) > 1]
    return np.concatenate(values, axis=fused[0]) if fused else values[0]


def _stored_part(piece: Piece, value: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    letters, groups = piece.letters[len(piece.at) :], piece.stored.own()
    value = value.transpose([letters.index(letter) for group in groups for letter in group])
    return value.reshape([_size(group, sizes) for group in groups])
