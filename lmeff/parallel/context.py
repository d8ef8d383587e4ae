"""Attention over rows that are cut over a mesh axis, in three forms; each runs on a device's shards inside `jax.shard_map`.

ring:    every device keeps its queries; keys and values go round (Liu et al. 2023, https://arxiv.org/abs/2310.01889). Memory of one part of the row.
gather:  every device keeps its queries and gathers all keys and values (Llama Team 2024, https://arxiv.org/abs/2407.21783, section 3.3.2).
ulysses: an all-to-all gives every device whole rows of a part of the heads (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509).

The first two have gradients of their own, which keep of a device's part its q, k, v, output and log-sum-exp, and move the rest again.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmeff.models import attention as attn
from lmeff.models.mask import Mask, by_kind
from lmeff.models.tiles import Tiles, tile_backward, tile_forward
from lmeff.parallel.order import CHUNKS, from_row, own_indices, reach, to_row


class Context(NamedTuple):
    """The mesh axis that rows are cut over, how many devices it has, how many chunks of a row each holds, and what a query may see.

    full: where layers differ, whether this one has no window after all: the same on all devices, but traced. Such a layer runs what any kind needs of
          collectives, and chooses between them for its own work.
    """

    axis: str
    devices: int
    chunks: int
    mask: Mask
    full: Any = None

    def documents(self, segments_BT: jax.Array) -> jax.Array:
        """Those of the whole row [B, devices * T], by device. They are the same in every layer, so XLA gathers them once."""
        return jax.lax.all_gather(segments_BT, self.axis, axis=1, tiled=True)

    def send(self, tree: Any, places: int) -> Any:
        """Each device's `tree` [U, S, C] to the one so many places ahead of it, as one message.

        Not one for each leaf: XLA's CPU backend may run those of a program that it has read from the compilation cache in a different order on every
        device, and all of JAX's collective permutes have one name to meet by.
        """
        to = [(i, (i + places) % self.devices) for i in range(self.devices)]
        leaves, structure = jax.tree.flatten(tree)
        narrow = min((x.dtype for x in leaves), key=lambda dtype: dtype.itemsize)
        parts = [_as_dtype(x, narrow) for x in leaves]
        message = jax.lax.ppermute(jnp.concatenate(parts, -1), self.axis, to)
        ends = itertools.accumulate(part.shape[-1] for part in parts)
        pieces = [message[..., end - part.shape[-1] : end] for part, end in zip(parts, ends, strict=True)]
        return structure.unflatten([_as_dtype(p, x.dtype) for p, x in zip(pieces, leaves, strict=True)])


def _as_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """The same bits in another dtype, with the last dim as much longer or shorter."""
    if x.dtype.itemsize >= dtype.itemsize:
        bits = jax.lax.bitcast_convert_type(x, dtype)
        return bits.reshape(*x.shape[:-1], -1)
    ratio = dtype.itemsize // x.dtype.itemsize
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, ratio), dtype)


class Keys(NamedTuple):
    """Keys and values [B * K, S, C]."""

    k: jax.Array
    v: jax.Array


class Tokens(NamedTuple):
    """Documents [B, T] of some tokens, and their indices in the row [T]."""

    segments: jax.Array
    index: jax.Array


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
    full: jax.Array | None = None,
    axis: str,
    devices: int,
) -> jax.Array:
    """`lmeff.models.attention.attention` of shards: this device's tokens of the row in, its outputs out, in the order of `lmeff.parallel.order`.

    form: "ring", "gather" or "ulysses". For the last, query heads must be a multiple of `devices`; key-value heads that are not are sent more than once.
    """
    return FORMS[form](q_BTHC, k_BSKC, v_BSKC, segments_BT, full, Context(axis, devices, CHUNKS[form], mask))


# ---- one device's queries against some keys


def _tiling(own: Tokens, other: Tokens, ctx: Context, mask: Mask) -> tuple[Tiles, Callable[[jax.Array], jax.Array]]:
    """Tiles that no chunk straddles, where its length allows, and what pads a tensor's dim 1 to whole tiles."""
    chunk = len(own.index) // ctx.chunks
    block = -(-chunk // -(-chunk // attn.TILE))

    def pad(x: jax.Array, **how: Any) -> jax.Array:
        missing = -x.shape[1] % block
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), **how) if missing else x

    t, s = (pad(tokens.index[None], mode="edge")[0] for tokens in (own, other))
    return Tiles(t, s, mask, block), pad


