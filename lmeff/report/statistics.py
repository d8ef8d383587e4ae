"""Intervals and frontiers: what may be said of numbers that came from a sample of documents.

The documents are the sample, so whole documents are resampled (Efron 1979, https://doi.org/10.1214/aos/1176344552; cluster bootstrap): tokens of one
document are far from independent, and an interval over tokens would be too narrow.
"""

from typing import Any

import numpy as np

from lmeff.core.errors import DataError

INTERVAL = (
    "95% percentile interval of total nats / total tokens over 2000 bootstrap resamples of whole held-out documents: how much the loss would move with "
    "other documents of this kind, not with another training seed."
)
CELLS = 4_000_000  # indices drawn at a time: 32 MB


def bootstrap_mean(
    nats_by_document: Any, tokens_by_document: Any, *, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Nats per token over all documents, as `(mean, low, high)`.

    The mean is total nats / total tokens; the interval comes from resampling documents, with the ratio of sums taken anew each time. Documents
    with 0 tokens are ignored. Fewer than two documents have no interval: low and high are NaN.
    """
    nats, tokens = _documents(nats_by_document, tokens_by_document)
    mean = float(nats.sum() / tokens.sum())
    if len(nats) < 2:
        return mean, float("nan"), float("nan")
    ratios = _resampled(nats, tokens, samples, seed)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def paired_difference(
    a: tuple[Any, Any], b: tuple[Any, Any], *, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """`mean(a) - mean(b)` in nats per token on the same documents, as `(difference, low, high)`.

    a, b: `(nats, tokens)` by document; the tokens must be the same. Every resample draws the same documents for both, so what makes a document hard for
    both models cancels.
    """
    (nats_a, tokens_a), (nats_b, tokens_b) = a, b
    if not np.array_equal(tokens_a, tokens_b):
        raise DataError(
            "paired_difference: the two were scored on different documents or tokens; expected the same number of tokens for every document. "
            "Score both on the same held-out text with the same tokenizer."
        )
    difference = np.asarray(nats_a, dtype=np.float64) - np.asarray(nats_b, dtype=np.float64)
    return bootstrap_mean(difference, tokens_a, samples=samples, seed=seed, level=level)


def pareto(points: Any) -> np.ndarray:
    """Which of `points` `[N, 2]` no other point dominates; lower is better on both axes.

    A point dominates another if it is nowhere worse and somewhere better: equal points do not dominate each other. Points that are not
    finite are never on the frontier and dominate nothing.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    finite = np.isfinite(points).all(axis=1)
    no_worse = (points[:, None] <= points[None]).all(axis=2)
    better = (points[:, None] < points[None]).any(axis=2)
    dominated = (no_worse & better & finite[:, None]).any(axis=0)
    return finite & ~dominated


def _documents(nats_by_document: Any, tokens_by_document: Any) -> tuple[np.ndarray, np.ndarray]:
    nats, tokens = np.asarray(nats_by_document, dtype=np.float64), np.asarray(tokens_by_document, dtype=np.float64)
    if nats.shape != tokens.shape or nats.ndim != 1:
        raise DataError(
            f"bootstrap: got nats {nats.shape} and tokens {tokens.shape}, expected one number a document of both"
        )
    seen = tokens > 0
    if not seen.any():
        raise DataError(
            "bootstrap: no document has a token to predict; expected at least one. Give more held-out text."
        )
    return nats[seen], tokens[seen]


def _resampled(nats: np.ndarray, tokens: np.ndarray, samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    count = len(nats)
    rows = max(1, CELLS // count)
    ratios = []
    for start in range(0, samples, rows):
        drawn = rng.integers(count, size=(min(rows, samples - start), count))
        ratios.append(nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    return np.concatenate(ratios)
