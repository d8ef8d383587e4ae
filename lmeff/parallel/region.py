"""Gradients of a batch where each group of devices works on its own rows, and one explicit reduction follows.

Left to itself, XLA reduces each layer's gradient as the backward pass makes it: what ZeRO-3 wants of a batch in one piece. With microbatches that would
send every gradient once a microbatch. So the whole of it, loops and all, runs inside a `jax.shard_map` over the batch axes (a *region*):
parameters are gathered once before, gradients added up without leaving the device and reduced once after. Meanwhile both are whole over fsdp.
Tensor and context parallelism go on inside, under the layout of the region (`Layout.within`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmeff.core.batch import Batch
from lmeff.parallel.mesh import ZERO_AXIS, Layout, is_cut, names, restrict

Sums = dict[str, jax.Array]
LossFn = Callable[[Layout, Any, Any, Batch, Any], tuple[jax.Array, Sums]]


def gradient(loss_fn: LossFn, layout: Layout, trainable: Any, auxiliary: Any, batch: Batch, frozen: Any) -> Any:
    """`(gradients, sums)` of `loss_fn(layout, trainable, auxiliary, batch, frozen) -> (loss, sums)`, the batch in one piece."""
    return jax.grad(functools.partial(loss_fn, layout), has_aux=True)(trainable, auxiliary, batch, frozen)


def accumulated(
    loss_fn: LossFn, microbatches: int, layout: Layout, trainable: Any, auxiliary: Any, batch: Batch, frozen: Any
) -> Any:
    """The same over microbatches, one after the other; purely local."""
    if microbatches == 1:
        return gradient(loss_fn, layout, trainable, auxiliary, batch, frozen)

    def of(piece: Batch) -> Any:
        return gradient(loss_fn, layout, trainable, auxiliary, piece, frozen)

    def add(sums: Any, piece: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of(piece)), None

    pieces = split_rows(batch, microbatches)
    shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], pieces))
    return jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), pieces)[0]


def split_rows(batch: Batch, microbatches: int) -> Batch:
    """[B, T] to [microbatches, B / microbatches, T]."""
    return jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)


def gather(tree: Any, cuts: Any) -> Any:
    """Inside a region, and inside what other axes still cut (`Layout.on_parts`: else XLA gathers over these as well): every leaf whole over fsdp."""

    def leaf(cut: P, x: jax.Array) -> jax.Array:
        for dim, axes in enumerate(cut):
            if ZERO_AXIS in names(axes):
                x = jax.lax.all_gather(x, ZERO_AXIS, axis=dim, tiled=True)
        return x

    return jax.tree.map(leaf, cuts, tree, is_leaf=is_cut)


def reduce(tree: Any, cuts: Any, axes: tuple[str, ...]) -> Any:
    """In the same place: gradients that are whole over fsdp, summed over `axes` and cut as `cuts` say; the inverse of `gather`.

    An axis that cuts a leaf is not summed over: it has other parameters there (experts, layers), except fsdp, which gets its part of the sum.
    """

    def leaf(cut: P, x: jax.Array) -> jax.Array:
        dims = {axis: dim for dim, entry in enumerate(cut) for axis in names(entry)}
        if ZERO_AXIS in dims and ZERO_AXIS in axes:
            x = jax.lax.psum_scatter(x, ZERO_AXIS, scatter_dimension=dims[ZERO_AXIS], tiled=True)
        left = tuple(axis for axis in axes if axis not in dims)
        return jax.lax.psum(x, left) if left else x

    return jax.tree.map(leaf, cuts, tree, is_leaf=is_cut)


class Region(NamedTuple):
    """Where gradients are reduced.

    layout: as seen inside. axes: those the region is manual over. cuts: the partitions of the gradients, over all axes.
    """

    layout: Layout
    axes: tuple[str, ...]
    cuts: Any

    def summed(self, cut: P) -> tuple[str, ...]:
        """The axes that the gradient of a leaf is summed over: those that do not cut it, and fsdp, which comes first where it does."""
        cutting = [axis for entry in cut for axis in names(entry)]
        own = tuple(axis for axis in self.axes if axis not in cutting)
        return (ZERO_AXIS, *own) if ZERO_AXIS in cutting and ZERO_AXIS in self.axes else own

    def sum(self, grads: Any, cuts: Any) -> Any:
        """`reduce` of gradients with these partitions; what other axes cut stays cut on the way."""
        return self.layout.on_parts(functools.partial(reduce, cuts=cuts, axes=self.axes), (cuts,), cuts)(grads)


class Reducer(NamedTuple):
    """How the gradients of single devices become those of the batch.

    init:  `(region, trainable) -> state`, as whole arrays; None where nothing is kept from step to step.
    cuts:  `(region, state) -> partitions` of the state, over all axes.
    apply: `(region, gradients, state, step) -> (gradients as `reduce` gives them, state)`, inside the region.
    """

    init: Callable[[Region, Any], Any]
    cuts: Callable[[Region, Any], Any]
    apply: Callable[[Region, Any, Any, jax.Array], tuple[Any, Any]]


EXACT = Reducer(
    init=lambda region, trainable: None,
    cuts=lambda region, state: None,
    apply=lambda region, grads, state, step: (region.sum(grads, region.cuts), state),
)


class Kept(NamedTuple):
    """What a reducer is given besides gradients: its state, and the step, of which its random numbers are a function."""

    state: Any
    step: Any


def regional(
    local: Callable[[Layout, Any, Any, Batch, Any], tuple[Any, Sums]],
    layout: Layout,
    axes: tuple[str, ...],
    cuts: Any,
    reducer: Reducer = EXACT,
) -> Callable[[Any, Any, Batch, Any, Kept], tuple[Any, Sums, Any]]:
    """`(trainable, auxiliary, batch, frozen, kept) -> (gradients, sums, the reducer's next state)` of the whole batch.

    local: `(layout, trainable, auxiliary, batch, frozen) -> (gradients, sums)` of the rows of one group.
    cuts:  the partitions of trainable, auxiliary and frozen.
    """
    region = Region(layout.within(axes), axes, cuts[0])

    def run(trainable: Any, auxiliary: Any, batch: Batch, frozen: Any, kept: Kept) -> tuple[Any, Sums, Any]:
        if not axes:
            return *local(layout, trainable, auxiliary, batch, frozen), kept.state
        whole = region.layout.on_parts(functools.partial(gather, cuts=cuts), (cuts,), cuts)
        trainable, auxiliary, frozen = whole((trainable, auxiliary, frozen))
        grads, sums = local(region.layout, trainable, auxiliary, batch, frozen)
        grads, state = reducer.apply(region, grads, *kept)
        return grads, jax.lax.psum(sums, axes), state

    def mapped(trainable: Any, auxiliary: Any, batch: Batch, frozen: Any, kept: Kept) -> tuple[Any, Sums, Any]:
        state = reducer.cuts(region, kept.state)
        trained, others, given, state = restrict((*cuts, state), axes)
        return jax.shard_map(
            run,
            mesh=None if layout.manual else layout.mesh,
            in_specs=(trained, others, layout.partition("B"), given, Kept(state, P())),
            out_specs=(trained, P(), state),
            axis_names=set(axes),
            check_vma=False,
        )(trainable, auxiliary, batch, frozen, kept)

    return mapped if axes else run