def _units(q_UTGC: jax.Array, keys: Keys, own: Tokens, other: Tokens) -> tuple[jax.Array, ...]:
    """What tiles want of each row and key-value head; the documents of a row are those of each of its heads."""
    heads = q_UTGC.shape[0] // own.segments.shape[0]
    return (q_UTGC, *keys, *(jnp.repeat(tokens.segments, heads, axis=0) for tokens in (own, other)))


def _visit(q_UTGC: jax.Array, keys: Keys, own: Tokens, other: Tokens, ctx: Context) -> tuple[jax.Array, jax.Array]:
    """Output [U, T, G, C] and log-sum-exp [U, T, G] over these keys alone."""

    def visit(mask: Mask) -> Any:
        tiles, pad = _tiling(own, other, ctx, mask)
        units = tuple(map(pad, _units(q_UTGC, keys, own, other)))
        found = attn.over_units(functools.partial(tile_forward, tiles=tiles), units)
        return jax.tree.map(lambda x: x[:, : len(own.index)], found)

    return by_kind(visit, ctx.mask, ctx.full)


def _visit_back(
    q_UTGC: jax.Array, pull: Pull, keys: Keys, own: Tokens, other: Tokens, ctx: Context
) -> tuple[jax.Array, Keys]:
    """These keys' part of the gradient of q [U, T, G, C], and these queries' part of those of k and v [U, S, C]; float32."""

    def visit(mask: Mask) -> Any:
        tiles, pad = _tiling(own, other, ctx, mask)
        units = tuple(map(pad, (*_units(q_UTGC, keys, own, other), *pull)))
        d_q, *d_keys = attn.over_units(functools.partial(tile_backward, tiles=tiles), units)
        return d_q[:, : len(own.index)], Keys(*(d[:, : len(other.index)] for d in d_keys))

    return by_kind(visit, ctx.mask, ctx.full)


