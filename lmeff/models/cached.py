"""Attention to a cache: new keys and values are written to their slots, in place, and new queries see all that is there.

Everything is local to a device: the caller cuts rows and heads over the mesh. A table at the bottom chooses how by platform, shapes and format.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.numerics import QFormat, encode, find_scale
from lmeff.kernels.decode_attention import Seen, decode_attention
from lmeff.kernels.traffic import LANES
from lmeff.models.attention import attention
from lmeff.models.cache import FLOATS, CacheFormat, Stack, held
from lmeff.models.tiles import MASKED

Form = Callable[..., jax.Array]
"""`(q_BTHC, stack, layer, new, how) -> o_BTHC`; `stack` holds the keys of the new tokens already."""


class New(NamedTuple):
    """New tokens of some rows.

    positions: [B, T], ascending in a row; padding has -1, sees nothing and is not kept.
    length:    [B], tokens of each row, these included.
    """

    positions_BT: Any
    length_B: Any


class How(NamedTuple):
    """What a query may see, and how its scores are capped. Static.

    fresh: the new tokens are all there is.
    """

    format: CacheFormat
    window: int | None = None
    softcap: float | None = None
    fresh: bool = False


def cached_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    stack: Stack,
    layer: Any,
    new: New,
    how: How,
    *,
    platform: str = "cpu",
) -> tuple[jax.Array, Stack]:
    """Writes keys and values of one layer and attends to all of its row: output [B, T, H, C] in the dtype of `q`, and the stack.

    layer: index in the stack.
    """
    if how.fresh:
        segments_BT = (new.positions_BT >= 0).astype(jnp.int32)
        seen = {"window": how.window, "softcap": how.softcap, "platform": platform}
        o_BTHC = attention(q_BTHC, k_BTKC, v_BTKC, segments_BT=segments_BT, **seen)
        return o_BTHC, write_prompt(stack, layer, k_BTKC, v_BTKC, new, how.format)
    stack = write(stack, layer, k_BTKC, v_BTKC, new, how.format)
    form = FORMS[form_of(platform, q_BTHC.shape, stack, how)]
    return form(q_BTHC, stack, layer, new, how), stack


def form_of(platform: str, q_shape: tuple[int, ...], stack: Stack, how: How) -> str:
    """The form for local shapes on a platform, a key of `FORMS`."""
    # Of narrower codes XLA lays out the stack otherwise than the kernel reads it, and would copy it in every step.
    whole = stack.v.shape[-1] % LANES == 0
    return "kernel" if platform == "tpu" and q_shape[1] == 1 and whole and not how.format.by_channel else "plain"


# ---- writing


def encode_rows(x: jax.Array, quantized: QFormat, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes int8 and float32 scales (without `axis`, which shares one)."""
    scale, _ = find_scale(x, quantized, (axis,))
    return encode(x, scale, None, quantized, (axis,)).astype(jnp.int8), scale.squeeze(axis)


def pack(codes: jax.Array, format: CacheFormat) -> jax.Array:
    """Codes int8 as they are kept: of 4 bits, channel c + C/2 lies above channel c in one byte."""
    if format.numbers != "int4":
        return codes
    low, high = jnp.split(codes, 2, axis=-1)
    return (low & 0xF) | (high << 4)


def unpack(codes: jax.Array, format: CacheFormat) -> jax.Array:
    """The inverse of `pack`."""
    if format.numbers != "int4":
        return codes
    return jnp.concatenate([(codes << 4) >> 4, codes >> 4], axis=-1)  # shifts to the right keep the sign


def _coded(x_BTKC: jax.Array, format: CacheFormat) -> tuple[jax.Array, jax.Array | None]:
    """Numbers of tokens as they are kept, and a scale for each token and head."""
    if format.quantized is None:
        return x_BTKC.astype(FLOATS[format.numbers]), None
    codes, scale_BTK = encode_rows(x_BTKC, format.quantized, -1)
    return pack(codes, format), scale_BTK


