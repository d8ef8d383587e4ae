"""Quantization of weights while training: the forward pass sees the grid that will be exported.

Two methods. "minmax" finds the scale from the weights at every use and has nothing to learn. "lsq" learns it (Esser et al. 2020,
https://arxiv.org/abs/1902.08153) as a factor on the scale it began with: a step of Adam has the size of the learning rate whatever the size of the
parameter, and scales of weights are far smaller than that (1e-4 for int8), while a factor begins at 1.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.compress.base import Compression, LeafTransform, per_leaf
from lmeff.core.numerics import (
    QFormat,
    QTensor,
    dequantize,
    fake_quantize,
    find_scale,
    quantize,
    reduce_shared,
    scale_from_range,
)
from lmeff.core.specs import ParamSpec

METHODS = ("minmax", "lsq")
FLOOR = 2.0**-6  # a learned scale stays above this part of its initial value, and so positive
CLIPS = tuple(1 - i / 32 for i in range(25))  # parts of the min-max range that are tried for the initial scale


@functools.partial(jax.tree_util.register_dataclass, data_fields=("start", "zero"), meta_fields=("format", "axes"))
@dataclass(frozen=True)
class Grid:
    """How one weight is quantized; the auxiliary state of a leaf.

    start: the scale that learning began with, float32; None where scales come from the weights at every use.
    zero:  its zero point, int32, which is not learned; None for symmetric formats and without `start`.
    axes:  the negative axes that share a scale.
    """

    start: Any
    zero: Any
    format: QFormat
    axes: tuple[int, ...]


def fake_quantization(format: QFormat, *, method: str = "minmax") -> Compression:
    """Fake-quantizes every leaf; exports `QTensor`s. The trainable state of "lsq" is a factor for each scale, in its shape."""
    assert method in METHODS, method

    def init(w: Any, spec: ParamSpec) -> tuple[Any, Any]:
        axes = spec.own_axes if format.granularity == "tensor" else spec.axes
        if method == "minmax":
            return None, Grid(None, None, format, axes)
        start, zero = least_error_scale(w, format, axes)
        return jnp.ones_like(start), Grid(start, zero, format, axes)

    def apply(w: jax.Array, factor: Any, grid: Grid) -> jax.Array:
        scale, zero = _scale(w, factor, grid)
        return fake_quantize(w, scale, zero, grid.format, grid.axes)

    def export(w: jax.Array, factor: Any, grid: Grid) -> QTensor:
        scale, zero = _scale(w, factor, grid)
        return quantize(w, grid.format, grid.axes, scale=scale, zero=zero)

    return per_leaf(LeafTransform(init, apply, lambda w, grad, factor, grid, step: grid, export), packs=True)


def _scale(w: jax.Array, factor: Any, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
    if grid.start is None:
        return find_scale(jax.lax.stop_gradient(w), grid.format, grid.axes)
    # Below the floor the gradient still reaches the factor, so that it can come back.
    floored = FLOOR + (factor - jax.lax.stop_gradient(factor))
    return grid.start * jnp.where(factor > FLOOR, factor, floored), grid.zero


def least_error_scale(w: jax.Array, format: QFormat, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
    """The scale (and zero point) of least squared error among those of the min-max range times each of `CLIPS`.

    It starts LSQ, as in LSQ+ (Bhalgat et al. 2020, https://arxiv.org/abs/2004.09576): LSQ's own 2 mean|w| / sqrt(qmax) wastes most of an 8-bit grid.
    A choice from a few exact scales also comes out the same on every mesh, which a mean does not.
    """
    w = jax.lax.stop_gradient(w).astype(jnp.float32)
    low, high = (reduce_shared(fn, w, format, axes) for fn in (jnp.min, jnp.max))

    def at(clip: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return scale_from_range(low * clip, high * clip, format)

    def error(clip: jax.Array) -> jax.Array:
        scale, zero = at(clip)
        missed = w - dequantize(quantize(w, format, axes, scale=scale, zero=zero))
        return reduce_shared(jnp.sum, missed * missed, format, axes)

    clips = jnp.asarray(CLIPS, jnp.float32)
    best = jnp.argmin(jax.lax.map(error, clips), axis=0)
    return at(clips[best])
