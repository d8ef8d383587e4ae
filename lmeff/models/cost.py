"""What a forward pass costs, from the letters of the spec tree."""

import math

from lmeff.core.specs import ParamSpec
from lmeff.core.tree import flatten
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs

CONVENTION = (
    "forward pass, per token: 2 FLOPs per weight of every matrix product (the head included, the embedding lookup 0), plus causal attention "
    "(4 x heads x head width x mean number of visible keys per layer). Of experts, those that a token goes to count. "
    "Masked weights count as dense: no hardware here skips them."
)


def flops_per_token(cfg: ModelConfig, context: int) -> int:
    """Forward FLOPs per token at sequences of `context` tokens; see `CONVENTION`."""
    weights = sum(
        active(spec, cfg)
        for path, spec in flatten(param_specs(cfg)).items()
        if spec.is_matmul and (path != "embed/table" or cfg.tied)
    )
    by_key = 4 * cfg.heads * cfg.head_size
    return 2 * weights + sum(count * round(by_key * mean_visible(context, window)) for window, count in cfg.windows)


def mean_over_layers(cfg: ModelConfig, context: int) -> float:
    """Mean number of keys that a token sees in a layer, over all layers."""
    return sum(count * mean_visible(context, window) for window, count in cfg.windows) / cfg.layers


def active(spec: ParamSpec, cfg: ModelConfig) -> int:
    """How many of a leaf's parameters act on a token: of experts, those of `top_k`."""
    size = math.prod(spec.shape)
    return size if cfg.moe is None or not spec.is_expert else size // cfg.moe.experts * cfg.moe.top_k


def active_parameters(cfg: ModelConfig) -> int:
    """Parameters that act on a token."""
    return sum(active(spec, cfg) for spec in flatten(param_specs(cfg)).values())


def mean_visible(context: int, window: int | None) -> float:
    """Mean number of keys a token sees in a causal (windowed) sequence."""
    span = context if window is None else min(window, context)
    return (span * (span + 1) / 2 + (context - span) * span) / context
