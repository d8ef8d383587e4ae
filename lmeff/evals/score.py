"""Scoring rows of tokens: the nats of each target, and whether the model would have chosen it.

One jitted program for each length of rows, and lengths come from a short ladder; rows of like length run together. The head and the losses run in chunks of
tokens, so logits of all tokens never exist at once; packed weights, formats of activations and every mesh work as in training's own evaluation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.errors import DataError
from lmeff.core.ops import Ranges
from lmeff.distill.chunked import cross_entropy_rows, top_token
from lmeff.distill.objectives import Projection, by_token
from lmeff.infer.served import Served
from lmeff.parallel.mesh import Layout
from lmeff.parallel.rows import place_batch
from lmeff.train.runtime import Model

LONGEST = 2048  # tokens of a row where neither the model nor the caller sets a limit
SHORTEST = 16  # the ladder's first length


class Row(NamedTuple):
    """Ids of one document, [n]; the last `scored` of them are targets, so 1 <= scored < n."""

    ids: np.ndarray
    scored: int


class Scores(NamedTuple):
    """Of the targets of a row, in order: nats (float64), and whether each has the largest logit."""

    nats: np.ndarray
    greedy: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model that scores rows. rows: of a batch. longest: tokens that a row may have as inputs, one less than its ids."""

    served: Served
    step: Callable[[Any, Ranges | None, Batch], tuple[jax.Array, jax.Array]]
    rows: int
    longest: int

    def __call__(self, rows: Sequence[Row]) -> list[Scores]:
        """Scores in the order of `rows`. Raises `DataError` for a row that is too long or has no input."""
        for i, row in enumerate(rows):
            if not 0 < row.scored < len(row.ids) <= self.longest + 1:
                raise DataError(
                    f"row {i} to score: got {len(row.ids)} ids of which {row.scored} are targets, expected at least one target and one id before it, "
                    f"and at most {self.longest + 1} ids; cut it into windows"
                )
        # All are on their way before the first is waited for: what comes back is a few bytes a token.
        found = [(part, self._run([rows[i] for i in part])) for part in _batches(rows, self.rows, self.served.layout)]
        scores: dict[int, Scores] = {}
        for part, result in found:
            nats_BT, greedy_BT = (np.asarray(x) for x in result)
            for place, i in enumerate(part):
                last = len(rows[i].ids) - 1
                at = (place, slice(last - rows[i].scored, last))
                scores[i] = Scores(nats_BT[at].astype(np.float64), greedy_BT[at])
        return [scores[i] for i in range(len(rows))]

    def _run(self, rows: Sequence[Row]) -> tuple[jax.Array, jax.Array]:
        layout = self.served.layout
        length = rung(max(len(row.ids) for row in rows) - 1, layout)
        batch = place_batch(make_batch(rows, self.rows, length), layout)
        return self.step(self.served.params, self.served.ranges, batch)


def make_scorer(served: Served, *, rows: int = 16, longest: int | None = None) -> Scorer:
    """A scorer with one jitted step; `rows` is rounded up to what the mesh can cut.

    longest: None is the model's own context, or `LONGEST` where it has none; more than the model's context raises `DataError`.
    """
    context = served.cfg.context
    if longest is not None and (longest < 1 or (context is not None and longest > context)):
        limit = "any number from 1" if context is None else f"1 to {context}, the model's context"
        raise DataError(f"longest row to score: got {longest} tokens, expected {limit}")
    cut = served.layout.size(served.layout.axes("B"))
    return Scorer(
        served=served, step=make_score_step(served), rows=-(-rows // cut) * cut, longest=longest or context or LONGEST
    )


def make_score_step(served: Served) -> Callable[[Any, Ranges | None, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted `(params, ranges, placed batch) -> (nats [B, T], greedy [B, T])` in the order of the rows, zero and False where a target has no weight."""
    model, layout, policy = Model(served.cfg, served.numerics), served.layout, served.policy
    measured = by_token(Projection(served.cfg, served.numerics), _nats_and_choice)

    def step(params: Any, ranges: Ranges | None, batch: Batch) -> tuple[jax.Array, jax.Array]:
        found = measured(layout, model.run(layout, params, (), batch, ranges, policy, "none"), batch)
        nats_BT, greedy_BT = jax.tree.map(layout.in_row_order, found)
        return nats_BT, greedy_BT

    return jax.jit(step, out_shardings=layout.replicated)


def _nats_and_choice(logits_NV: jax.Array, targets_N: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    return cross_entropy_rows(logits_NV, targets_N, axes), top_token(logits_NV, axes) == targets_N


def rung(tokens: int, layout: Layout) -> int:
    """The length of the rows of a program that takes so many tokens: a power of two or one and a half times one, in a multiple that the mesh can cut."""
    size = SHORTEST
    while size < tokens:
        size *= 2
    if size > SHORTEST and size * 3 // 4 >= tokens:
        size = size * 3 // 4
    multiple = 2 * layout.mesh.shape["context"]  # rings hold pairs of chunks
    return -(-size // multiple) * multiple


def make_batch(rows: Sequence[Row], count: int, length: int) -> Batch:
    """A host batch [count, length] with a document a row, padded with empty rows and tokens."""
    tokens, targets, segments = (np.zeros((count, length), np.int32) for _ in range(3))
    weights = np.zeros((count, length), np.float32)
    for b, (ids, scored) in enumerate(rows):
        n = len(ids) - 1
        tokens[b, :n], targets[b, :n], segments[b, :n] = ids[:-1], ids[1:], 1
        weights[b, n - scored : n] = 1
    positions = np.arange(length, dtype=np.int32) * segments
    return Batch(tokens, targets, segments, positions, weights)


def _batches(rows: Sequence[Row], count: int, layout: Layout) -> Iterable[list[int]]:
    """Indices of rows of one rung, so many at a time; the longest first, so that what does not fit fails at once."""
    rungs: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        rungs.setdefault(rung(len(row.ids) - 1, layout), []).append(i)
    for length in sorted(rungs, reverse=True):
        held = rungs[length]
        yield from (held[start : start + count] for start in range(0, len(held), count))
