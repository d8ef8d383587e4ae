"""The pipeline executor: one scan over the ticks of any schedule, inside a region manual over pipe.

In a tick every stage does its own op (`jax.lax.switch`), then two collective permutes move what was made to the neighbours. The first slice also embeds
its tokens, the last one also computes the loss: neither exists on the other stages. A stage keeps a microbatch's input from F to B, which runs the slice again from
it; weights, fsdp and tensor parallelism inside a stage are as everywhere. A teacher's slices ride along: its activations travel beside the student's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.core.ops import plain_einsum
from lmeff.core.tree import Tree, flatten, map_with_path, unflatten
from lmeff.models.transformer import Output, cast_floating, embed_tokens, last_hidden, param_specs
from lmeff.parallel.mesh import WHOLE, Layout
from lmeff.parallel.program import ACTIVATION, GRADIENT, Program, Ticks
from lmeff.parallel.slices import (
    Products,
    Saved,
    Slice,
    SliceModel,
    forward_slice,
    products_of,
    tapped_slice,
    weight_gradients,
)
from lmeff.parallel.stages import AXIS

Sums = dict[str, jax.Array]


class Share(NamedTuple):
    """What a stage holds of a model, as the forward pass sees it.

    chunks: its layers, every array [v, n, ...].
    outer:  embedding, last norm and head, on every stage.
    ranges: calibrated activation ranges of the head's site.
    """

    chunks: Slice
    outer: Any
    ranges: Any


class Member(NamedTuple):
    """A model and this stage's share of it."""

    model: SliceModel
    share: Share


class Buffers(NamedTuple):
    """What waits on a stage, each [rows + 1 spare, ...]; `SlotCounts` says the rows."""

    activation: jax.Array
    stash: jax.Array
    gradient: jax.Array
    pending: Saved


class Counts(NamedTuple):
    """What a stage counted: idle ticks, and microbatches in flight (F done, W not): now and at most."""

    idle: jax.Array
    live: jax.Array
    peak: jax.Array


class Carry(NamedTuple):
    """What goes from tick to tick on a stage; gradients are float32."""

    buffers: Buffers
    d_blocks: Any
    d_outer: Any
    sums: Sums
    counts: Counts


class Pipeline(NamedTuple):
    """Everything of a pipelined step but its arrays that change.

    loss: `(student output, teacher output, microbatch) -> (objective, sums)`.
    """

    program: Program
    layout: Layout
    student: Member
    teacher: Member | None
    loss: Callable[[Output, Output | None, Batch], tuple[jax.Array, Sums]]
    batch: Batch  # [m, rows, T]
    products: Products

    @property
    def width(self) -> int:
        """Of the student's activations."""
        return self.student.model.cfg.width


def run_pipeline(
    program: Program,
    layout: Layout,
    student: Member,
    teacher: Member | None,
    loss: Callable[[Output, Output | None, Batch], tuple[jax.Array, Sums]],
    batch: Batch,
) -> tuple[Any, Any, Sums, Counts]:
    """Gradients of this stage's layers [v, n, ...] and of the outer parameters, sums, and counts; `batch` is [m, rows, T].

    Runs inside a region over pipe and the batch axes. What only one stage has is zero on the others: the caller adds up over pipe.
    """
    shape = (*batch.tokens.shape[1:], student.model.cfg.width)
    x = jax.ShapeDtypeStruct(shape, student.model.compute_dtype)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch)
    layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype), student.share.chunks)
    products = products_of(student.model, layer, x, one)
    pipe = Pipeline(program, layout, student, teacher, loss, batch, products)
    carry, _ = jax.lax.scan(
        lambda c, t: (_tick(pipe, c, t), None), _start(pipe), jax.tree.map(jnp.asarray, program.ticks)
    )
    return carry.d_blocks, carry.d_outer, carry.sums, carry.counts


