"""Objectives: `(layout, student output, teacher output, batch) -> (loss sum, metric sums)`, over weighted tokens.

Sums and not means: the caller divides once by the weight of the whole batch, so shards and microbatches cannot change the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.models.transformer import Output
from lmeff.parallel.mesh import Layout

Sums = dict[str, jax.Array]
Objective = Callable[[Layout, Output, Output | None, Batch], tuple[jax.Array, Sums]]
Head = Callable[[Layout, jax.Array, Any], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distillation from an earlier artifact: `(1 - mix) * CE + mix * T^2 * KL(teacher || student)`, both at temperature T.

    The factor T^2 keeps the gradient's size as T changes (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
    """

    teacher: str
    mix: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values outside their range."""
        if not 0 <= self.mix <= 1:
            raise ConfigError(f"distill.mix: got {self.mix}, expected 0 (labels only) to 1 (teacher only)")
        if self.temperature <= 0:
            raise ConfigError(f"distill.temperature: got {self.temperature}, expected a positive number")
