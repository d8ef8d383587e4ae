"""Attention over rows that are cut over a mesh axis, in three forms; each runs on a device's shards inside `jax.shard_map`.

ring:    every device keeps its queries; keys and values go round (Liu et al. 2023, https://arxiv.org/abs/2310.01889). Memory of one part of the row.
gather:  every device keeps its queries and gathers all keys and values (Llama Team 2024, https://arxiv.org/abs/2407.21783, section 3.3.2).
ulysses: an all-to-all gives every device whole rows of a part of the heads (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509).

The first two have gradients of their own, which keep of a device's part its q, k, v, output and log-sum-exp, and move the rest again.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmeff.models import attention as attn
from lmeff.models.mask import Mask
from lmeff.models.tiles import Tiles, tile_backward, tile_forward
from lmeff.parallel.order import CHUNKS, from_row, own_indices, reach, to_row


class Context(NamedTuple):
    """The mesh axis that rows are cut over, how many devices it has, how many chunks of a row each holds, and what a query may see."""

    axis: str
    devices: int
    chunks: int
    mask: Mask

    def indices(self, length: int, behind: Any = 0) -> jax.Array:
        """Index in the row of each of the `length` tokens of this device, or of the one so many places behind it."""
        device = (jax.lax.axis_index(self.axis) - behind) % self.devices
        return own_indices(device, self.devices, self.chunks, length)

    def send(self, tree: Any, places: int) -> Any:
        """Each device's `tree` to the one so many places ahead of it."""
        to = [(i, (i + places) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, to), tree)


class Keys(NamedTuple):
    """Keys and values [B * K, S, C] and their documents [B, S]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array


class Pull(NamedTuple):
    """What the backward pass knows of queries: log-sum-exp and `sum_C o * g` [B * K, T, G], and the gradient `g` of the output [B * K, T, G, C]."""

    lse: jax.Array
    delta: jax.Array
    g: jax.Array


def context_attention(
    form: str,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array,
    mask: Mask,
    *,
    axis: str,
    devices: int,
) -> jax.Array:
    """`lmeff.models.attention.attention` of shards: this device's tokens of the row in, its outputs out, in the order of `lmeff.parallel.order`.

    form: "ring", "gather" or "ulysses". For the last, query heads must be a multiple of `devices`; key-value heads that are not are sent more than once.
    """
    return FORMS[form](q_BTHC, k_BSKC, v_BSKC, segments_BT, Context(axis, devices, CHUNKS[form], mask))


# ---- one device's queries against some keys


def _tiling(t_T: jax.Array, s_S: jax.Array, ctx: Context) -> tuple[Tiles, Callable[[jax.Array], jax.Array]]:
    """Tiles that no chunk straddles, where its length allows, and what pads a tensor's dim 1 to whole tiles."""
    chunk = len(t_T) // ctx.chunks
    block = -(-chunk // -(-chunk // attn.TILE))

    def pad(x: jax.Array, **how: Any) -> jax.Array:
        missing = -x.shape[1] % block
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), **how) if missing else x

    t, s = (pad(index[None], mode="edge")[0] for index in (t_T, s_S))
    return Tiles(t, s, ctx.mask, block), pad


