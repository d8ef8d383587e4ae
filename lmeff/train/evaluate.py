"""Held-out loss, document by document, so that its interval can come from a bootstrap over documents."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.ops import Ranges
from lmeff.core.precision import Policy
from lmeff.distill.objectives import Projection, token_nll
from lmeff.parallel.mesh import Layout
from lmeff.parallel.preemption import safe_point
from lmeff.parallel.rows import place_batch
from lmeff.train.runtime import Model


class DocumentLosses(NamedTuple):
    """Sums over each held-out document: negative log-likelihood in nats, and predicted tokens. Documents never seen have 0 tokens."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per token over all tokens."""
        return float(self.nats.sum() / self.tokens.sum())


def make_eval_step(model: Model, layout: Layout, policy: Policy) -> jax.stages.Wrapped:
    """The jitted `(params, state, ranges, placed batch) -> nats [B, T]` in the order of the rows, zero where a target has no weight."""
    nll = token_nll(Projection(model.cfg, model.numerics))

    def step(params: Any, state: Any, ranges: Ranges | None, batch: Batch) -> jax.Array:
        nats_BT = nll(layout, model.run(layout, params, state, batch, ranges, policy, "none"), batch)
        return layout.in_row_order(nats_BT)

    return jax.jit(step, out_shardings=layout.replicated)


def document_losses(
    step: Callable[[Batch], jax.Array], batches: Iterable[tuple[Batch, np.ndarray]], documents: int, layout: Layout
) -> DocumentLosses:
    """Runs `step` over the held-out batches `(batch, document of each token)` and sums by document.

    Raises `Preempted` between batches where it runs inside training and all processes stop here.
    """
    nats, tokens = np.zeros(documents), np.zeros(documents)
    for batch, document_BT in batches:
        safe_point()
        losses_BT = np.asarray(step(place_batch(batch, layout)), dtype=np.float64)
        counted = np.asarray(batch.weights) > 0
        np.add.at(nats, document_BT[counted], losses_BT[counted])
        np.add.at(tokens, document_BT[counted], 1.0)
    return DocumentLosses(nats, tokens)
