"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) with the ways to stretch it over longer contexts.

Channel i is paired with i + R/2 of the R that turn, the first ones of a head: the layout of Hugging Face's models. Scalings multiply the frequencies
`theta ** (-2i / R)`; two of them look at how long a document is. Their formulas give the numbers of transformers' `modeling_rope_utils`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.models.config import ModelConfig, RopeScaling


def rope(x_BTHC: jax.Array, batch: Batch, cfg: ModelConfig, full: jax.Array | None) -> jax.Array:
    """Heads turned by their tokens' positions, in float32.

    full: whether this layer sees all (a traced truth value), where layers differ in it; else None.
    """
    half = cfg.rotary_size // 2
    frequency_C = _frequencies(batch, cfg, full)
    angle_BT1C = batch.positions[:, :, None, None].astype(jnp.float32) * frequency_C
    cos, sin = jnp.cos(angle_BT1C), jnp.sin(angle_BT1C)
    if (factor := _amplitude(cfg, full)) is not None:
        cos, sin = cos * factor, sin * factor
    turned, still = (x_BTHC, None) if 2 * half == cfg.head_size else jnp.split(x_BTHC, [2 * half], axis=-1)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHC.dtype)
    return rotated if still is None else jnp.concatenate([rotated, still], axis=-1)


def _frequencies(batch: Batch, cfg: ModelConfig, full: jax.Array | None) -> jax.Array:
    """Of this layer, [R/2], or by token [B, T, 1, R/2] where they depend on the document's length."""
    half, local = cfg.rotary_size // 2, cfg.rope_local_theta
    if local is None:
        return _scaled(batch, cfg, half)
    if full is None:
        return _base(local, half)
    return jnp.where(full, _scaled(batch, cfg, half), _base(local, half))


def _base(theta: float, half: int) -> jax.Array:
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def _scaled(batch: Batch, cfg: ModelConfig, half: int) -> jax.Array:
    scaling, base_C = cfg.rope_scaling, _base(cfg.rope_theta, half)
    if scaling is None:
        return base_C
    if scaling.kind in FIXED:
        return base_C * jnp.asarray(FIXED[scaling.kind](scaling, cfg.rope_theta, half), jnp.float32)
    assert scaling.original is not None
    length_BT11 = document_lengths(batch)[:, :, None, None]
    if scaling.kind == "dynamic":
        length = jnp.maximum(length_BT11, scaling.original).astype(jnp.float32)
        stretch = (scaling.factor * length / scaling.original - (scaling.factor - 1)) ** (half / (half - 1))
        return (cfg.rope_theta * stretch) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    short_C, long_C = (jnp.asarray(x, jnp.float32) for x in (scaling.short, scaling.long))
    return base_C / jnp.where(length_BT11 > scaling.original, long_C, short_C)


def document_lengths(batch: Batch) -> jax.Array:
    """Tokens up to the last one of each token's document, [B, T], in whatever order the row lies."""

    def row(segments_T: jax.Array, positions_T: jax.Array) -> jax.Array:
        longest = jnp.zeros(len(segments_T) + 1, jnp.int32).at[segments_T].max(positions_T + 1)
        return longest[segments_T]

    return jax.vmap(row)(jnp.asarray(batch.segments), jnp.asarray(batch.positions))


def _amplitude(cfg: ModelConfig, full: jax.Array | None) -> jax.Array | float | None:
    """What cosines and sines are multiplied by, None for 1; layers with a theta of their own are not scaled."""
    factor, local = amplitude(cfg.rope_scaling), cfg.rope_local_theta is not None
    if factor == 1.0 or (local and full is None):
        return None
    return jnp.where(full, factor, 1.0) if local and full is not None else factor


def amplitude(scaling: RopeScaling | None) -> float:
    """The same of a scaling: it raises attention's scores as rows grow ("yarn", section 3.4 of its paper; "longrope", section 3.2)."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention is not None:
        return scaling.attention
    growth = math.log(scaling.factor)
    if scaling.kind == "yarn":
        return 1.0 + 0.1 * growth
    assert scaling.original is not None
    return math.sqrt(1.0 + growth / math.log(scaling.original))


# ---- what fixed scalings multiply each frequency by, [R/2]


def _linear(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
    return np.full(half, 1 / scaling.factor)


def _yarn(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
    """Frequencies with many turns over the original context stay, those with few are divided, a ramp over channels between."""
    assert scaling.original is not None

    def channel(turns: float) -> float:
        return half * math.log(scaling.original / (2 * math.pi * turns)) / math.log(theta)  # type: ignore[operator]

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first if last != first else 1e-3
    divided = np.clip((np.arange(half) - first) / width, 0, 1)
    return divided / scaling.factor + (1 - divided)


def _llama3(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
    """By the number of turns over the original context: over `high` they stay, under `low` they are divided, blended between."""
    assert scaling.original is not None
    turns = scaling.original / (2 * math.pi) * theta ** (-np.arange(half) / half)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return kept + (1 - kept) / scaling.factor


FIXED = {"linear": _linear, "yarn": _yarn, "llama3": _llama3}
