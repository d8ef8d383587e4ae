"""The ops of a pipeline, by what a stage keeps from F on: the input of its slice, or all that B and W need.

Keeping inputs takes least memory and runs F again in B. Keeping residuals runs nothing twice, for the memory of every microbatch in flight.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.tree import flatten, unflatten
from lmeff.models.transformer import param_specs
from lmeff.parallel.pipeline import (
    Carry,
    Pipeline,
    Stash,
    Sums,
    activation_shape,
    embed,
    last_loss,
    pick,
    place_gradients,
    place_saved,
    put,
)
from lmeff.parallel.program import Ticks
from lmeff.parallel.slices import Out, Saved, forward_slice, pull_slice, save_slice, weight_gradients


def idle(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    """Nothing but a count."""
    counts = carry.counts._replace(idle=carry.counts.idle + 1)
    return carry._replace(counts=counts), _nothing(pipe)


def forward_from_input(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    """F that keeps its input."""
    x = _entering(pipe, t, carry)
    outs = [_run_forward(pipe, t, i, part) for i, part in enumerate(pipe.split(x))]
    return _stashed(pipe, carry, t, x, outs[0].sums), pipe.join(*(out.y_BTD for out in outs))


def forward_with_residuals(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    """F that keeps its output, for the loss, and what B and W need."""
    x, *others = pipe.split(_entering(pipe, t, carry))
    out, saved = save_slice(pipe.student.model, pipe.products, _chunk(pipe, t), x, pick(pipe.batch, t.microbatch))
    payload = pipe.join(out.y_BTD, *(_run_forward(pipe, t, i + 1, part).y_BTD for i, part in enumerate(others)))
    return _stashed(pipe, carry, t, (payload, saved), out.sums), payload


def backward_from_input(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    """B that runs F again."""
    x, *others = pipe.split(pick(carry.buffers.stash, t.stash))
    out, saved = save_slice(pipe.student.model, pipe.products, _chunk(pipe, t), x, pick(pipe.batch, t.microbatch))

    def teachers() -> list[jax.Array]:
        return [_run_forward(pipe, t, i + 1, part).y_BTD for i, part in enumerate(others)]

    carry, payload, cotangents = _backward(pipe, t, carry, out.y_BTD, teachers, saved)
    return _left_for_weights(pipe, carry, t, (saved.inputs, cotangents)), payload


def backward_with_residuals(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    """B from what F kept."""
    out, saved = pick(carry.buffers.stash, t.stash)
    y, *others = pipe.split(out)
    carry, payload, cotangents = _backward(pipe, t, carry, y, lambda: others, saved)
    return _left_for_weights(pipe, carry, t, cotangents), payload


def weights_from_input(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    """W from what B left."""
    inputs, cotangents = pick(carry.buffers.pending, t.pending)
    return _weights(pipe, t, carry, inputs, cotangents)


def weights_with_residuals(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    """W from what F and B left."""
    _, saved = pick(carry.buffers.stash, t.stash)
    return _weights(pipe, t, carry, saved.inputs, pick(carry.buffers.pending, t.pending))


def _nothing(pipe: Pipeline) -> jax.Array:
    shape = activation_shape(pipe)
    return jnp.zeros(shape.shape, shape.dtype)


def _chunk(pipe: Pipeline, t: Ticks) -> Any:
    return pick(pipe.student.share.chunks, t.chunk)


def _run_forward(pipe: Pipeline, t: Ticks, member: int, x: jax.Array) -> Out:
    model, share = pipe.members[member]
    return forward_slice(model, pick(share.chunks, t.chunk), x, pick(pipe.batch, t.microbatch))


def _entering(pipe: Pipeline, t: Ticks, carry: Carry) -> jax.Array:
    """What enters the slice: embedded tokens on the first one, else what arrived."""

    def embedded() -> jax.Array:
        batch = pick(pipe.batch, t.microbatch)
        x = pipe.join(*(embed(member, member.share.outer["embed"], batch) for member in pipe.members))
        return pipe.layout.place(x, "BTD")

    def received() -> jax.Array:
        return pipe.layout.place(pick(carry.buffers.activation, t.activation), "BTD")

    with jax.named_scope("embedding"):
        return jax.lax.cond(t.is_first == 1, embedded, received)


def _stashed(pipe: Pipeline, carry: Carry, t: Ticks, values: Any, kept: Sums) -> Carry:
    live = carry.counts.live + 1
    counts = carry.counts._replace(live=live, peak=jnp.maximum(carry.counts.peak, live))
    stash = put(carry.buffers.stash, t.stash, place_saved(pipe, values))
    more = pipe.losses.layers(kept)[1]
    sums = {name: total + more[name] if name in more else total for name, total in carry.sums.items()}
    return carry._replace(buffers=carry.buffers._replace(stash=stash), counts=counts, sums=sums)


def _left_for_weights(pipe: Pipeline, carry: Carry, t: Ticks, values: Any) -> Carry:
    pending = put(carry.buffers.pending, t.pending, place_saved(pipe, values))
    return carry._replace(buffers=carry.buffers._replace(pending=pending))


def _backward(pipe: Pipeline, t: Ticks, carry: Carry, y_BTD: jax.Array, teachers: Any, saved: Saved) -> Any:
    """(carry, payload, cotangents of the products); `teachers()` gives what leaves the teacher's slice."""
    batch, outer, place = pick(pipe.batch, t.microbatch), pipe.student.share.outer, pipe.layout.place
    settle = functools.partial(place_gradients, pipe.layout, specs=param_specs(pipe.student.model.cfg))

    def last(d_outer: Any, sums: Sums) -> Any:
        others = teachers()
        loss = lambda y, outer: last_loss(pipe, y, others, outer, batch)  # noqa: E731
        (d_y, d_more), more = jax.grad(loss, argnums=(0, 1), has_aux=True)(y_BTD, outer)
        return place(d_y, "BTD"), settle(_sum(d_outer, d_more)), {**sums, **_sum({k: sums[k] for k in more}, more)}

    def received(d_outer: Any, sums: Sums) -> Any:
        return place(pick(carry.buffers.gradient, t.gradient), "BTD"), settle(d_outer), sums

    with jax.named_scope("loss"):
        d_y, d_outer, sums = jax.lax.cond(t.is_last == 1, last, received, carry.d_outer, carry.sums)
    model = pipe.student.model
    d_sums = jax.grad(lambda sums: pipe.losses.layers(sums)[0])(_zeros(pipe.products.sums))
    d_x, d_others, cotangents = pull_slice(model, pipe.products, _chunk(pipe, t), saved, batch, Out(d_y, d_sums))

    def embedded(d_outer: Any) -> Any:
        _, pull = jax.vjp(lambda e: embed(pipe.student, e, batch), outer["embed"])
        return settle({**d_outer, "embed": _sum(d_outer["embed"], pull(d_x)[0])})

    with jax.named_scope("embedding"):
        d_outer = jax.lax.cond(t.is_first == 1, embedded, settle, d_outer)
    carry = carry._replace(d_blocks=_add(carry.d_blocks, t.chunk, d_others), d_outer=d_outer, sums=sums)
    return carry, pipe.join(d_x), cotangents


