"""Formats of few bits, integers and floats of 8 bits: `value = (q - zero) * scale`.

One function makes the codes (`quantize`) and one reads them (`dequantize`). Training sees `fake_quantize`, which is the one
after the other with a straight-through gradient, so what is trained is bit for bit what is exported.

Source of the affine scheme: Jacob et al. 2018, https://arxiv.org/abs/1712.05877. LSQ: Esser et al. 2020, https://arxiv.org/abs/1902.08153. "fp8" is the
E4M3 of Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433: 4 bits of exponent, 3 of mantissa, no infinity, up to 448.
"""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.errors import ConfigError

GRANULARITIES = ("tensor", "channel", "group")
KINDS = ("int", "float")
FLOAT8 = jnp.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class QFormat:
    """How numbers become codes of few bits.

    kind:        "int", or "float": E4M3, whose codes are numbers of 4 significant bits up to 448; always 8 bits and symmetric.
    bits:        2 to 8.
    symmetric:   zero is code 0 and the grid is [-qmax, qmax]; otherwise affine with a zero point (`r = (q - Z) * S`).
    granularity: what shares a scale. For a weight, "tensor": the whole matrix; "channel": each output channel; "group": each run of
                 `group` inputs of an output channel. For an activation, "channel" is one scale per token, found on the fly, and "tensor" is one
                 calibrated scale.
    """

    kind: str = "int"
    bits: int = 8
    symmetric: bool = True
    granularity: str = "channel"
    group: int | None = None

    def __post_init__(self) -> None:
        """Refuses formats that do not exist."""
        if self.kind not in KINDS:
            raise ConfigError(f"QFormat.kind: got '{self.kind}', expected one of {KINDS}")
        if self.is_float and not (self.bits == 8 and self.symmetric):
            raise ConfigError(
                f"QFormat: got kind 'float' with bits {self.bits} and symmetric {self.symmetric}; expected 8 bits and symmetric, the only one there is (E4M3)"
            )
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"QFormat.bits: got {self.bits}, expected 2 to 8")
        if self.granularity not in GRANULARITIES:
            raise ConfigError(f"QFormat.granularity: got '{self.granularity}', expected one of {GRANULARITIES}")
        if (self.granularity == "group") != (self.group is not None) or (self.group is not None and self.group < 1):
            raise ConfigError(
                f"QFormat.group: got {self.group} with granularity '{self.granularity}'; 'group' needs a size >= 1"
            )

    @property
    def is_float(self) -> bool:
        """Whether codes are floats and not integers."""
        return self.kind == "float"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.is_float:
            return -self.qmax
        return -(2 ** (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        """Largest code."""
        return int(jnp.finfo(FLOAT8).max) if self.is_float else 2 ** (self.bits - 1) - 1

    @property
    def storage(self) -> Any:
        """The dtype codes are stored in."""
        if self.is_float:
            return FLOAT8
        return jnp.int4 if self.bits <= 4 else jnp.int8

    @property
    def width(self) -> int:
        """Bits that a code takes where it is stored."""
        return 4 if self.bits <= 4 else 8

    def __str__(self) -> str:
        """The text `parse_format` reads."""
        kind = {"tensor": "/tensor", "channel": "", "group": f"/g{self.group}"}[self.granularity]
        name = "fp8" if self.is_float else f"int{self.bits}"
        return f"{name}{'' if self.symmetric else '-affine'}{kind}"


def parse_format(text: str) -> QFormat:
    """Reads `int8`, `int4/g32`, `int8-affine`, `fp8/tensor`: bits, optional `-affine` (of integers), optional `/tensor` or `/gSIZE`."""
    match = re.fullmatch(r"(?:int([2-8])(-affine)?|fp8)(?:/(tensor|g(\d+)))?", text)
    if match is None:
        raise ConfigError(
            f"quantization format: got '{text}', expected intBITS[-affine][/tensor|/gSIZE] or fp8[/tensor|/gSIZE], such as int8, int4/g32, "
            "int8-affine/tensor or fp8"
        )
    bits, affine, kind, group = match.groups()
    return QFormat(
        kind="int" if bits else "float",
        bits=int(bits or 8),
        symmetric=affine is None,
        granularity="channel" if kind is None else "tensor" if kind == "tensor" else "group",
        group=int(group) if group else None,
    )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("q", "scale", "zero"), meta_fields=("format", "axes", "dtype")
)
@dataclass(frozen=True)
class QTensor:
    """A quantized array: `value = (q - zero) * scale`. Also a spec, when its fields are `jax.ShapeDtypeStruct`s.

    Invariants: `scale` and `zero` have the rank of `q`; a dim of `scale` is that of `q`, or 1, or (the grouped one) the number of groups;
    `zero` is None for symmetric formats, else int32 of the scale's shape; `scale` is float32; a masked weight has code `zero`, or 0 where that is None.
    """

    q: Any
    scale: Any
    zero: Any
    format: QFormat
    axes: tuple[int, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return (*self.q.shape[:-1], 2 * self.q.shape[-1]) if self.paired else self.q.shape

    @property
    def paired(self) -> bool:
        """Whether `q` holds two codes a byte (uint8), 2i low and 2i + 1 high along the last dim: what CPUs read fast, whose int4 XLA widens one by one."""
        return self.q.dtype == jnp.uint8

    @property
    def ndim(self) -> int:
        """The rank of the values."""
        return len(self.q.shape)


def is_qtensor(x: Any) -> bool:
    """Whether a leaf is packed; use as `is_leaf`."""
    return isinstance(x, QTensor)


def pair(t: QTensor) -> QTensor:
    """The same tensor with two codes a byte. Its last dim must be even and its codes of at most 4 bits."""
    low, high = (t.q[..., i::2].astype(jnp.int8).astype(jnp.uint8) for i in (0, 1))
    return dataclasses.replace(t, q=(low & 0xF) | (high << 4))


def unpaired(t: QTensor) -> QTensor:
    """The same tensor with each code by itself."""
    return dataclasses.replace(t, q=codes_of(t).astype(t.format.storage)) if t.paired else t


def halves(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high codes of bytes, int8."""
    signed = jax.lax.bitcast_convert_type(q, jnp.int8)
    return (signed << 4) >> 4, signed >> 4  # shifts to the right keep the sign


def codes_of(t: QTensor, rows: Any = None) -> jax.Array:
    """Codes, each a number of its own; of all, or of some `rows` of `t.q`."""
    q = t.q if rows is None else rows
    return jnp.stack(halves(q), -1).reshape(*q.shape[:-1], -1) if t.paired else q


def _pad_to_groups(x: jax.Array, axis: int, group: int) -> jax.Array:
    """Splits `axis` (negative) into [groups, group]; a ragged last group is padded with zeros, which no scale notices."""
    position = x.ndim + axis
    missing = -x.shape[position] % group
    padded = jnp.pad(x, [(0, missing if i == position else 0) for i in range(x.ndim)]) if missing else x
    return padded.reshape(*x.shape[:position], -1, group, *x.shape[position + 1 :])


def expand(scale: jax.Array, format: QFormat, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """A scale (or zero) in a shape that broadcasts against the values: groups are repeated."""
    if format.granularity != "group":
        return scale
    axis = axes[-1]  # the last contracted dim is the one cut into groups
    size = shape[len(shape) + axis]
    assert format.group is not None
    repeated = jnp.repeat(scale, format.group, axis=axis)
    return jax.lax.slice_in_dim(repeated, 0, size, axis=len(shape) + axis)


def reduce_shared(fn: Any, w: jax.Array, format: QFormat, axes: tuple[int, ...]) -> jax.Array:
    """`fn` (max, min or sum) over all numbers that share a scale, in the shape of the scale; padding is 0."""
    if format.granularity != "group":
        return fn(w, axis=axes, keepdims=True)
    axis = axes[-1]  # the last contracted dim is the one cut into groups
    assert format.group is not None
    return fn(_pad_to_groups(w, axis, format.group), axis=w.ndim + axis + 1)


def _short(scale: jax.Array) -> jax.Array:
    """A float32 scale cut (towards zero) to 16 significant bits.

    A code of at most 8 significant bits times such a scale is exact in float32, so min-max of quantized weights finds their own scale again: quantizing twice
    is quantizing once. Cutting down and not to nearest lets the largest value still reach the end of the grid.
    """
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFFF00), jnp.float32)


def scale_from_range(low: jax.Array, high: jax.Array, format: QFormat) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point that cover [low, high]. The range is widened to hold 0, so that 0 is exact; an empty range has scale 1."""
    if format.symmetric:
        scale = _short(jnp.maximum(jnp.abs(low), jnp.abs(high)) / format.qmax)
        return jnp.where(scale == 0, 1.0, scale), None
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = _short((high - low) / (format.qmax - format.qmin))
    scale = jnp.where(scale == 0, 1.0, scale)
    zero = jnp.clip(format.qmin - jnp.round(low / scale), format.qmin, format.qmax).astype(jnp.int32)
    return scale, zero


def find_scale(w: jax.Array, format: QFormat, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
    """Min-max scale (float32) and zero point of `w`; `axes` are the negative axes that share a scale."""
    w = w.astype(jnp.float32)
    return scale_from_range(reduce_shared(jnp.min, w, format, axes), reduce_shared(jnp.max, w, format, axes), format)


def round_to_grid(steps: jax.Array, format: QFormat) -> jax.Array:
    """float32 `steps`, half to even, on the format's grid continued without end: whole numbers, or numbers of 4 significant bits down to 2^-9.

    Not by a cast to float8: compilers may drop a cast and its way back, round twice on the way (through float16), and give NaN beyond the end.
    """
    if not format.is_float:
        return jnp.round(steps)
    bits = jax.lax.bitcast_convert_type(steps, jnp.uint32)
    binade = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)  # the power of two below
    spacing = jnp.maximum(binade, jnp.finfo(FLOAT8).smallest_normal.astype(jnp.float32)) * 2.0**-3
    return jnp.round(steps / spacing) * spacing


def encode(w: jax.Array, scale: jax.Array, zero: jax.Array | None, format: QFormat, axes: tuple[int, ...]) -> jax.Array:
    """Codes of `w` in float32, rounded half to even and clipped to the grid."""
    steps = round_to_grid(w.astype(jnp.float32) / expand(scale, format, axes, w.shape), format)
    if zero is not None:
        steps = steps + expand(zero, format, axes, w.shape)
    return jnp.clip(steps, format.qmin, format.qmax)


def quantize(
    w: Any, format: QFormat, axes: tuple[int, ...], *, scale: jax.Array | None = None, zero: jax.Array | None = None
) -> QTensor:
    """Quantizes an array over `axes` (negative). Without `scale` (and, if affine, `zero`) they are found by min-max."""
    if scale is None:
        scale, zero = find_scale(w, format, axes)
    codes = encode(w, scale, zero, format, axes)
    codes = codes if format.is_float else codes.astype(jnp.int8)
    return QTensor(codes.astype(format.storage), scale, zero, format, axes, jnp.dtype(w.dtype).name)


def dequantize(t: QTensor) -> jax.Array:
    """`(q - zero) * scale` in float32, rounded once to the tensor's dtype."""
    scale, zero = (None if x is None else expand(x, t.format, t.axes, t.shape) for x in (t.scale, t.zero))
    return affine(codes_of(t), scale, zero).astype(t.dtype)


def affine(q: Any, scale: Any, zero: Any = None) -> jax.Array:
    """`(q - zero) * scale` in float32 (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, equation 1); no `zero` is a zero of 0. Shapes broadcast.

    >>> affine(jnp.array([-128, 0, 127], jnp.int8), 0.5, -128).tolist()
    [0.0, 64.0, 127.5]
    >>> affine(jnp.array([[1, 2], [3, 4]], jnp.int8), jnp.array([[0.5], [2.0]])).tolist()
    [[0.5, 1.0], [6.0, 8.0]]
    """
    steps = jnp.asarray(q).astype(jnp.float32)
    if zero is not None:
        steps = steps - jnp.asarray(zero).astype(jnp.float32)
    return steps * scale


def materialize(tree: Any) -> Any:
    """A tree with every packed leaf turned back into an array."""
    return jax.tree.map(lambda x: dequantize(x) if is_qtensor(x) else x, tree, is_leaf=is_qtensor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fake_quantize(
    w: jax.Array, scale: jax.Array, zero: jax.Array | None, format: QFormat, axes: tuple[int, ...]
) -> jax.Array:
    """`dequantize(quantize(w))` with LSQ's gradients: straight through within the grid and zero outside it (for `w`),
    `round(v) - v` within and the clipped code outside, `v = w / scale` (for `scale`; times 1 / sqrt(n * qmax)).

    `x + stop_gradient(y - x)` would be wrong where values are clipped.
    """
    return dequantize(quantize(w, format, axes, scale=scale, zero=zero))


def _fake_quantize_forward(w: Any, scale: Any, zero: Any, format: QFormat, axes: tuple[int, ...]) -> Any:
    return fake_quantize(w, scale, zero, format, axes), (w, scale, zero)


def _fake_quantize_backward(format: QFormat, axes: tuple[int, ...], saved: Any, g: jax.Array) -> Any:
    w, scale, zero = saved
    steps = w.astype(jnp.float32) / expand(scale, format, axes, w.shape)
    shift = 0.0 if zero is None else expand(zero, format, axes, w.shape).astype(jnp.float32)
    rounded = round_to_grid(steps, format) + shift
    inside = (rounded >= format.qmin) & (rounded <= format.qmax)
    clipped = jnp.clip(rounded, format.qmin, format.qmax) - shift
    by_scale = jnp.where(inside, rounded - shift - steps, clipped) * g.astype(jnp.float32)
    g_scale = reduce_shared(jnp.sum, by_scale, format, axes)
    g_scale = g_scale * jax.lax.rsqrt(jnp.float32(w.size / g_scale.size * format.qmax))
    g_zero = None if zero is None else jnp.zeros(zero.shape, jax.dtypes.float0)
    return (jnp.where(inside, g, 0).astype(w.dtype), g_scale, g_zero)


fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)


def fake_quantize_min_max(w: jax.Array, format: QFormat, axes: tuple[int, ...]) -> jax.Array:
    """Fake quantization with scales found from `w` itself; no gradient flows through the scales."""
    scale, zero = find_scale(jax.lax.stop_gradient(w), format, axes)
    return fake_quantize(w, scale, zero, format, axes)


def stored_bits(t: QTensor) -> int:
    """Bits of the packed tensor as stored: codes at their storage width, scales (32 bits), zero points (8 bits)."""
    sizes = [(math.prod(t.shape), t.format.width), (t.scale.size, 32)]
    if t.zero is not None:
        sizes.append((t.zero.size, 8))
    return sum(size * bits for size, bits in sizes)