def _start(pipe: Pipeline) -> Carry:
    model, share, slots = pipe.student.model, pipe.student.share, pipe.program.slots
    rows, length = pipe.batch.tokens.shape[1:]
    wide = pipe.width + (0 if pipe.teacher is None else pipe.teacher.model.cfg.width)
    count = jax.tree.leaves(share.chunks.blocks)[0].shape[1]

    def rows_of(slots: int, width: int) -> jax.Array:
        return jnp.zeros((slots + 1, rows, length, width), model.compute_dtype)

    outputs = pipe.products.outputs
    cotangents = {site: jnp.zeros((slots.pending + 1, count, *o.shape), o.dtype) for site, o in outputs.items()}
    inputs = {}
    for site, letters in pipe.products.inputs.items():
        sizes = {**model.cfg.sizes, "B": rows, "T": length}
        inputs[site] = jnp.zeros(
            (slots.pending + 1, count, *(sizes[letter] for letter in letters)), model.compute_dtype
        )
    buffers = Buffers(
        rows_of(slots.activation, wide),
        rows_of(slots.stash, wide),
        rows_of(slots.gradient, pipe.width),
        Saved(inputs, cotangents),
    )
    one = jax.tree.map(lambda a: a[0], pipe.batch)
    x = jax.ShapeDtypeStruct((rows, length, wide), model.compute_dtype)
    sums = jax.eval_shape(lambda x: _loss(pipe, jnp.int32(0), x, x[..., : pipe.width], share.outer, one), x)[1]
    zero = jnp.int32(0)
    return Carry(
        _place(pipe, buffers), _zeros(share.chunks.blocks), _zeros(share.outer), _zeros(sums), Counts(zero, zero, zero)
    )


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)


def _place(pipe: Pipeline, buffers: Buffers) -> Buffers:
    """Fixes how buffers lie over context and tensor; saved inputs and cotangents as the products want them, time whole over tensor."""
    place = pipe.layout.place
    letters = pipe.products.letters, pipe.products.inputs
    saved = [
        {site: place(x, WHOLE * 2 + own[site].replace("T", "S")) for site, x in part.items()}
        for part, own in ((buffers.pending.inputs, letters[1]), (buffers.pending.cotangents, letters[0]))
    ]
    activations = (place(x, WHOLE + "BTD") for x in buffers[:3])
    return Buffers(*activations, Saved(*saved))


def _settled(pipe: Pipeline, branch: Callable[[Carry], tuple[Carry, jax.Array]]) -> Any:
    """A branch whose results lie where those of all other branches do: XLA asks for one sharding."""

    def run(carry: Carry) -> tuple[Carry, jax.Array]:
        carry, payload = branch(carry)
        specs = param_specs(pipe.student.model.cfg)
        carry = carry._replace(
            buffers=_place(pipe, carry.buffers),
            d_blocks=_place_gradients(pipe, carry.d_blocks, specs["blocks"]),
            d_outer=_place_gradients(pipe, carry.d_outer, specs),
        )
        return carry, pipe.layout.place(payload, "BTD")

    return run


def _place_gradients(pipe: Pipeline, grads: Any, specs: Tree) -> Any:
    """Gradients over tensor as the parameters are; those of layers have a leading dim more than their specs, [v, n, ...]."""
    letters = {path: spec.letters for path, spec in flatten(specs).items()}

    def leaf(path: str, g: jax.Array) -> jax.Array:
        return pipe.layout.place(g, WHOLE * (g.ndim - len(letters[path])) + letters[path])

    return map_with_path(leaf, grads)