def _weights(pipe: Pipeline, t: Ticks, carry: Carry, inputs: Any, cotangents: Any) -> tuple[Carry, jax.Array]:
    batch = pick(pipe.batch, t.microbatch)
    grads = weight_gradients(pipe.student.model, pipe.products, _chunk(pipe, t), inputs, cotangents, batch)
    counts = carry.counts._replace(live=carry.counts.live - 1)
    return carry._replace(d_blocks=_add(carry.d_blocks, t.chunk, grads), counts=counts), _nothing(pipe)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _sum(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _add(total: Any, row: Any, more: Any) -> Any:
    """Adds to row `row` of those arrays that `more` has."""
    flat = flatten(total)
    for path, x in flatten(more).items():
        old = flat[path]
        flat[path] = old.at[0 if old.shape[0] == 1 else row].add(x.astype(old.dtype))
    return unflatten(flat)


def _layers(pipe: Pipeline, tree: Any) -> Any:
    """Shapes of one layer to those of a chunk, [n, ...]."""
    count = jax.tree.leaves(pipe.student.share.chunks.blocks)[0].shape[1]
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), tree)


STASHES: dict[str, Stash] = {
    "input": Stash(
        (idle, forward_from_input, backward_from_input, weights_from_input),
        "B",
        lambda pipe: (activation_shape(pipe), _layers(pipe, (pipe.products.saved.inputs, pipe.products.outputs))),
    ),
    "residuals": Stash(
        (idle, forward_with_residuals, backward_with_residuals, weights_with_residuals),
        "W",
        lambda pipe: (
            (activation_shape(pipe), _layers(pipe, pipe.products.saved)),
            _layers(pipe, pipe.products.outputs),
        ),
    ),
}