def write(stack: Stack, layer: Any, k_BTKC: jax.Array, v_BTKC: jax.Array, new: New, format: CacheFormat) -> Stack:
    """The stack with these tokens in it. With keys by channel at most a block of tokens at once."""
    slots = stack.v.shape[3]
    rows_B11 = jnp.arange(k_BTKC.shape[0])[:, None, None]
    heads_K = jnp.arange(k_BTKC.shape[2])

    def put(into: Any, x_BT: Any, ring: int) -> Any:
        if into is None or x_BT is None:
            return into
        slot_BT = jnp.where(new.positions_BT >= 0, new.positions_BT % ring, ring)  # out of range is dropped
        # Every dim but the last is indexed: of a scatter of [K, C] XLA for TPUs wants K beside C and copies the whole cache for it.
        return into.at[layer, rows_B11, heads_K, slot_BT[..., None]].set(x_BT.astype(into.dtype), mode="drop")

    v, v_scale = _coded(v_BTKC, format)
    stack = stack._replace(v=put(stack.v, v, slots), v_scale=put(stack.v_scale, v_scale, slots))
    if format.by_channel:
        stack = stack._replace(tail=put(stack.tail, k_BTKC, stack.tail.shape[3]))
        return _close_block(stack, layer, new, format)
    k, k_scale = _coded(k_BTKC, format)
    return stack._replace(k=put(stack.k, k, slots), k_scale=put(stack.k_scale, k_scale, slots))


def _close_block(stack: Stack, layer: Any, new: New, format: CacheFormat) -> Stack:
    """Codes of the block that the new tokens have filled, in the rows where they have."""
    assert format.quantized is not None
    block, ring, blocks = format.block, stack.tail.shape[3], stack.k_scale.shape[3]
    last_B = new.length_B // block - 1
    filled_B = (last_B >= 0) & ((last_B + 1) * block > new.length_B - (new.positions_BT >= 0).sum(1))
    rows_B1, heads_K = jnp.arange(last_B.size)[:, None], jnp.arange(stack.k.shape[2])
    within_S1 = jnp.arange(block)[:, None]
    own = (layer, rows_B1[..., None], heads_K)
    k_BSKC = stack.tail[*own, (last_B[:, None, None] * block + within_S1) % ring]
    codes_BSKC, scale_BKC = encode_rows(k_BSKC.astype(jnp.float32), format.quantized, 1)
    to_B1 = jnp.where(filled_B, last_B % blocks, blocks)[:, None]
    k = stack.k.at[*own, to_B1[..., None] * block + within_S1].set(pack(codes_BSKC, format), mode="drop")
    k_scale = stack.k_scale.at[layer, rows_B1, heads_K, to_B1].set(scale_BKC, mode="drop")
    return stack._replace(k=k, k_scale=k_scale)


def write_prompt(
    stack: Stack, layer: Any, k_BTKC: jax.Array, v_BTKC: jax.Array, new: New, format: CacheFormat
) -> Stack:
    """The same for a whole prompt at positions 0, 1, ... in a stack that holds nothing: slots in one piece, and of a ring only the last tokens."""

    def put(into: jax.Array, x_BTK: jax.Array | None, count_B: jax.Array) -> jax.Array:
        if into is None or x_BTK is None:
            return into
        slots = into.shape[3]
        if x_BTK.shape[1] > slots:
            x_BTK = _take(x_BTK, held(slots, count_B))
        whole = jnp.swapaxes(x_BTK, 1, 2)[None].astype(into.dtype)
        return jax.lax.dynamic_update_slice(into, whole, (layer, *(0,) * (into.ndim - 1)))

    v, v_scale = _coded(v_BTKC, format)
    length_B = new.length_B
    stack = stack._replace(v=put(stack.v, v, length_B), v_scale=put(stack.v_scale, v_scale, length_B))
    if not format.by_channel:
        k, k_scale = _coded(k_BTKC, format)
        return stack._replace(k=put(stack.k, k, length_B), k_scale=put(stack.k_scale, k_scale, length_B))
    assert format.quantized is not None
    missing = -k_BTKC.shape[1] % format.block
    k_BTKC = jnp.pad(k_BTKC, [(0, 0), (0, missing), (0, 0), (0, 0)]).astype(stack.tail.dtype)
    b, t, heads, width = k_BTKC.shape
    k_BNSKC = k_BTKC.reshape(b, -1, format.block, heads, width).astype(jnp.float32)
    codes_BNSKC, scale_BNKC = encode_rows(k_BNSKC, format.quantized, 2)
    codes = pack(codes_BNSKC, format).reshape(b, t, heads, -1)
    full_B = length_B // format.block
    return stack._replace(
        k=put(stack.k, codes, full_B * format.block),
        k_scale=put(stack.k_scale, scale_BNKC, full_B),
        tail=put(stack.tail, k_BTKC, length_B),
    )


def _take(x_BT: jax.Array, index_BS: jax.Array) -> jax.Array:
    """`x[b, index[b, s]]`, whatever it is where the index is negative: nobody sees it."""
    rows_B1 = jnp.arange(x_BT.shape[0])[:, None]
    return x_BT[rows_B1, jnp.maximum(index_BS, 0)]