def _tick(pipe: Pipeline, carry: Carry, row: Ticks) -> Carry:
    stages = pipe.program.stages
    t = jax.tree.map(lambda column: column[jax.lax.axis_index(AXIS)], row)
    ops = [_settled(pipe, functools.partial(op, pipe, t)) for op in (_idle, _forward, _backward, _weights)]
    carry, payload = jax.lax.switch(t.op, ops, carry)
    forward = [(s, (s + 1) % stages) for s in range(stages)]
    backward = [(s, (s - 1) % stages) for s in range(stages)]
    arrivals = {
        "left": jax.lax.ppermute(payload, AXIS, forward),
        "right": jax.lax.ppermute(payload, AXIS, backward),
        "local": payload,
    }
    return carry._replace(buffers=_place(pipe, _store(pipe, carry.buffers, arrivals, t)))


def _store(pipe: Pipeline, buffers: Buffers, arrivals: dict[str, jax.Array], t: Ticks) -> Buffers:
    """Puts what arrived where its reader looks for it; what is not for a buffer goes to its spare row, which is the last (-1)."""
    activation, gradient = buffers.activation, buffers.gradient
    for side, payload in arrivals.items():
        kinds = getattr(pipe.program.ticks, f"{side}_buffer")
        buffer, slot = getattr(t, f"{side}_buffer"), getattr(t, f"{side}_slot")
        if (kinds == ACTIVATION).any():
            activation = _put(activation, jnp.where(buffer == ACTIVATION, slot, -1), payload)
        if (kinds == GRADIENT).any():
            gradient = _put(gradient, jnp.where(buffer == GRADIENT, slot, -1), payload[..., : pipe.width])
    return buffers._replace(activation=activation, gradient=gradient)


def _put(buffer: jax.Array, row: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, x.astype(buffer.dtype), row, 0)


def _pick(tree: Any, row: jax.Array) -> Any:
    """Row `row` of every array."""
    return jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, row, 0, False), tree)


def _add(total: Any, row: jax.Array, more: Any) -> Any:
    """Adds to row `row` of those arrays that `more` has."""
    flat = flatten(total)
    for path, x in flatten(more).items():
        old = flat[path]
        flat[path] = old.at[0 if old.shape[0] == 1 else row].add(x.astype(old.dtype))
    return unflatten(flat)


