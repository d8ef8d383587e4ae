"""Causal attention in blocks, never a T x S matrix of scores.

`attention` is the one function the model calls; a table at the bottom chooses the formulation by platform and shapes. All of them save only the output
and the log-sum-exp of each row for the backward pass (FlashAttention: Dao et al. 2022, https://arxiv.org/abs/2205.14135) and skip blocks
above the diagonal or outside the window. Everything is local to a device: the caller cuts rows and heads over the mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmeff.models import splash
from lmeff.models.mask import Mask, by_kind
from lmeff.models.tiles import MASKED, Tiles, d_scores, scores, tile_backward, tile_forward, visible

Form = Callable[..., jax.Array]
"""`(q_BTHC, k_BSKC, v_BSKC, segments_BT, mask, full=None) -> o_BTHC`."""


def attention(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segments_BT: jax.Array,
    window: int | None = None,
    softcap: float | None = None,
    full: jax.Array | None = None,
    platform: str = "cpu",
) -> jax.Array:
    """Causal grouped-query self-attention within documents, [B, T, H, C] in the dtype of `q`; softmax in float32.

    segments_BT: document ids of the row; 0 is padding, which sees nothing and gives zeros.
    full:        where layers differ, a traced truth value: whether this one has no window after all.
    platform:    of the devices that this will run on, which need not be those of the machine that compiles it.
    """
    form = FORMS[form_of(platform, q_BTHC.shape, k_BSKC.shape)]
    return form(q_BTHC, k_BSKC, v_BSKC, segments_BT, Mask(window, softcap), full)


def form_of(platform: str, q_shape: Sequence[int], k_shape: Sequence[int]) -> str:
    """The form of attention for local shapes [B, T, H, C] and [B, S, K, C] on a platform, a key of `FORMS`."""
    if platform == "tpu" and splash.fits(q_shape, k_shape):
        return "splash"
    return "panels" if q_shape[1] <= SHORT else "tiles"


def reference_attention(
    q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, segments_BT: jax.Array, mask: Mask
) -> jax.Array:
    """The plain oracle: all scores at once."""
    groups = q_BTHC.shape[2] // k_BSKC.shape[2]
    k_BSHC, v_BSHC = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (k_BSKC, v_BSKC))
    scores_BHTS = jnp.einsum("BTHC,BSHC->BHTS", q_BTHC.astype(jnp.float32), k_BSHC) * q_BTHC.shape[-1] ** -0.5
    if mask.softcap is not None:
        scores_BHTS = mask.softcap * jnp.tanh(scores_BHTS / mask.softcap)
    index = jnp.arange(q_BTHC.shape[1])
    seen_BTS = visible(segments_BT, segments_BT, index, index, mask)
    weights_BHTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BHTS, MASKED), axis=-1)
    weights_BHTS = jnp.where(seen_BTS[:, None], weights_BHTS, 0)
    return jnp.einsum("BHTS,BSHC->BTHC", weights_BHTS, v_BSHC).astype(q_BTHC.dtype)


# ---- panels: static loops over blocks, each against all it can see; for short rows. The query heads of a group are rows of one matrix, [R = T * G, C].


def _panels(length: int, block: int, window: int | None) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block of queries: keys from the window's first block to the diagonal."""
    found = []
    for start in range(0, length, block):
        first = 0 if window is None else max(0, (start - window + 1) // block * block)
        found.append((slice(start, min(start + block, length)), slice(first, min(start + block, length))))
    return found


def _key_panels(length: int, block: int, window: int | None) -> list[tuple[slice, slice]]:
    """(queries, keys) of each block of keys: queries from the diagonal to the window's end."""
    found = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        found.append((slice(start, length if window is None else min(stop - 1 + window, length)), slice(start, stop)))
    return found


def _bias(segments_T: jax.Array, queries: slice, keys: slice, groups: int, mask: Mask) -> jax.Array:
    t, s = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
    bias_TS = jnp.where(visible(segments_T[queries], segments_T[keys], t, s, mask), 0.0, MASKED)
    return jnp.repeat(bias_TS, groups, axis=0)


def _panel_forward(q_TGC: jax.Array, k_SC: jax.Array, v_SC: jax.Array, segments_T: jax.Array, mask: Mask) -> Any:
    """One key-value head with its query heads: output [T, G, C] and log-sum-exp [T, G]."""
    length, groups, width = q_TGC.shape
    outs, lses = [], []
    for queries, keys in _panels(length, BLOCK, mask.window):
        q_RC = q_TGC[queries].reshape(-1, width)
        scores_RS = scores(q_RC, k_SC[keys], _bias(segments_T, queries, keys, groups, mask), mask.softcap)
        top_R1 = jnp.maximum(scores_RS.max(-1, keepdims=True), 0.5 * MASKED)
        weights_RS = jnp.exp(scores_RS - top_R1)
        total_R1 = jnp.maximum(weights_RS.sum(-1, keepdims=True), 1e-30)
        o_RC = jnp.einsum("RS,SC->RC", weights_RS.astype(v_SC.dtype), v_SC[keys], preferred_element_type=jnp.float32)
        outs.append(o_RC / total_R1)
        lses.append(top_R1 + jnp.log(total_R1))
    return jnp.concatenate(outs).reshape(q_TGC.shape), jnp.concatenate(lses).reshape(length, groups)


def _panel_backward(
    q_TGC: jax.Array,
    k_SC: jax.Array,
    v_SC: jax.Array,
    segments_T: jax.Array,
    o_TGC: jax.Array,
    lse_TG: jax.Array,
    g_TGC: jax.Array,
    mask: Mask,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By blocks of keys with scores as [S, R]: the gradients of k and v are then plain products, and only that of q needs a transposed one."""
    length, groups, width = q_TGC.shape
    d_q, d_k, d_v = jnp.zeros_like(q_TGC, jnp.float32), [], []
    delta_TG = (o_TGC.astype(jnp.float32) * g_TGC.astype(jnp.float32)).sum(-1)
    for queries, keys in _key_panels(length, BLOCK, mask.window):
        q_RC, g_RC = (x[queries].reshape(-1, width) for x in (q_TGC, g_TGC))
        lse_R, delta_R = (x[queries].reshape(-1) for x in (lse_TG, delta_TG))
        bias_SR = _bias(segments_T, queries, keys, groups, mask).T
        scores_SR = scores(k_SC[keys], q_RC, bias_SR, mask.softcap)
        p_SR = jnp.exp(scores_SR - lse_R)
        d_p_SR = jnp.einsum("SC,RC->SR", v_SC[keys], g_RC, preferred_element_type=jnp.float32)
        d_s_SR = d_scores(p_SR, scores_SR, d_p_SR, delta_R, mask.softcap).astype(q_TGC.dtype)
        d_q_RC = jnp.einsum("SR,SC->RC", d_s_SR, k_SC[keys], preferred_element_type=jnp.float32)
        d_q = d_q.at[queries].add(d_q_RC.reshape(-1, groups, width))
        d_k.append(jnp.einsum("SR,RC->SC", d_s_SR, q_RC, preferred_element_type=jnp.float32))
        d_v.append(jnp.einsum("SR,RC->SC", p_SR.astype(g_RC.dtype), g_RC, preferred_element_type=jnp.float32))
    return d_q, jnp.concatenate(d_k), jnp.concatenate(d_v)


# ---- tiles: loops over blocks of queries and of keys (`lmeff.models.tiles`), here the whole row against itself


def _tiles(length: int, mask: Mask) -> Tiles:
    index = jnp.arange(length)
    return Tiles(index, index, mask, TILE)


def _tile_forward(q_TGC: jax.Array, k_SC: jax.Array, v_SC: jax.Array, segments_T: jax.Array, mask: Mask) -> Any:
    return tile_forward(q_TGC, k_SC, v_SC, segments_T, segments_T, tiles=_tiles(len(q_TGC), mask))


def _tile_backward(
    q_TGC: jax.Array,
    k_SC: jax.Array,
    v_SC: jax.Array,
    segments_T: jax.Array,
    o_TGC: jax.Array,
    lse_TG: jax.Array,
    g_TGC: jax.Array,
    mask: Mask,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    delta_TG = (o_TGC.astype(jnp.float32) * g_TGC.astype(jnp.float32)).sum(-1)
    row = (q_TGC, k_SC, v_SC, segments_T, segments_T, lse_TG, delta_TG, g_TGC)
    return tile_backward(*row, tiles=_tiles(len(q_TGC), mask))


# ---- both forms over all rows and key-value heads


def blocked(forward: Callable[..., Any], backward: Callable[..., Any], multiple: int) -> Callable[..., jax.Array]:
    """Lifts a form of one key-value head to [B, T, H, C], with its custom gradient; rows are padded to whole blocks."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: Any, mask: Mask) -> jax.Array:
        return save(q, k, v, segments, full, mask)[0]

    def save(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: Any, mask: Mask) -> Any:
        units = to_units(q, k, v, segments)
        o, lse = by_kind(lambda mask: over_units(functools.partial(forward, mask=mask), units), mask, full)
        # Named here, both: a remat policy that keeps the output alone would have to run all of this again for the log-sum-exp.
        out, lse = checkpoint_name((from_units(o, q).astype(q.dtype), lse), "attn_out")
        return out, (q, k, v, segments, full, out, lse)

    def pull(mask: Mask, saved: Any, g: jax.Array) -> Any:
        q, k, v, segments, full, out, lse = saved
        o, g = (split_queries(x, k.shape[2]) for x in (out, g))
        units = (*to_units(q, k, v, segments), o, lse, g)
        found = by_kind(lambda mask: over_units(functools.partial(backward, mask=mask), units), mask, full)
        merged = [from_units(d, x) for d, x in zip(found, (q, k, v), strict=True)]
        return (*(d.astype(x.dtype) for d, x in zip(merged, (q, k, v), strict=True)), None, None)

    attend.defvjp(save, pull)

    def padded(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, mask: Mask, full: jax.Array | None = None
    ) -> jax.Array:
        missing = -q.shape[1] % multiple
        scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        if not missing:
            return attend(scaled, k, v, segments, full, mask)
        wide = [jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) for x in (scaled, k, v, segments)]
        out: Any = attend(*wide, full, mask)
        return out[:, : q.shape[1]]

    return padded


def split_queries(x_BTHC: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, C] to [B * K, T, G, C]."""
    b, t, h, c = x_BTHC.shape
    return x_BTHC.reshape(b, t, kv_heads, h // kv_heads, c).swapaxes(1, 2).reshape(b * kv_heads, t, h // kv_heads, c)


def to_units(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
    """Everything by (row, key-value head), with the documents of the row repeated for each head."""
    kv_heads = k.shape[2]
    k, v = (x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (k, v))
    return split_queries(q, kv_heads), k, v, jnp.repeat(segments, kv_heads, axis=0)


def from_units(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse, for queries [B * K, T, G, C] and for keys [B * K, S, C], in the shape of `like`."""
    b, t, heads, c = like.shape
    if x.ndim == 3:
        x = x[:, :, None]
    kv_heads, groups = x.shape[0] // b, x.shape[2]
    return x.reshape(b, kv_heads, t, groups, c).swapaxes(1, 2).reshape(b, t, heads, c)


def over_units(fn: Callable[..., Any], units: tuple[jax.Array, ...]) -> Any:
    """A few units at a time, so that a block's scores stay in cache (on the CPU this is 3x faster than all at once)."""
    count, groups = units[0].shape[0], units[0].shape[2]
    together = max(n for n in range(1, max(1, HEADS_TOGETHER // groups) + 1) if count % n == 0)
    cut = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), units)
    out = jax.lax.map(lambda piece: jax.vmap(fn)(*piece), cut)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)


SHORT = 1024  # rows up to this many tokens use panels
BLOCK = 64
TILE = 256
HEADS_TOGETHER = 8

FORMS: dict[str, Form] = {
    "panels": blocked(_panel_forward, _panel_backward, 1),
    "tiles": blocked(_tile_forward, _tile_backward, TILE),
    "splash": splash.attend,
}
