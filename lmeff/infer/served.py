"""What inference runs: a model that is not trained."""

from dataclasses import dataclass
from typing import Any

from lmeff.core.ops import FLOATING, Numerics, Ranges
from lmeff.core.precision import Policy
from lmeff.models.config import ModelConfig
from lmeff.parallel.mesh import Layout


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that is run and not trained. params: arrays or packed leaves, as its forward pass sees them; placed by `layout`."""

    cfg: ModelConfig
    params: Any
    numerics: Numerics = FLOATING
    ranges: Ranges | None = None
    layout: Layout
    policy: Policy