def _merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Outputs over two sets of keys as that over both, by their log-sum-exps."""
    lse = jnp.logaddexp(a[1], b[1])
    return sum(o * jnp.exp(part - lse)[..., None] for o, part in (a, b)), lse  # type: ignore[return-value]


def _own(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, Keys]:
    q_UTGC, k_USC, v_USC, _ = attn.to_units(q, k, v, segments)
    return q_UTGC, Keys(k_USC, v_USC)


# ---- ring


def _arcs(ctx: Context, length: int) -> list[tuple[int, int]]:
    """(direction, steps) of each way that keys go round: one, or where all layers have a window, which needs only near ones, up to two."""
    window = ctx.mask.window if ctx.full is None else None
    behind, ahead = reach(ctx.devices, ctx.chunks, length // ctx.chunks, window)
    return [(way, steps) for way, steps in ((1, behind), (-1, ahead)) if steps]


def _around(segments_BT: jax.Array, ctx: Context) -> Callable[[Any], Tokens]:
    """The tokens of the device so many places behind this one."""
    row_BT, length = ctx.documents(segments_BT), segments_BT.shape[1]

    def tokens(behind: Any) -> Tokens:
        device = (jax.lax.axis_index(ctx.axis) - behind) % ctx.devices
        segments = jax.lax.dynamic_slice_in_dim(row_BT, device * length, length, axis=1)
        return Tokens(segments, own_indices(device, ctx.devices, ctx.chunks, length))

    return tokens


def _where_seen(ctx: Context, own: Tokens, other: Tokens, seen: Callable[[], Any], nothing: Any) -> Any:
    """`seen()` where any query of this device may see those keys, else `nothing`. Devices differ in it, so no collective may be inside."""
    if ctx.mask.window is None:
        return seen()  # in zig-zag order there always is one
    first, stop = Tiles(own.index, other.index, ctx.mask, len(own.index) // ctx.chunks).bounds()
    any_seen = (first < stop).any()
    return jax.lax.cond(any_seen if ctx.full is None else any_seen | ctx.full, seen, lambda: nothing)


def _ring_forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> Any:
    """Output and log-sum-exp in units. While keys are used, the next are on their way; those of the last step are not sent on."""
    q_UTGC, keys_here = _own(q, k, v, segments)
    tokens = _around(segments, ctx)
    own = Tokens(segments, tokens(0).index)

    def add(merged: Any, keys: Keys, behind: Any) -> Any:
        other = tokens(behind)
        return _where_seen(ctx, own, other, lambda: _merge(merged, _visit(q_UTGC, keys, own, other, ctx)), merged)

    merged = _visit(q_UTGC, keys_here, own, own, ctx)
    for way, steps in _arcs(ctx, q.shape[1]):

        def step(n: Any, carry: Any, way: int = way) -> Any:
            merged, keys = carry
            return add(merged, keys, n * way), ctx.send(keys, way)

        merged, keys = _loop(1, steps, step, (merged, ctx.send(_after(keys_here, merged[1], way), way)))
        merged = add(merged, keys, steps * way)
    return merged


def _ring_backward(saved: Any, g: jax.Array, ctx: Context) -> Any:
    """Gradients of q, k, v in units. Those of keys go round with them, one step behind, and from the last device straight home."""
    q, k, v, segments, out, lse = saved
    q_UTGC, keys_here = _own(q, k, v, segments)
    pull, tokens = _pull(out, lse, g, k.shape[2]), _around(segments, ctx)
    own = Tokens(segments, tokens(0).index)
    d_q, d_here = _visit_back(q_UTGC, pull, keys_here, own, own, ctx)
    nothing = jax.tree.map(lambda x: x * 0, (d_q, d_here))

    def part(keys: Keys, behind: Any) -> Any:
        other = tokens(behind)
        return _where_seen(ctx, own, other, lambda: _visit_back(q_UTGC, pull, keys, own, other, ctx), nothing)

    for way, steps in _arcs(ctx, q.shape[1]):

        def step(n: Any, carry: Any, way: int = way) -> Any:
            d_q, keys, d_keys = carry
            onward, arrived = ctx.send((keys, d_keys), way)
            more, here = part(keys, n * way)
            return d_q + more, onward, _add(arrived, here)

        keys = ctx.send(_after(keys_here, d_q, way), way)
        onward = ctx.send(keys, way) if steps > 1 else keys
        more, d_keys = part(keys, way)
        d_q, keys, d_keys = _loop(2, steps, step, (d_q + more, onward, d_keys))
        if steps > 1:
            arrived = ctx.send(d_keys, way)
            more, here = part(keys, steps * way)
            d_q, d_keys = d_q + more, _add(arrived, here)
        d_here = _add(d_here, ctx.send(d_keys, -steps * way))
    return d_q, *d_here


def _after(keys: Keys, other: jax.Array, way: int) -> Keys:
    """The keys; of the second way only once `other`, which the first one made, is there: see `Context.send`."""
    return keys if way > 0 else jax.tree.map(lambda x: x + (other.ravel()[0] * 0).astype(x.dtype), keys)


def _loop(first: int, stop: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    return jax.lax.fori_loop(first, stop, step, carry) if first < stop else carry


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


# ---- gather


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> Any:
    """Queries and all keys in units, and the tokens of both; keys in the order of the row."""

    def gathered(x: jax.Array) -> jax.Array:
        return to_row(jax.lax.all_gather(x, ctx.axis, axis=1, tiled=True), ctx.devices, ctx.chunks)

    q_UTGC, keys = _own(q, k, v, segments)
    length = segments.shape[1]
    own = Tokens(segments, own_indices(jax.lax.axis_index(ctx.axis), ctx.devices, ctx.chunks, length))
    row = Tokens(to_row(ctx.documents(segments), ctx.devices, ctx.chunks), jnp.arange(length * ctx.devices))
    both = gathered(jnp.concatenate(keys, -1))  # one message, as in `Context.send`
    return q_UTGC, Keys(*jnp.split(both, 2, -1)), own, row


def _gather_forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, ctx: Context) -> Any:
    q_UTGC, keys, own, row = _whole(q, k, v, segments, ctx)
    return _visit(q_UTGC, keys, own, row, ctx)


def _gather_backward(saved: Any, g: jax.Array, ctx: Context) -> Any:
    q, k, v, segments, out, lse = saved
    q_UTGC, keys, own, row = _whole(q, k, v, segments, ctx)
    d_q, d_keys = _visit_back(q_UTGC, _pull(out, lse, g, k.shape[2]), keys, own, row, ctx)

    by_device = from_row(jnp.concatenate(d_keys, -1), ctx.devices, ctx.chunks)
    home = jax.lax.psum_scatter(by_device, ctx.axis, scatter_dimension=1, tiled=True)
    return d_q, *jnp.split(home, 2, -1)


def _pull(out: jax.Array, lse: jax.Array, g: jax.Array, kv_heads: int) -> Pull:
    o, g = (attn.split_queries(x, kv_heads) for x in (out, g))
    return Pull(lse, (o.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1), g)


# ---- lifting to [B, T, H, C]


def _with_gradient(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A form in units, `(q, k, v, segments, ctx) -> (o, lse)` and `(saved, g, ctx) -> (d_q, d_k, d_v)`, with its custom gradient."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: Any, ctx: Context) -> jax.Array:
        return save(q, k, v, segments, full, ctx)[0]

    def save(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: Any, ctx: Context) -> Any:
        o, lse = forward(q, k, v, segments, ctx._replace(full=full))
        out, lse = checkpoint_name((attn.from_units(o, q).astype(q.dtype), lse), "attn_out")
        return out, (q, k, v, segments, full, out, lse)

    def pull(ctx: Context, saved: Any, g: jax.Array) -> Any:
        q, k, v, segments, full, out, lse = saved
        own = ctx._replace(full=full)
        found = zip(backward((q, k, v, segments, out, lse), g, own), (q, k, v), strict=True)
        return *(attn.from_units(d, x).astype(x.dtype) for d, x in found), None, None

    attend.defvjp(save, pull)

    def scaled(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: Any, ctx: Context) -> jax.Array:
        return attend(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v, segments, full, ctx)

    return scaled


# ---- ulysses


def _ulysses(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: Any, ctx: Context) -> jax.Array:
    """Heads against tokens and back. Key-value heads are repeated until they divide: with fewer than devices, several devices need the same one."""
    copies = ctx.devices // math.gcd(ctx.devices, k.shape[2])
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))

    parts = [x.reshape(*x.shape[:2], ctx.devices, -1, x.shape[-1]) for x in (q, k, v)]  # by the device they go to
    message = jnp.concatenate(parts, 3)  # one, as in `Context.send`
    rows = jax.lax.all_to_all(message, ctx.axis, split_axis=2, concat_axis=1, tiled=True)[:, :, 0]
    heads = [part.shape[3] for part in parts]
    whole = jnp.split(rows, (heads[0], heads[0] + heads[1]), 2)
    window, softcap = ctx.mask
    row_BT = ctx.documents(segments)
    o = attn.attention(*whole, segments_BT=row_BT, window=window, softcap=softcap, full=full)
    return jax.lax.all_to_all(o, ctx.axis, split_axis=1, concat_axis=2, tiled=True)


FORMS: dict[str, Callable[..., jax.Array]] = {
    "ring": _with_gradient(_ring_forward, _ring_backward),
    "gather": _with_gradient(_gather_forward, _gather_backward),
    "ulysses": _ulysses,
}
