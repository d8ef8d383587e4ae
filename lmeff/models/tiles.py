"""Attention of some queries to some keys of a row, in loops over tiles; compile time and memory do not grow with the row.

Queries and keys come with their indices in the row, so both may be any ascending part of it: the whole row on one device, or what context
parallelism gives to a device. Only tiles in which a query may see a key are computed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.models.mask import Mask

MASKED = -1e30  # finite, so that a row with nothing to see gives zeros and not NaN


def visible(own: jax.Array, other: jax.Array, t: jax.Array, s: jax.Array, mask: Mask) -> jax.Array:
    """Which keys (of document `other`, at index `s`) each query (`own`, `t`) sees, [..., t, s]."""
    seen = (own[..., :, None] == other[..., None, :]) & (own[..., :, None] > 0) & (t[:, None] >= s[None, :])
    return seen if mask.window is None else seen & (t[:, None] - s[None, :] < mask.window)


def scores(q_RC: jax.Array, k_SC: jax.Array, bias_RS: jax.Array, softcap: float | None) -> jax.Array:
    """Capped products of scaled queries and keys, plus a bias."""
    scores_RS = jnp.einsum("...RC,...SC->...RS", q_RC, k_SC, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores_RS = softcap * jnp.tanh(scores_RS / softcap)
    return scores_RS + bias_RS


def d_scores(p: jax.Array, scores: jax.Array, d_p: jax.Array, delta: jax.Array, softcap: float | None) -> jax.Array:
    """Gradient of the uncapped scores from that of the probabilities; `delta` broadcasts against them."""
    d = p * (d_p - delta)
    return d if softcap is None else d * (1 - jnp.square(jnp.where(p > 0, scores, 0) / softcap))


class Tiles(NamedTuple):
    """Where the loops run.

    t_T, s_S: the indices of queries and keys in the row, ascending, whole tiles of them.
    """

    t_T: Any
    s_S: Any
    mask: Mask
    block: int

    def bounds(self) -> tuple[Any, Any]:
        """The tiles of keys `[first, stop)` that each tile of queries may see, [I] each; with NumPy indices, as NumPy arrays."""
        t, s = self.t_T.reshape(-1, self.block), self.s_S.reshape(-1, self.block)
        stop = (s.min(1) <= t.max(1)[:, None]).sum(1)
        if self.mask.window is None:
            return stop * 0, stop
        return (s.max(1) <= t.min(1)[:, None] - self.mask.window).sum(1), stop

    def rows(self) -> tuple[jax.Array, Any, Any]:
        """(tile of queries, first, stop) to loop over."""
        first, stop = self.bounds()
        return jnp.arange(len(first)), first, stop

    def cut(self, x: jax.Array, i: jax.Array) -> jax.Array:
        """Tile `i` of `x` along its first dim."""
        return jax.lax.dynamic_slice_in_dim(x, i * self.block, self.block)

    def scores(self, q_GRC: jax.Array, k_SC: jax.Array, documents: Any, i: jax.Array, j: jax.Array) -> jax.Array:
        """Of query tile `i` and key tile `j`; documents are those of queries [T] and keys [S]."""
        own, other, t, s = (self.cut(x, n) for x, n in zip((*documents, self.t_T, self.s_S), (i, j, i, j), strict=True))
        bias_RS = jnp.where(visible(own, other, t, s, self.mask), 0.0, MASKED)
        return scores(q_GRC, self.cut(k_SC, j)[None], bias_RS[None], self.mask.softcap)


def tile_forward(
    q_TGC: jax.Array, k_SC: jax.Array, v_SC: jax.Array, own_T: jax.Array, other_S: jax.Array, *, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """One key-value head with its query heads: output [T, G, C] and log-sum-exp [T, G], float32."""

    def queries(row: Any) -> Any:
        i, first, stop = row
        q_GRC = jnp.swapaxes(tiles.cut(q_TGC, i), 0, 1)

        def keys(j: jax.Array, carry: Any) -> Any:
            o, total, top = carry
            scores = tiles.scores(q_GRC, k_SC, (own_T, other_S), i, j)
            higher = jnp.maximum(top, jnp.maximum(scores.max(-1), 0.5 * MASKED))
            weights, keep = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            v = tiles.cut(v_SC, j)
            o = o * keep[..., None] + jnp.einsum(
                "GRS,SC->GRC", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return o, total * keep + weights.sum(-1), higher

        zero = (q_GRC * 0).astype(jnp.float32) + (k_SC[0, 0] * 0 + v_SC[0, 0] * 0).astype(jnp.float32)
        start = (zero, zero[..., 0], zero[..., 0] + 0.5 * MASKED)
        o, total, top = jax.lax.fori_loop(first, stop, keys, start)
        total = jnp.maximum(total, 1e-30)
        return jnp.swapaxes(o / total[..., None], 0, 1), jnp.swapaxes(top + jnp.log(total), 0, 1)

    o, lse = jax.lax.map(queries, tiles.rows())
    return o.reshape(q_TGC.shape), lse.reshape(q_TGC.shape[:2])


def tile_backward(
    q_TGC: jax.Array,
    k_SC: jax.Array,
    v_SC: jax.Array,
    own_T: jax.Array,
    other_S: jax.Array,
    lse_TG: jax.Array,
    delta_TG: jax.Array,
    g_TGC: jax.Array,
    *,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """These keys' part of the gradients of q, k and v, float32.

    lse_TG, delta_TG: log-sum-exp, and `sum_C o * g`, of each query over all that it sees, here and elsewhere.
    """

    def queries(carry: Any, row: Any) -> Any:
        i, first, stop = row
        q_GRC, g_GRC = (jnp.swapaxes(tiles.cut(x, i), 0, 1) for x in (q_TGC, g_TGC))
        lse_GR, delta_GR = (tiles.cut(x, i).T for x in (lse_TG, delta_TG))

        def keys(j: jax.Array, carry: Any) -> Any:
            d_q, d_k, d_v = carry
            scores = tiles.scores(q_GRC, k_SC, (own_T, other_S), i, j)
            p = jnp.exp(scores - lse_GR[..., None])
            d_p = jnp.einsum("GRC,SC->GRS", g_GRC, tiles.cut(v_SC, j), preferred_element_type=jnp.float32)
            d_s = d_scores(p, scores, d_p, delta_GR[..., None], tiles.mask.softcap).astype(q_GRC.dtype)
            d_q = d_q + jnp.einsum("GRS,SC->GRC", d_s, tiles.cut(k_SC, j), preferred_element_type=jnp.float32)
            own_k = jnp.einsum("GRS,GRC->SC", d_s, q_GRC, preferred_element_type=jnp.float32)
            own_v = jnp.einsum("GRS,GRC->SC", p.astype(g_GRC.dtype), g_GRC, preferred_element_type=jnp.float32)
            return d_q, _add_at(d_k, own_k, j * tiles.block), _add_at(d_v, own_v, j * tiles.block)

        d_k, d_v = carry
        d_q = (q_GRC * 0).astype(jnp.float32) + d_k[0, 0] * 0
        d_q, d_k, d_v = jax.lax.fori_loop(first, stop, keys, (d_q, d_k, d_v))
        return (d_k, d_v), jnp.swapaxes(d_q, 0, 1)

    # A zero made from every input carries their sharding types into the loop.
    zero = sum((x.ravel()[0] * 0).astype(jnp.float32) for x in (q_TGC, k_SC, v_SC, g_TGC))
    start = (zero + jnp.zeros(k_SC.shape), zero + jnp.zeros(v_SC.shape))
    (d_k, d_v), d_q = jax.lax.scan(queries, start, tiles.rows())
    return d_q.reshape(q_TGC.shape), d_k, d_v


def _add_at(x: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(x, start, piece.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(x, old + piece, start, 0)
