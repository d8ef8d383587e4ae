"""Attention of one new token a row to a cache of keys and values, as a Pallas kernel for TPUs: codes go to the cores as they are stored.

One step of the grid takes a block of slots of all key-value heads of a row; softmax is computed as blocks come (Milakov & Gimelshein 2018,
https://arxiv.org/abs/1805.02867). Scales of keys multiply scores, those of values weights. The kernel reads one layer of a stack in place, and of a row
only blocks that hold anything.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lmeff.kernels.traffic import LANES, Blocks, Call, block_size

SLOTS = 512  # of a block, at most
MASKED = -1e30


class Seen(NamedTuple):
    """What a query sees, and how its scores are capped. Static."""

    window: int | None = None
    softcap: float | None = None


def decode_call(q_BHC: Any, k: Any, v: Any, k_scale: Any = None, v_scale: Any = None) -> Call:
    """Grid and operands: queries by key-value head, keys, values, their scales if any, result. Index maps take three scalars: layer, lengths, positions."""
    _, rows, heads, slots, stored = k.shape
    width, groups = q_BHC.shape[-1], q_BHC.shape[1] // heads
    size = block_size(slots, LANES, SLOTS)

    def last(b: Any, length_B: Any) -> Any:
        # Not `//`, which would ask what TPU this process has; it may have none.
        return jax.lax.div(jnp.maximum(jnp.minimum(length_B[b], slots) - 1, 0), size)

    def of_codes(b: Any, s: Any, layer_1: Any, length_B: Any, position_B: Any) -> tuple[Any, ...]:
        return layer_1[0], b, 0, jnp.minimum(s, last(b, length_B)), 0

    def of_scales(b: Any, s: Any, layer_1: Any, length_B: Any, position_B: Any) -> tuple[Any, ...]:
        return layer_1[0], b, 0, jnp.minimum(s, last(b, length_B))

    whole = Blocks((rows, heads, groups, width), q_BHC.dtype, (1, heads, groups, width), lambda b, *_: (b, 0, 0, 0))
    codes = [Blocks(x.shape, x.dtype, (1, 1, heads, size, stored), of_codes) for x in (k, v)]
    scales = [Blocks(x.shape, x.dtype, (1, 1, heads, size), of_scales) for x in (k_scale, v_scale) if x is not None]
    return Call((rows, -(-slots // size)), (whole, *codes, *scales, whole))


def decode_attention(
    q_BHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    layer: Any,
    length_B: jax.Array,
    position_B: jax.Array,
    seen: Seen,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one query a row to layer `layer` of a cache, [B, H, C] in the dtype of `q`, which is scaled already.

    k, v:       [L, B, K, S, C] floats or int8 codes, or [L, B, K, S, C/2] bytes of two codes, channels c and c + C/2. Slot s of a row of n tokens holds the
                last position before n that is s modulo S.
    scales:     [L, B, K, S] float32, of codes.
    position_B: of the queries; a negative one sees nothing and gives zeros.
    """
    b, h, c = q_BHC.shape
    heads, slots = k.shape[2:4]
    call = decode_call(q_BHC, k, v, k_scale, v_scale)
    *inputs, out = call.operands
    size = inputs[1].block[3]
    kernel = functools.partial(_kernel, seen=seen, slots=slots, size=size, scaled=k_scale is not None)
    sums = (heads, h // heads, c)
    made = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=call.grid,
            in_specs=[operand.spec for operand in inputs],
            out_specs=out.spec,
            scratch_shapes=[pltpu.VMEM((*sums[:2], LANES), jnp.float32)] * 2 + [pltpu.VMEM(sums, jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )
    scalars = (jnp.asarray(layer, jnp.int32).reshape(1), length_B.astype(jnp.int32), position_B.astype(jnp.int32))
    scales = [x for x in (k_scale, v_scale) if x is not None]
    return made(*scalars, q_BHC.reshape(b, heads, h // heads, c), k, v, *scales).reshape(b, h, c)


# ---- inside a core


def _kernel(
    layer_ref: Any,
    length_ref: Any,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    seen: Seen,
    slots: int,
    size: int,
    scaled: bool,
) -> None:
    *scale_refs, out_ref, top_ref, total_ref, acc_ref = refs
    row, block = pl.program_id(0), pl.program_id(1)
    length = length_ref[row]

    @pl.when(block == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(block * size < jnp.minimum(length, slots))
    def _() -> None:
        q_KGC, k_KSC, v_KSC = q_ref[0], _numbers(k_ref, q_ref), _numbers(v_ref, q_ref)
        if slots % size and not scaled:  # beyond the end may be anything, and nothing times NaN is NaN
            slot = block * size + jax.lax.broadcasted_iota(jnp.int32, v_KSC.shape, 1)
            v_KSC = jnp.where(slot < slots, v_KSC, 0)
        scores_KGS = _dot(q_KGC, k_KSC, 2)
        if scaled:
            scores_KGS = scores_KGS * scale_refs[0][0, 0][:, None, :]
        if seen.softcap is not None:
            scores_KGS = seen.softcap * jnp.tanh(scores_KGS / seen.softcap)
        visible_KGS = _visible(scores_KGS.shape, block * size, slots, length, position_ref[row], seen.window)
        scores_KGS = jnp.where(visible_KGS, scores_KGS, MASKED)
        old_KG1 = top_ref[:, :, :1]
        top_KG1 = jnp.maximum(old_KG1, scores_KGS.max(-1, keepdims=True))
        weights_KGS = jnp.where(visible_KGS, jnp.exp(scores_KGS - top_KG1), 0.0)
        kept_KG1 = jnp.exp(old_KG1 - top_KG1)
        total_ref[...] = total_ref[...] * kept_KG1 + weights_KGS.sum(-1, keepdims=True)
        top_ref[...] = jnp.broadcast_to(top_KG1, top_ref.shape)
        if scaled:
            weights_KGS = jnp.where(visible_KGS, weights_KGS * scale_refs[1][0, 0][:, None, :], 0.0)
        acc_ref[...] = acc_ref[...] * kept_KG1 + _dot(weights_KGS.astype(v_KSC.dtype), v_KSC, 1)

    @pl.when(block == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[0] = (acc_ref[...] / jnp.maximum(total_ref[:, :, :1], 1e-30)).astype(out_ref.dtype)


def _numbers(ref: Any, q_ref: Any) -> jax.Array:
    """A block of keys or values as numbers of the queries' dtype, [K, S, C]."""
    stored = ref[0, 0]
    if jnp.issubdtype(stored.dtype, jnp.floating) or stored.shape[-1] == q_ref.shape[-1]:
        return stored.astype(q_ref.dtype)
    wide = stored.astype(jnp.int32)  # cores do not shift bytes; shifts to the right keep the sign
    return jnp.concatenate([((wide << 28) >> 28).astype(q_ref.dtype), (wide >> 4).astype(q_ref.dtype)], axis=-1)


def _dot(x: jax.Array, y: jax.Array, summed: int) -> jax.Array:
    """A product for each key-value head, over dim 2 of `x` and dim `summed` of `y`."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((2,), (summed,)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)


def _visible(shape: Any, start: Any, slots: int, length: Any, position: Any, window: int | None) -> jax.Array:
    slot = start + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    last = length - 1
    turn = jax.lax.rem(last, slots)
    held = last - turn + jnp.where(slot <= turn, slot, slot - slots)
    seen = (slot < slots) & (held >= 0) & (held <= position)
    return seen if window is None else seen & (position - held < window)