def _documents(segments_BT: jax.Array, like: jax.Array) -> jax.Array:
    """Documents of every row for each of its heads, as the units of `like` have it."""
    return jnp.repeat(segments_BT, like.shape[0] // segments_BT.shape[0], axis=0)


def _visit(
    q_UTGC: jax.Array, own_BT: jax.Array, keys: Keys, t_T: jax.Array, s_S: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array]:
    """Output [U, T, G, C] and log-sum-exp [U, T, G] over these keys alone."""
    tiles, pad = _tiling(t_T, s_S, ctx)
    units = (q_UTGC, keys.k, keys.v, _documents(own_BT, q_UTGC), _documents(keys.segments, q_UTGC))
    found = attn.over_units(functools.partial(tile_forward, tiles=tiles), tuple(map(pad, units)))
    return jax.tree.map(lambda x: x[:, : len(t_T)], found)


def _visit_back(
    q_UTGC: jax.Array, own_BT: jax.Array, pull: Pull, keys: Keys, t_T: jax.Array, s_S: jax.Array, ctx: Context
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """These keys' part of the gradient of q [U, T, G, C], and these queries' part of those of k and v [U, S, C]; float32."""
    tiles, pad = _tiling(t_T, s_S, ctx)
    units = (q_UTGC, keys.k, keys.v, _documents(own_BT, q_UTGC), _documents(keys.segments, q_UTGC), *pull)
    d_q, d_k, d_v = attn.over_units(functools.partial(tile_backward, tiles=tiles), tuple(map(pad, units)))
    return d_q[:, : len(t_T)], (d_k[:, : len(s_S)], d_v[:, : len(s_S)])


def _merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Outputs over two sets of keys as that over both, by their log-sum-exps."""
    lse = jnp.logaddexp(a[1], b[1])
    return sum(o * jnp.exp(part - lse)[..., None] for o, part in (a, b)), lse  # type: ignore[return-value]


def _own(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, Keys]:
    q_UTGC, k_USC, v_USC, _ = attn.to_units(q, k, v, segments)
    return q_UTGC, Keys(k_USC, v_USC, segments)


# ---- ring


def _arcs(ctx: Context, length: int) -> list[tuple[int, int]]:
    """(direction, steps) of each way that keys go round: one, or with a window, which needs only near ones, up to two."""
    behind, ahead = reach(ctx.devices, ctx.chunks, length // ctx.chunks, ctx.mask.window)
    return [(way, steps) for way, steps in ((1, behind), (-1, ahead)) if steps]


def _ring_forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> Any:
    """Output and log-sum-exp in units. While keys are used, the next are on their way; those of the last step are not sent on."""
    length = q.shape[1]
    q_UTGC, own = _own(q, k, v, segments)
    t_T = ctx.indices(length)

    def add(merged: Any, keys: Keys, behind: Any) -> Any:
        def seen() -> Any:
            return _merge(merged, _visit(q_UTGC, segments, keys, t_T, ctx.indices(length, behind), ctx))

        return _where_seen(ctx, t_T, length, behind, seen, merged)

    merged = _visit(q_UTGC, segments, own, t_T, t_T, ctx)
    for way, steps in _arcs(ctx, length):

        def step(n: Any, carry: Any, way: int = way) -> Any:
            merged, keys = carry
            return add(merged, keys, n * way), ctx.send(keys, way)

        merged, keys = _loop(1, steps, step, (merged, ctx.send(own, way)))
        merged = add(merged, keys, steps * way)
    return merged


def _where_seen(ctx: Context, t_T: jax.Array, length: int, behind: Any, seen: Callable[[], Any], nothing: Any) -> Any:
    """`seen()` where any query of this device may see those keys, else `nothing`. Devices differ in it, so no collective may be inside."""
    if ctx.mask.window is None:
        return seen()  # in zig-zag order there always is one
    first, stop = Tiles(t_T, ctx.indices(length, behind), ctx.mask, length // ctx.chunks).bounds()
    return jax.lax.cond((first < stop).any(), seen, lambda: nothing)


def _ring_backward(saved: Any, g: jax.Array, ctx: Context) -> Any:
    """Gradients of q, k, v in units. Those of keys go round with them, one step behind, and from the last device straight home."""
    q, k, v, segments, out, lse = saved
    length = q.shape[1]
    q_UTGC, own = _own(q, k, v, segments)
    pull = _pull(out, lse, g, k.shape[2])
    t_T = ctx.indices(length)

    def part(keys: Keys, behind: Any) -> Any:
        def seen() -> Any:
            return _visit_back(q_UTGC, segments, pull, keys, t_T, ctx.indices(length, behind), ctx)

        return _where_seen(ctx, t_T, length, behind, seen, jax.tree.map(lambda x: x * 0, (d_q, d_own)))

    d_q, d_own = _visit_back(q_UTGC, segments, pull, own, t_T, t_T, ctx)
    for way, steps in _arcs(ctx, length):

        def step(n: Any, carry: Any, way: int = way) -> Any:
            d_q, keys, d_keys = carry
            onward, arrived = ctx.send(keys, way), ctx.send(d_keys, way)
            more, here = part(keys, n * way)
            return d_q + more, onward, _add(arrived, here)

        keys = ctx.send(own, way)
        onward = ctx.send(keys, way) if steps > 1 else keys
        more, d_keys = part(keys, way)
        d_q, keys, d_keys = _loop(2, steps, step, (d_q + more, onward, d_keys))
        if steps > 1:
            arrived = ctx.send(d_keys, way)
            more, here = part(keys, steps * way)
            d_q, d_keys = d_q + more, _add(arrived, here)
        d_own = _add(d_own, ctx.send(d_keys, -steps * way))
    return d_q, *d_own


def _loop(first: int, stop: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    return jax.lax.fori_loop(first, stop, step, carry) if first < stop else carry


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


# ---- gather


def _gathered(x: jax.Array, ctx: Context) -> jax.Array:
    """Dim 1 of all devices, in the order of the row."""
    return to_row(jax.lax.all_gather(x, ctx.axis, axis=1, tiled=True), ctx.devices, ctx.chunks)


def _gather_forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> Any:
    q_UTGC, own = _own(q, k, v, segments)
    keys = jax.tree.map(lambda x: _gathered(x, ctx), own)
    return _visit(q_UTGC, segments, keys, ctx.indices(q.shape[1]), jnp.arange(keys.k.shape[1]), ctx)


def _gather_backward(saved: Any, g: jax.Array, ctx: Context) -> Any:
    q, k, v, segments, out, lse = saved
    q_UTGC, own = _own(q, k, v, segments)
    keys = jax.tree.map(lambda x: _gathered(x, ctx), own)
    t_T, s_S = ctx.indices(q.shape[1]), jnp.arange(keys.k.shape[1])
    d_q, d_keys = _visit_back(q_UTGC, segments, _pull(out, lse, g, k.shape[2]), keys, t_T, s_S, ctx)

    def home(d: jax.Array) -> jax.Array:
        by_device = from_row(d, ctx.devices, ctx.chunks)
        return jax.lax.psum_scatter(by_device, ctx.axis, scatter_dimension=1, tiled=True)

    return d_q, *map(home, d_keys)


def _pull(out: jax.Array, lse: jax.Array, g: jax.Array, kv_heads: int) -> Pull:
    o, g = (attn.split_queries(x, kv_heads) for x in (out, g))
    return Pull(lse, (o.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1), g)


# ---- lifting to [B, T, H, C]


def _with_gradient(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A form in units, `(q, k, v, segments, ctx) -> (o, lse)` and `(saved, g, ctx) -> (d_q, d_k, d_v)`, with its custom gradient."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> jax.Array:
        return save(q, k, v, segments, ctx)[0]

    def save(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> Any:
        o, lse = forward(q, k, v, segments, ctx)
        out, lse = checkpoint_name((attn.from_units(o, q).astype(q.dtype), lse), "attn_out")
        return out, (q, k, v, segments, out, lse)

    def pull(ctx: Context, saved: Any, g: jax.Array) -> Any:
        found = zip(backward(saved, g, ctx), saved[:3], strict=True)
        return *(attn.from_units(d, x).astype(x.dtype) for d, x in found), None

    attend.defvjp(save, pull)

    def scaled(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> jax.Array:
        return attend(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v, segments, ctx)

    return scaled


# ---- ulysses


def _ulysses(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> jax.Array:
    """Heads against tokens and back. Key-value heads are repeated until they divide: with fewer than devices, several devices need the same one."""
    copies = ctx.devices // math.gcd(ctx.devices, k.shape[2])
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))

    def whole_rows(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, ctx.axis, split_axis=2, concat_axis=1, tiled=True)

    segments = jax.lax.all_gather(segments, ctx.axis, axis=1, tiled=True)
    window, softcap = ctx.mask
    o = attn.attention(*map(whole_rows, (q, k, v)), segments_BT=segments, window=window, softcap=softcap)
    return jax.lax.all_to_all(o, ctx.axis, split_axis=1, concat_axis=2, tiled=True)


FORMS: dict[str, Callable[..., jax.Array]] = {
    "ring": _with_gradient(_ring_forward, _ring_backward),
    "gather": _with_gradient(_gather_forward, _gather_backward),
    "ulysses": _ulysses,
}
