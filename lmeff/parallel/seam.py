"""The operation seam on a mesh: the same `Ops`, with attention and embedding run on shards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.dims import split_einsum
from lmeff.core.numerics import is_qtensor
from lmeff.core.ops import FLOATING, Einsum, MakeOps, Numerics, lookup, make_ops, plain_einsum
from lmeff.models.attention import attention
from lmeff.models.cache import Stack, stack_letters
from lmeff.models.cached import How, New, cached_attention
from lmeff.models.mask import Mask
from lmeff.parallel.context import context_attention
from lmeff.parallel.experts import spread
from lmeff.parallel.mesh import WHOLE, Layout
from lmeff.parallel.packed import packed_on


def layout_ops(layout: Layout, numerics: Numerics = FLOATING, product: Einsum = plain_einsum) -> MakeOps:
    """The seam for this layout; `FLOATING` leaves activations in floating point."""
    return make_ops(
        numerics,
        attend=functools.partial(_attend, layout),
        place=layout.place,
        embed=functools.partial(_embed, layout),
        spread=functools.partial(spread, layout),
        product=product,
        packed=functools.partial(packed_on, layout),
        cached=functools.partial(_cached, layout),
    )


def gathering_einsum(layout: Layout, remat: str) -> Einsum:
    """`plain_einsum`, on TPUs with the weight brought whole over fsdp first.

    Left to itself, XLA for TPUs multiplies the parts of a weight as they go round, and where D is summed over it adds up partial results in float32: twice
    the activation in twice its width. A weight of one layer takes less. Not where everything is kept for the backward pass: that would keep the whole weights.
    """
    if layout.platform != "tpu" or not layout.axes("D") or remat == "none":
        return plain_einsum

    def einsum(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
        letters = split_einsum(equation)[1]
        # Not attention's: XLA then wants the stacks of all layers in another order and copies them whole.
        return plain_einsum(equation, x, gathered(layout, letters, w) if "F" in letters else w, site=site)

    return einsum


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gathered(layout: Layout, letters: str, w: jax.Array) -> jax.Array:
    """A weight of these letters, whole over fsdp; its gradient is cut as the weight was, so it is reduced where it is made."""
    return layout.place(w, letters.replace("D", WHOLE))


gathered.defvjp(
    lambda layout, letters, w: (gathered(layout, letters, w), None),
    lambda layout, letters, _, g: (layout.place(g, letters),),
)


def _attend(
    layout: Layout,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
    softcap: float | None,
    full: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within documents; rows and heads are cut over the mesh, so every device works alone but for the tokens of a row."""
    context = layout.axes("S")

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *kind: jax.Array) -> jax.Array:
        own = {"full": kind[0]} if kind else {}
        if not context:
            seen = {"window": window, "softcap": softcap, **own}
            return attention(q, k, v, segments_BT=segments, platform=layout.platform, **seen)
        where = {"axis": context[0], "devices": layout.size(context)}
        return context_attention(layout.plan.sequence, q, k, v, segments, Mask(window, softcap), **own, **where)

    # A Pallas kernel does not say what its results vary over.
    checked = bool(context) or layout.platform != "tpu"
    kind = () if full is None else (full,)
    letters = ("BSHC", "BSKC", "BSKC", "BS", *("" for _ in kind))
    call = layout.on_shards(local, letters, "BSHC", checked=checked)
    return call(q_BTHC, k_BSKC, v_BSKC, segments_BT, *kind)


def _cached(
    layout: Layout,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    stack: Stack,
    layer: Any,
    new: New,
    how: How,
) -> tuple[jax.Array, Stack]:
    """Attention to a cache; rows and heads are cut over the mesh, and every device works alone. Tokens of a row are not cut, nor are layers."""
    letters = stack_letters(stack)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, stack: Stack, layer: Any, new: New) -> tuple[jax.Array, Stack]:
        return cached_attention(q, k, v, stack, layer, new, how, platform=layout.platform)

    inputs = ("BSHC", "BSKC", "BSKC", letters, "", New("BS", "B"))
    call = layout.on_shards(local, inputs, ("BSHC", letters), checked=layout.platform != "tpu")
    return call(q_BTHC, k_BTKC, v_BTKC, stack, jnp.asarray(layer), new)


def _embed(layout: Layout, table_VD: Any, tokens_BT: jax.Array) -> jax.Array:
    """Rows by token id; the table stays as it is cut, over V and over D, and only ids and found rows move.

    Over D, each device looks up its columns for the rows of all devices that hold other columns, and one all-to-all brings rows together. Over V, each
    adds the rows that it holds; the sum is scattered over T where T divides, as the residual stream wants it.
    """
    vocab, width = layout.axes("V"), layout.axes("D")
    if is_qtensor(table_VD) or not vocab + width:
        return lookup(table_VD, tokens_BT)
    scattered = bool(vocab) and tokens_BT.shape[1] % layout.size(layout.axes("T")) == 0

    def local(part_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if width:
            tokens_BT = jax.lax.all_gather(tokens_BT, width, tiled=True)
        rows_BTD = _held(part_VD, tokens_BT, vocab) if vocab else lookup(part_VD, tokens_BT)
        if width:
            rows_BTD = jax.lax.all_to_all(rows_BTD, width, split_axis=0, concat_axis=2, tiled=True)
        if scattered:
            return jax.lax.psum_scatter(rows_BTD, vocab, scatter_dimension=1, tiled=True)
        return jax.lax.psum(rows_BTD, vocab) if vocab else rows_BTD

    return layout.on_shards(local, ("VD", "BS"), "BT_" if scattered else "BS_")(table_VD, tokens_BT)


def _held(part_VD: jax.Array, tokens_BT: jax.Array, vocab: tuple[str, ...]) -> jax.Array:
    """The rows of the ids that this device's part of the vocabulary holds, zeros for the others."""
    own = tokens_BT - jax.lax.axis_index(vocab) * part_VD.shape[0]
    inside = (own >= 0) & (own < part_VD.shape[0])
    return jnp.where(inside[..., None], part_VD[jnp.where(inside, own, 0)], 0)
