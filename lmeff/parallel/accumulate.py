"""Gradients of a batch, in one piece or accumulated over microbatches with a single reduction at the end.

With one microbatch XLA reduces each layer's gradient as the backward pass makes it (what ZeRO-3 wants). With several, reducing inside the loop
would send every gradient once per microbatch. So the rows are first grouped by the device that holds them and the gradient is mapped over
the groups: a leading dim, cut over the batch axes, keeps the groups' gradients apart until one sum at the end reduces them.
The price is a gradient that is whole over the batch axes during the loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.parallel.mesh import WHOLE, Layout

LossFn = Callable[[Layout, Any, Any, Batch, Any], tuple[jax.Array, dict[str, jax.Array]]]


def accumulated_gradients(
    loss_fn: LossFn, layout: Layout, microbatches: int, trainable: Any, auxiliary: Any, batch: Batch, frozen: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of `loss_fn(layout, trainable, auxiliary, batch, frozen) -> (loss, sums)` and its sums, over all rows of `batch`."""
    if microbatches == 1:
        return _gradient(loss_fn, layout)(trainable, auxiliary, batch, frozen)
    axes = layout.axes("B")
    groups = layout.size(axes)
    gradient = _gradient(loss_fn, layout.reserve(axes))
    if axes:
        gradient = jax.vmap(gradient, in_axes=(None, None, 0, None), spmd_axis_name=axes)
    pieces = jax.tree.map(lambda x: _split_rows(x, layout, groups, microbatches), batch)

    def of(piece: Batch) -> Any:
        return gradient(trainable, auxiliary, piece, frozen)

    def add(sums: Any, piece: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of(piece)), None

    shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], pieces))
    sums, _ = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), pieces)
    return jax.tree.map(lambda x: x.sum(0), sums) if axes else sums


def _gradient(loss_fn: LossFn, layout: Layout) -> Any:
    return jax.grad(functools.partial(loss_fn, layout), has_aux=True)


def _split_rows(x: jax.Array, layout: Layout, groups: int, microbatches: int) -> jax.Array:
    """[B, T] to [microbatches, groups, rows, T] without moving a row to another device; without groups, [microbatches, rows, T]."""
    split = x.reshape(groups, microbatches, -1, *x.shape[1:]).swapaxes(0, 1)
    return layout.place(split, WHOLE + "B" + WHOLE * x.ndim) if groups > 1 else split[:, 0]
