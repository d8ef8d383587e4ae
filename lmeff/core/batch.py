"""The batch: what data produces and what a train or eval step consumes."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """One batch of packed documents. Arrays are [B, T]; NumPy on the host, `jax.Array` in a step.

    tokens:    int32 input ids.
    targets:   int32 ids of the next token within the same document.
    segments:  int32, 1, 2, ... for the documents packed into a row, 0 for padding. Attention stays within a segment.
    positions: int32 position within the document (restarts at 0).
    weights:   float32 loss weight of each target: 1, or 0 where there is no next token in the document.
    """

    tokens: Any
    targets: Any
    segments: Any
    positions: Any
    weights: Any
