"""Expert parallelism: rows are cut over the expert axis like over any batch axis, experts too, so tokens and experts have to meet.

Without a capacity nobody knows how many tokens an expert gets, and shapes are static: an all-to-all that never drops would have to send, to every device,
buffers for all of a device's choices, `k` rows a token. So the tokens themselves go to all e devices of the axis, once each, and sums of results come back
(all-gather and reduce-scatter). With `n` tokens on each device a layer sends, a device and direction, forward, of width D and w bytes a number,

    without capacity   (e - 1) n D w
    with capacity c    (e - 1) / e  E rows C D w = (e - 1) / e  c k n D w     (C slots a row and expert, c k n = E rows C where C is not rounded up)

and as much again for the way back, and twice that in the backward pass. Of the buffers, the first form's has room for `e n min(k, E / e)` rows, though only k n
are filled where tokens are spread evenly. Tensor parallelism cuts F: what each device makes is its part of a sum, added up once, after tokens are back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lmeff.core.batch import Batch
from lmeff.core.exchange import ALONE, Exchange, ExpertLayer, Routed, on_one_device
from lmeff.core.numerics import materialize
from lmeff.core.ops import Ranges
from lmeff.models.moe import LETTERS
from lmeff.parallel.mesh import WHOLE, ZERO_AXIS, Layout

AXIS = "expert"


def spread(
    layout: Layout,
    layer: ExpertLayer,
    local: Callable[..., Routed],
    x_BTD: jax.Array,
    batch: Batch,
    weights: Any,
    ranges: Ranges,
    reveal: bool,
) -> Routed:
    """Runs a layer of experts on each device's shards; the seam's `spread` for this layout."""
    if layout.single:
        return on_one_device(layer, local, x_BTD, batch, weights, ranges, reveal)
    tensor = layout.axes("F")
    scattered = bool(tensor) and x_BTD.shape[1] % layout.size(layout.axes("T")) == 0

    def on_device(x_BTD: jax.Array, batch: Batch, weights: Any, ranges: Ranges) -> tuple[Any, ...]:
        weights = {name: _gathered(layout, name, w) for name, w in weights.items()}
        y_BTD, *others = local(x_BTD, batch, weights, ranges, _exchange(layout, weights["up"].shape[0]))
        if scattered:
            y_BTD = jax.lax.psum_scatter(y_BTD, tensor, scatter_dimension=1, tiled=True)
        elif tensor:
            y_BTD = jax.lax.psum(y_BTD, tensor)
        return y_BTD, *others

    weights = materialize(weights)
    letters = {name: LETTERS[name] for name in weights}
    inputs = ("BS_", Batch(*("BS",) * len(batch)), letters, dict.fromkeys(ranges, WHOLE))
    out = ("BT_" if scattered else "BS_", dict.fromkeys(layer.sums, "B"), "BS_F" if reveal else None)
    return Routed(*layout.on_shards(on_device, inputs, out)(x_BTD, batch, weights, ranges))


def _gathered(layout: Layout, name: str, w: jax.Array) -> jax.Array:
    """A layer's weight as its products need it: whole over fsdp, and of the router all experts' columns."""
    if layout.axes("D"):
        w = jax.lax.all_gather(w, ZERO_AXIS, axis=LETTERS[name].index("D"), tiled=True)
    if name == "router" and layout.mesh.shape[AXIS] > 1:
        w = jax.lax.all_gather(w, AXIS, axis=1, tiled=True)
    return w


def _exchange(layout: Layout, held: int) -> Exchange:
    """The collectives of this mesh, for a device with so many experts. The expert axis is named also where an outer `jax.shard_map` made it manual."""
    found, context = ALONE, layout.axes("S")
    if layout.mesh.shape[AXIS] > 1:
        found = found._replace(
            first=jax.lax.axis_index(AXIS) * held,
            collect=lambda x: jax.lax.all_gather(x, AXIS, tiled=True),
            give_back=lambda x: jax.lax.psum_scatter(x, AXIS, tiled=True),
            send=lambda x: jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=1, tiled=True),
            fetch=lambda x: jax.lax.all_to_all(x, AXIS, split_axis=1, concat_axis=0, tiled=True),
        )
    if context:
        found = found._replace(
            parts=layout.size(context),
            row_sum=lambda x: jax.lax.psum(x, context),
            row=lambda x: jax.lax.all_gather(x, context, axis=1, tiled=True),
            own=functools.partial(_own_part, context, layout.size(context)),
        )
    return found


def _own_part(context: tuple[str, ...], parts: int, x: jax.Array) -> jax.Array:
    size = x.shape[1] // parts
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(context) * size, size, axis=1)
