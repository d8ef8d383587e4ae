"""Perplexity of held-out text, document by document, by windows that overlap.

A document that is longer than the window is scored in several: the first scores all of its tokens, every later one ends `stride` targets further and scores
those alone. So each token is scored exactly once, and behind the first window it sees at least window - stride + 1 tokens of its document. With stride =
window nothing overlaps and the first token of a window sees one; a smaller stride costs window / stride times the work and gives a lower, truer loss.
The harness cuts its rolling windows alike (https://github.com/EleutherAI/lm-evaluation-harness, `get_rolling_token_windows`).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.errors import ConfigError, DataError
from lmeff.data.tokenizer import Tokenizer
from lmeff.evals.score import Row, Scorer
from lmeff.report.statistics import bootstrap_mean, paired_difference


class Window(NamedTuple):
    """ids[first:last] make a row whose last `scored` ids are its targets."""

    first: int
    last: int
    scored: int


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What a model makes of held-out text. A unit is what the interval resamples.

    unit:   "document", or "window" where there is but one document; windows of one document are alike, so that interval is too narrow.
    nats, tokens: sums over each unit. bytes: of all text in UTF-8. passed_over: documents without a token.
    window, stride: in tokens. ends: whether the end of each document was scored, too.
    """

    unit: str
    nats: np.ndarray
    tokens: np.ndarray
    bytes: int
    documents: int
    passed_over: int
    window: int
    stride: int
    ends: bool

    @property
    def nats_per_token(self) -> float:
        """Total nats over total tokens."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Total nats in bits over the text's bytes: the same for every tokenizer."""
        return float(self.nats.sum() / math.log(2) / self.bytes)

    def summary(self, *, samples: int = 2000) -> dict[str, Any]:
        """The numbers as a JSON-able object, with the interval of `report.statistics.bootstrap_mean`; null where one unit has none."""
        mean, low, high = bootstrap_mean(self.nats, self.tokens, samples=samples)
        known = not math.isnan(low)
        return {
            "nats_per_token": mean,
            "nats_per_token_interval": [low, high] if known else None,
            "perplexity": math.exp(mean),
            "perplexity_interval": [math.exp(low), math.exp(high)] if known else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": int(self.tokens.sum()),
            "bytes": self.bytes,
            "documents": self.documents,
            "documents_without_tokens": self.passed_over,
            "resampled": self.unit,
            "window": self.window,
            "stride": self.stride,
            "ends_scored": self.ends,
        }


def windows(count: int, window: int, stride: int, start: int = 1) -> Iterator[Window]:
    """Cuts a document of `count` ids, whose first `start` are no targets, into rows of at most `window` inputs."""
    done, last = start, min(count, max(window, start) + 1)
    while done < count:
        yield Window(max(0, last - window - 1), last, last - done)
        done, last = last, min(count, last + stride)


def perplexity(
    scorer: Scorer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    ends: bool = False,
) -> Perplexity:
    """Of texts, each behind the ids that a prompt of this tokenizer begins with, or its `bos` where there are none.

    window: input tokens of a row; None takes the scorer's longest. stride: None takes half a window. ends: scores `eos` behind each document as well, as
    training does; its nats then count in bits per byte, where it has no bytes.
    Raises `ConfigError` for a window or stride out of range, `DataError` where no document has a token.
    """
    window = scorer.longest if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= scorer.longest:
        raise ConfigError(f"window: got {window}, expected 1 to {scorer.longest}, the longest row of this model")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride: got {stride}, expected 1 to the window, {window}")
    texts = list(documents)
    bodies = tokenizer.encode_batch(texts)
    kept = [i for i, body in enumerate(bodies) if len(body)]
    if not kept:
        raise DataError(f"perplexity: none of {len(texts)} documents has a token, expected text; give more of it")
    tail = [tokenizer.eos] if ends else []
    start = opening(tokenizer)
    rows, owner = [], []
    for i in kept:
        ids = np.concatenate([start, bodies[i], tail]).astype(np.int32)
        for first, last, scored in windows(len(ids), window, stride, len(start)):
            rows.append(Row(ids[first:last], scored))
            owner.append(len(rows) - 1 if len(kept) == 1 else i)
    unit, place = np.unique(owner, return_inverse=True)
    nats, tokens = np.zeros(len(unit)), np.zeros(len(unit))
    np.add.at(nats, place, [scores.nats.sum() for scores in scorer(rows)])
    np.add.at(tokens, place, [row.scored for row in rows])
    return Perplexity(
        unit="window" if len(kept) == 1 else "document",
        nats=nats,
        tokens=tokens,
        bytes=sum(len(texts[i].encode()) for i in kept),
        documents=len(kept),
        passed_over=len(texts) - len(kept),
        window=window,
        stride=stride,
        ends=ends,
    )


def opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What stands before the first id of a text, so that it can be a target: the tokenizer's `prefix`, or its `bos` where that is empty."""
    return tokenizer.prefix or (tokenizer.bos,)


def difference(found: Perplexity, baseline: Perplexity, *, samples: int = 2000) -> tuple[float, float, float]:
    """Nats per token more than a baseline on the same text and tokens, as `(difference, low, high)` of the paired bootstrap."""
    return paired_difference((found.nats, found.tokens), (baseline.nats, baseline.tokens), samples=samples)