def _idle(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    payload = jnp.zeros_like(carry.buffers.stash[0])
    return carry._replace(counts=carry.counts._replace(idle=carry.counts.idle + 1)), payload


def _forward(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    batch, buffers = _pick(pipe.batch, t.microbatch), carry.buffers

    def embed() -> jax.Array:
        x = _join(pipe, *(_embed(pipe, m, m.share.outer["embed"], batch) for m in _members(pipe)))
        return pipe.layout.place(x, "BTD")

    def received() -> jax.Array:
        return pipe.layout.place(_pick(buffers.activation, t.activation), "BTD")

    x = jax.lax.cond(t.is_first == 1, embed, received)
    xs = _split(pipe, x)
    ys = [
        forward_slice(m.model, _pick(m.share.chunks, t.chunk), x, batch)
        for m, x in zip(_members(pipe), xs, strict=True)
    ]
    live = carry.counts.live + 1
    counts = carry.counts._replace(live=live, peak=jnp.maximum(carry.counts.peak, live))
    stash = _put(buffers.stash, t.stash, x)
    return carry._replace(buffers=buffers._replace(stash=stash), counts=counts), _join(pipe, *ys)


def _backward(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    batch, buffers, share = _pick(pipe.batch, t.microbatch), carry.buffers, pipe.student.share
    stashed = _pick(buffers.stash, t.stash)
    x = _split(pipe, stashed)[0]
    y, backward = tapped_slice(pipe.student.model, pipe.products, _pick(share.chunks, t.chunk), x, batch)

    place = pipe.layout.place
    settle = functools.partial(_place_gradients, pipe, specs=param_specs(pipe.student.model.cfg))

    def last(d_outer: Any, sums: Sums) -> Any:
        loss = functools.partial(_loss, pipe, t.chunk, stashed, batch=batch)
        (d_y, d_more), more = jax.grad(loss, argnums=(0, 1), has_aux=True)(y, share.outer)
        return place(d_y, "BTD"), settle(_sum(d_outer, d_more)), _sum(sums, more)

    def received(d_outer: Any, sums: Sums) -> Any:
        return place(_pick(buffers.gradient, t.gradient), "BTD"), settle(d_outer), sums

    d_y, d_outer, sums = jax.lax.cond(t.is_last == 1, last, received, carry.d_outer, carry.sums)
    d_x, d_others, saved = backward(d_y)

    def embedded(d_outer: Any) -> Any:
        _, pull = jax.vjp(lambda e: _embed(pipe, pipe.student, e, batch), share.outer["embed"])
        return settle({**d_outer, "embed": _sum(d_outer["embed"], pull(d_x)[0])})

    d_outer = jax.lax.cond(t.is_first == 1, embedded, settle, d_outer)
    pending = jax.tree.map(lambda buffer, x: _put(buffer, t.pending, x), buffers.pending, saved)
    return carry._replace(
        buffers=buffers._replace(pending=pending),
        d_blocks=_add(carry.d_blocks, t.chunk, d_others),
        d_outer=d_outer,
        sums=sums,
    ), _join(pipe, d_x)


def _weights(pipe: Pipeline, t: Ticks, carry: Carry) -> tuple[Carry, jax.Array]:
    model, chunk = pipe.student.model, _pick(pipe.student.share.chunks, t.chunk)
    saved = _pick(carry.buffers.pending, t.pending)
    grads = weight_gradients(model, pipe.products, chunk, saved, _pick(pipe.batch, t.microbatch))
    counts = carry.counts._replace(live=carry.counts.live - 1)
    carry = carry._replace(d_blocks=_add(carry.d_blocks, t.chunk, grads), counts=counts)
    return carry, jnp.zeros_like(carry.buffers.stash[0])


def _members(pipe: Pipeline) -> list[Member]:
    return [pipe.student] if pipe.teacher is None else [pipe.student, pipe.teacher]


def _join(pipe: Pipeline, *parts: jax.Array) -> jax.Array:
    """Activations of the student, and of the teacher or zeros, beside each other."""
    if pipe.teacher is None:
        return parts[0]
    if len(parts) == 1:
        parts = (*parts, jnp.zeros((*parts[0].shape[:-1], pipe.teacher.model.cfg.width), parts[0].dtype))
    return jnp.concatenate(parts, -1)


def _split(pipe: Pipeline, x: jax.Array) -> list[jax.Array]:
    return [x] if pipe.teacher is None else [x[..., : pipe.width], x[..., pipe.width :]]


def _sum(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _embed(pipe: Pipeline, member: Member, embed: Any, batch: Batch) -> jax.Array:
    table = cast_floating(embed, member.model.compute_dtype)["table"]
    return embed_tokens(table, batch, member.model.make_ops(plain_einsum)({}).ops, member.model.compute_dtype)


def _loss(
    pipe: Pipeline, chunk: jax.Array, stashed: jax.Array, y_BTD: jax.Array, outer: Any, batch: Batch
) -> tuple[jax.Array, Sums]:
    """The objective of a microbatch from the output of the student's last slice and what entered it."""
    teacher = None
    if pipe.teacher is not None:
        model, share = pipe.teacher
        y = forward_slice(model, _pick(share.chunks, chunk), _split(pipe, stashed)[1], batch)
        teacher = jax.lax.stop_gradient(_output(pipe.teacher, y, share.outer))
    return pipe.loss(_output(pipe.student, y_BTD, outer), teacher, batch)


def _output(member: Member, y_BTD: jax.Array, outer: Any) -> Output:
    model, share = member
    seen = cast_floating(outer, model.compute_dtype)
    hidden_BTD = last_hidden(y_BTD, seen["final_norm"], model.cfg, model.output_dtype)
    head = seen["embed"]["table"] if model.cfg.tied else seen["head"]["w"]
    return Output(hidden_BTD, head, share.ranges, {})
