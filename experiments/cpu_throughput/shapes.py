"""The shapes measured: two models with their batch and optimizer, the same on both sides."""

from dataclasses import dataclass, field

import numpy as np

from lmeff.models.config import ModelConfig
from lmeff.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, `rows` rows of `length` tokens (each one document), and AdamW at a constant rate with clipping."""

    model: ModelConfig
    rows: int
    length: int
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
    )

    def tokens(self) -> np.ndarray:
        """The batch [B, T + 1], from a fixed seed."""
        return np.random.default_rng(0).integers(0, self.model.vocab, (self.rows, self.length + 1), dtype=np.int32)


SHAPES = {
    "7m": Shape(model=ModelConfig(vocab=4096, width=256, layers=6, heads=8, kv_heads=8, ffn=688), rows=16, length=256),
    "quickstart": Shape(
        model=ModelConfig(vocab=512, width=128, layers=4, heads=4, kv_heads=2, ffn=344), rows=16, length=256
    ),
}
