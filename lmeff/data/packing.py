"""Documents into rows: cut into pieces of at most a row, packed, and laid out as a batch.

A document of n tokens (bos and eos among them) has n - 1 predictions. Pieces share the token at their border, the last target of one being the
first input of the next, so that every token but bos is predicted exactly once.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmeff.core.batch import Batch


class Pieces(NamedTuple):
    """Where each piece starts in the tokens, how many predictions it has (1 to T), and its document. All [pieces], in order of the text."""

    start: np.ndarray
    length: np.ndarray
    document: np.ndarray


class Rows(NamedTuple):
    """Pieces by row: row i holds `order[bounds[i]:bounds[i + 1]]`."""

    pieces: Pieces
    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:  # type: ignore[override]
        """The number of rows."""
        return len(self.bounds) - 1


def cut(starts: np.ndarray, sequence: int) -> Pieces:
    """Cuts documents, given by their offsets [documents + 1], into pieces of at most `sequence` predictions."""
    predictions = np.diff(starts) - 1
    counts = -(-predictions // sequence)
    document = np.repeat(np.arange(len(predictions)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    length = np.minimum(sequence, predictions[document] - index * sequence)
    return Pieces(starts[document] + index * sequence, length, document)


def pack_dense(pieces: Pieces, sequence: int) -> Rows:
    """Little waste, any order: best fit, longest first. The same pieces always make the same rows."""
    full = np.flatnonzero(pieces.length == sequence)
    rest = np.flatnonzero(pieces.length < sequence)
    rest = rest[np.argsort(-pieces.length[rest], kind="stable")]
    bins = _best_fit(pieces.length[rest].tolist(), sequence)
    order = np.concatenate([full, rest[np.fromiter(itertools.chain.from_iterable(bins), np.int64)]])
    return Rows(pieces, order, _bounds([np.ones(len(full), np.int64), [len(bin) for bin in bins]]))


def _best_fit(lengths: list[int], sequence: int) -> list[list[int]]:
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(sequence + 1)]
    open_rooms = 0  # bit r is set where a bin has room for exactly r more
    for i, length in enumerate(lengths):
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            at = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
        else:
            room, at = sequence, len(bins)
            bins.append([])
        bins[at].append(i)
        left = room - length
        if left:
            by_room[left].append(at)
            open_rooms |= 1 << left
    return bins


def pack_ordered(pieces: Pieces, sequence: int) -> Rows:
    """In the order of the text: a row takes pieces until the next one does not fit."""
    counts: list[int] = []
    room = 0
    for length in pieces.length.tolist():
        if length > room:
            counts.append(0)
            room = sequence
        counts[-1] += 1
        room -= length
    return Rows(pieces, np.arange(len(pieces.length)), _bounds([counts]))


def _bounds(counts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)


def empty(rows: int, sequence: int, pad: int) -> tuple[Batch, np.ndarray]:
    """A batch of padding, and the document of each target: -1 where there is none."""
    whole = (rows, sequence)
    ids = np.full(whole, pad, np.int32)
    segments, positions = np.zeros(whole, np.int32), np.zeros(whole, np.int32)
    return Batch(ids, ids.copy(), segments, positions, np.zeros(whole, np.float32)), np.full(whole, -1, np.int64)


def lay(tokens: np.ndarray, rows: Rows, row: int, batch: Batch, document_BT: np.ndarray, at: int) -> None:
    """Writes row `row` of `rows` into row `at` of a batch of padding."""
    left = 0
    for segment, piece in enumerate(rows.order[rows.bounds[row] : rows.bounds[row + 1]], 1):
        start, length = int(rows.pieces.start[piece]), int(rows.pieces.length[piece])
        here = slice(left, left + length)
        batch.tokens[at, here] = tokens[start : start + length]
        batch.targets[at, here] = tokens[start + 1 : start + length + 1]
        batch.segments[at, here] = segment
        batch.positions[at, here] = np.arange(length)
        batch.weights[at, here] = 1
        document_BT[at, here] = rows.pieces.document[piece]
        left += length
