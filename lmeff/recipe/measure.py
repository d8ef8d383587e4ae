"""What the report says of artifacts: held-out loss document by document, and time, measured in turn with all others."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.precision import Policy
from lmeff.data.loader import Dataset
from lmeff.parallel.mesh import Layout
from lmeff.parallel.rows import place_batch
from lmeff.recipe.artifact import Artifact
from lmeff.train.evaluate import DocumentLosses, document_losses, make_eval_step

TIMING = (
    "ms/token is the median over repeats of one scoring forward pass (all logits, no cache) divided by its tokens, artifacts in turn; its interval "
    "are the quartiles. On this machine only."
)


Scorer = Callable[[Batch], jax.Array]
"""A compiled scoring pass of one model: nats [B, T] of a batch."""


def make_scorer(artifact: Artifact, layout: Layout, policy: Policy) -> Scorer:
    """Binds the arrays of an artifact to its jitted scoring pass."""
    step = make_eval_step(artifact.model, layout, policy)
    return lambda batch: step(artifact.params, artifact.state, artifact.ranges, batch)


def held_out(scorer: Scorer, data: Dataset, layout: Layout, batch: int, batches: int | None) -> DocumentLosses:
    """Losses of every held-out document, over the first `batches` batches where a cap is set."""
    found = (pair for i, pair in enumerate(data.evaluation(batch)) if batches is None or i < batches)
    return document_losses(scorer, found, len(data.document_bytes), layout)


def timings(
    scorers: Mapping[str, Scorer], data: Dataset, layout: Layout, batch: int, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """ms/token of every scorer as (median, low, high); one pass of each in turn, so that noise falls on all alike."""
    host, _ = next(iter(data.evaluation(batch)))
    placed = place_batch(host, layout)
    for scorer in scorers.values():
        jax.block_until_ready(scorer(placed))
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(repeats):
        for name, scorer in scorers.items():
            began = time.perf_counter()
            jax.block_until_ready(scorer(placed))
            seconds[name].append(time.perf_counter() - began)
    per_token = 1e3 / host.tokens.size
    return {name: _quartiles([per_token * t for t in times]) for name, times in seconds.items()}


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, high = np.percentile(values, [25, 75])
    return statistics.median(values), float(low), float(high)