# ---- reading


def layer_of(stack: Stack, layer: Any) -> Stack:
    """One layer's part, without the leading dim."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), stack)


def plain(q_BTHC: jax.Array, stack: Stack, layer: Any, new: New, how: How) -> jax.Array:
    """All scores at once; scales of keys multiply scores, and those of values weights, so that codes enter products as they are."""
    own = layer_of(stack, layer)
    b, t, h, c = q_BTHC.shape
    kv_heads, slots = own.v.shape[1], own.v.shape[2]
    q_BTKGC = (q_BTHC * jnp.asarray(c**-0.5, q_BTHC.dtype)).reshape(b, t, kv_heads, h // kv_heads, c)
    position_BS = held(slots, new.length_B)
    scores_BKGTS = _scores(q_BTKGC, own, position_BS, new, how.format)
    if how.softcap is not None:
        scores_BKGTS = how.softcap * jnp.tanh(scores_BKGTS / how.softcap)
    seen_BTS = _seen(position_BS[:, None, :], new.positions_BT[:, :, None], how.window)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, MASKED)
    top_BKGT1 = jnp.maximum(scores_BKGTS.max(-1, keepdims=True), 0.5 * MASKED)
    weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT1)
    total_BKGT = jnp.maximum(weights_BKGTS.sum(-1), 1e-30)
    if own.v_scale is not None:
        weights_BKGTS = weights_BKGTS * own.v_scale[:, :, None, None]
    v_BKSC = unpack(own.v, how.format).astype(q_BTHC.dtype)
    # In the product's own order: with T moved within the product, XLA for CPUs has no kernel for bfloat16 of several rows (jax 0.10.2).
    o_BKGTC = jnp.einsum(
        "BKGTS,BKSC->BKGTC", weights_BKGTS.astype(v_BKSC.dtype), v_BKSC, preferred_element_type=jnp.float32
    )
    o_BTKGC = jnp.moveaxis(o_BKGTC / total_BKGT[..., None], 3, 1)
    return o_BTKGC.reshape(b, t, h, c).astype(q_BTHC.dtype)


def _seen(s: jax.Array, t: jax.Array, window: int | None) -> jax.Array:
    """Which keys at positions `s` queries at `t` see; negative ones are none."""
    seen = (s >= 0) & (s <= t)
    return seen if window is None else seen & (t - s < window)


def _scores(q_BTKGC: jax.Array, own: Stack, position_BS: jax.Array, new: New, format: CacheFormat) -> jax.Array:
    k_BKSC = unpack(own.k, format).astype(q_BTKGC.dtype)
    if not format.by_channel:
        scores = jnp.einsum("BTKGC,BKSC->BKGTS", q_BTKGC, k_BKSC, preferred_element_type=jnp.float32)
        return scores if own.k_scale is None else scores * own.k_scale[:, :, None, None]
    b, heads, slots, c = k_BKSC.shape
    k_BKNSC = k_BKSC.reshape(b, heads, -1, format.block, c)
    q_BTKGNC = (q_BTKGC[:, :, :, :, None] * own.k_scale[:, None, :, None]).astype(q_BTKGC.dtype)
    scores = jnp.einsum("BTKGNC,BKNSC->BKGTNS", q_BTKGNC, k_BKNSC, preferred_element_type=jnp.float32)
    scores = scores.reshape(*scores.shape[:4], slots)
    tail_BKRC = own.tail.astype(q_BTKGC.dtype)
    last = jnp.einsum("BTKGC,BKRC->BKGTR", q_BTKGC, tail_BKRC, preferred_element_type=jnp.float32)
    last = jnp.tile(last, slots // last.shape[-1])  # slots are whole rings of the tail
    open_BS = position_BS >= new.length_B[:, None] // format.block * format.block
    return jnp.where(open_BS[:, None, None, None], last, scores)


def kernel(q_BTHC: jax.Array, stack: Stack, layer: Any, new: New, how: How, *, interpret: bool = False) -> jax.Array:
    """One token a row, in one pass over what the row's cache holds."""
    q_BHC = q_BTHC[:, 0] * jnp.asarray(q_BTHC.shape[-1] ** -0.5, q_BTHC.dtype)
    seen = Seen(how.window, how.softcap)
    of_rows = (new.length_B, new.positions_BT[:, 0])
    o_BHC = decode_attention(
        q_BHC, stack.k, stack.v, stack.k_scale, stack.v_scale, layer, *of_rows, seen, interpret=interpret
    )
    return o_BHC[:, None]


FORMS: dict[str, Form] = {"plain": plain, "kernel": kernel}
