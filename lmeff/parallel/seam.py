"""The operation seam on a mesh: the same `Ops`, with attention and embedding run on shards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.numerics import is_qtensor
from lmeff.core.ops import FLOATING, MakeOps, Numerics, lookup, make_ops
from lmeff.models.attention import attention
from lmeff.parallel.mesh import Layout


def layout_ops(layout: Layout, numerics: Numerics = FLOATING) -> MakeOps:
    """The seam for this layout; `FLOATING` leaves activations in floating point."""
    return make_ops(
        numerics,
        attend=functools.partial(_attend, layout),
        place=layout.place,
        embed=functools.partial(_embed, layout),
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
) -> jax.Array:
    """Causal attention within documents; rows and heads are cut over the mesh, so every device works alone."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return attention(q, k, v, segments_BT=segments, window=window, softcap=softcap)

    call = layout.on_shards(local, ("B_HC", "B_KC", "B_KC", "B_"), "B_HC")
    return call(q_BTHC, k_BSKC, v_BSKC, segments_BT)


def _embed(layout: Layout, table_VD: Any, tokens_BT: jax.Array) -> jax.Array:
    """Rows by token id. With the vocabulary cut, each device adds the rows that it holds: no gather of the table over V.

    The sum is scattered over T where T divides, as the residual stream wants it.
    """
    axes = layout.axes("V")
    if not axes or is_qtensor(table_VD):
        return lookup(table_VD, tokens_BT)
    scattered = tokens_BT.shape[1] % layout.size(axes) == 0

    def local(rows_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        own = tokens_BT - jax.lax.axis_index(axes) * rows_VD.shape[0]
        inside = (own >= 0) & (own < rows_VD.shape[0])
        part_BTD = jnp.where(inside[..., None], rows_VD[jnp.where(inside, own, 0)], 0)
        if scattered:
            return jax.lax.psum_scatter(part_BTD, axes, scatter_dimension=1, tiled=True)
        return jax.lax.psum(part_BTD, axes)

    return layout.on_shards(local, ("V_", "B_"), "BT_" if scattered else "B__")(table_VD, tokens_BT)
