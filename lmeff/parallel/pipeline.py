"""The pipeline executor: one scan over the ticks of any schedule, inside a region manual over pipe.

In a tick every stage does its own op (`jax.lax.switch`), then two collective permutes move what was made to the neighbours. The first slice also
embeds its tokens, the last one also computes the loss: neither exists on the other stages. Weights, context and tensor parallelism inside a stage
are as everywhere. A teacher's slices ride along: its activations travel beside the student's.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.core.ops import plain_einsum
from lmeff.core.tree import Tree, flatten, map_with_path
from lmeff.models.transformer import Output, cast_floating, embed_tokens, last_hidden, param_specs
from lmeff.parallel.mesh import WHOLE, Layout
from lmeff.parallel.program import ACTIVATION, GRADIENT, Program, Ticks
from lmeff.parallel.slices import Products, Saved, Slice, SliceModel, products_of
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


class Losses(NamedTuple):
    """What a pipeline minimizes, each `-> (objective, sums)`.

    last:   `(student output, teacher output, microbatch)`, after the last slice.
    layers: `{name: [n, B]}`, linear in what layers kept for the objective; it is part of the sum on every stage.
    """

    last: Callable[[Output, Output | None, Batch], tuple[jax.Array, Sums]]
    layers: Callable[[Sums], tuple[jax.Array, Sums]]


class Pipeline(NamedTuple):
    """What does not change from tick to tick.

    losses: what is minimized.
    batch:  [m, rows, T].
    """

    program: Program
    layout: Layout
    student: Member
    teacher: Member | None
    losses: Losses
    batch: Batch
    products: Products

    @property
    def members(self) -> list[Member]:
        """The student, and the teacher where there is one."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    @property
    def width(self) -> int:
        """Of the student's activations."""
        return self.student.model.cfg.width

    def join(self, *parts: jax.Array) -> jax.Array:
        """Activations of the student, and of the teacher or zeros, beside each other."""
        missing = [m.model.cfg.width for m in self.members[len(parts) :]]
        zeros = [jnp.zeros((*parts[0].shape[:-1], width), parts[0].dtype) for width in missing]
        return jnp.concatenate([*parts, *zeros], -1) if len(self.members) > 1 else parts[0]

    def split(self, x: jax.Array) -> list[jax.Array]:
        """The inverse, one activation for each member."""
        return [x] if self.teacher is None else [x[..., : self.width], x[..., self.width :]]


class Buffers(NamedTuple):
    """What waits on a stage, every array [rows + 1 spare, ...]; `SlotCounts` says the rows.

    activation, gradient: what arrived. stash: what F leaves for B (and W). pending: what B leaves for W.
    """

    activation: jax.Array
    gradient: jax.Array
    stash: Any
    pending: Any


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


Branch = Callable[[Pipeline, Ticks, Carry], tuple[Carry, jax.Array]]


class Stash(NamedTuple):
    """What a stage keeps from F on.

    branches: idle, F, B and W.
    until:    the op that reads a stash for the last time.
    shapes:   `pipeline -> (stash, pending)` of one microbatch, as `jax.ShapeDtypeStruct`s.
    """

    branches: tuple[Branch, Branch, Branch, Branch]
    until: Any
    shapes: Callable[[Pipeline], tuple[Any, Any]]


def run_pipeline(
    program: Program,
    stash: Stash,
    layout: Layout,
    student: Member,
    teacher: Member | None,
    losses: Losses,
    batch: Batch,
) -> tuple[Any, Any, Sums, Counts]:
    """Gradients of this stage's layers [v, n, ...] and of the outer parameters, sums, and counts; `batch` is [m, rows, T].

    Runs inside a region over pipe and the batch axes. What only one stage has is zero on the others: the caller adds up over pipe.
    """
    x = jax.ShapeDtypeStruct((*batch.tokens.shape[1:], student.model.cfg.width), student.model.compute_dtype)
    products = products_of(student.model, _shapes(student.share.chunks, 2), x, _shapes(batch, 1))
    pipe = Pipeline(program, layout, student, teacher, losses, batch, products)
    tick = functools.partial(_tick, pipe, stash)
    carry, _ = jax.lax.scan(
        lambda c, t: (tick(c, t), None), _start(pipe, stash), jax.tree.map(jnp.asarray, program.ticks)
    )
    return carry.d_blocks, carry.d_outer, carry.sums, carry.counts


def _shapes(tree: Any, dims: int) -> Any:
    """Shapes without so many leading dims."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[dims:], x.dtype), tree)


def _start(pipe: Pipeline, stash: Stash) -> Carry:
    share, slots = pipe.student.share, pipe.program.slots
    x = activation_shape(pipe)
    stashed, pending = stash.shapes(pipe)
    gradient = jax.ShapeDtypeStruct((*x.shape[:-1], pipe.width), x.dtype)
    kinds = zip(
        (x, gradient, stashed, pending), (slots.activation, slots.gradient, slots.stash, slots.pending), strict=True
    )
    buffers = Buffers(*(jax.tree.map(lambda s, n=n: jnp.zeros((n + 1, *s.shape), s.dtype), kind) for kind, n in kinds))

    def loss(x: jax.Array) -> Any:
        y, *others = pipe.split(x)
        return last_loss(pipe, y, others, share.outer, jax.tree.map(lambda a: a[0], pipe.batch))

    sums = jax.eval_shape(loss, x)[1] | jax.eval_shape(pipe.losses.layers, pipe.products.sums)[1]
    zero = jnp.int32(0)
    grads = (_zeros(share.chunks.blocks), _zeros(share.outer))
    return Carry(_place_buffers(pipe, buffers), *grads, _zeros(sums), Counts(zero, zero, zero))


def activation_shape(pipe: Pipeline) -> jax.ShapeDtypeStruct:
    """Of what travels between stages: [rows, T, D] of all members beside each other."""
    width = sum(m.model.cfg.width for m in pipe.members)
    return jax.ShapeDtypeStruct((*pipe.batch.tokens.shape[1:], width), pipe.student.model.compute_dtype)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)


def _tick(pipe: Pipeline, stash: Stash, carry: Carry, row: Ticks) -> Carry:
    stages = pipe.program.stages
    t = jax.tree.map(lambda column: column[jax.lax.axis_index(AXIS)], row)
    branches = [_settled(pipe, functools.partial(branch, pipe, t)) for branch in stash.branches]
    carry, payload = jax.lax.switch(t.op, branches, carry)
    left = jax.lax.ppermute(payload, AXIS, [(s, (s + 1) % stages) for s in range(stages)])
    right = jax.lax.ppermute(pipe.layout.after(payload, left), AXIS, [(s, (s - 1) % stages) for s in range(stages)])
    arrivals = {"left": left, "right": right, "local": payload}
    return carry._replace(buffers=_place_buffers(pipe, _store(pipe, carry.buffers, arrivals, t)))


def _settled(pipe: Pipeline, branch: Callable[[Carry], tuple[Carry, jax.Array]]) -> Any:
    """A branch whose results lie where those of all other branches do: XLA asks for one sharding."""

    def run(carry: Carry) -> tuple[Carry, jax.Array]:
        carry, payload = branch(carry)
        specs = param_specs(pipe.student.model.cfg)
        carry = carry._replace(
            buffers=_place_buffers(pipe, carry.buffers),
            d_blocks=place_gradients(pipe.layout, carry.d_blocks, specs["blocks"]),
            d_outer=place_gradients(pipe.layout, carry.d_outer, specs),
        )
        return carry, pipe.layout.place(payload, "BTD")

    return run


def place_gradients(layout: Layout, grads: Any, specs: Tree) -> Any:
    """Gradients over tensor as the parameters are; those of layers have a leading dim more than their specs, [v, n, ...]."""
    letters = {path: spec.letters for path, spec in flatten(specs).items()}
    return map_with_path(lambda path, g: layout.place(g, WHOLE * (g.ndim - len(letters[path])) + letters[path]), grads)


def _place_buffers(pipe: Pipeline, buffers: Buffers) -> Buffers:
    """Fixes how buffers lie over context and tensor."""
    place = pipe.layout.place
    return Buffers(
        place(buffers.activation, WHOLE + "BTD"),
        place(buffers.gradient, WHOLE + "BTD"),
        place_saved(pipe, buffers.stash, WHOLE),
        place_saved(pipe, buffers.pending, WHOLE),
    )


def place_saved(pipe: Pipeline, values: Any, rows: str = "") -> Any:
    """Fixes how what F and B leave lies: of one microbatch before it is put into a buffer, lest XLA gather all rows of the buffer, or of all `rows`.

    What products save is told by its shape, [n, ...] of a product's; time is whole over tensor. Residuals stay as the forward pass has them: activations
    cut over T, of the rest XLA knows.
    """
    known, lead, place = pipe.products.letters_by_shape, len(rows), pipe.layout.place
    activation = activation_shape(pipe).shape
    own = (*activation[:-1], pipe.width)

    def leaf(x: jax.Array) -> jax.Array:
        if x.shape[lead:] == activation:
            return place(x, rows + "BTD")
        letters = known.get(x.shape[lead + 1 :])
        return place(x, WHOLE * x.ndim if letters is None else rows + WHOLE + letters.replace("T", "S"))

    def residual(x: jax.Array) -> jax.Array:
        return place(x, rows + WHOLE + "BTD") if x.shape[lead + 1 :] == own else x

    def node(x: Any) -> Any:
        return (
            Saved(list(map(residual, x.residuals)), jax.tree.map(leaf, x.inputs)) if isinstance(x, Saved) else leaf(x)
        )

    return jax.tree.map(node, values, is_leaf=lambda x: isinstance(x, Saved))


def _store(pipe: Pipeline, buffers: Buffers, arrivals: dict[str, jax.Array], t: Ticks) -> Buffers:
    """Puts what arrived where its reader looks for it; what is not for a buffer goes to its spare row, which is the last (-1)."""
    activation, gradient = buffers.activation, buffers.gradient
    for side, payload in arrivals.items():
        kinds = getattr(pipe.program.ticks, f"{side}_buffer")
        buffer, slot = getattr(t, f"{side}_buffer"), getattr(t, f"{side}_slot")
        if (kinds == ACTIVATION).any():
            activation = put(activation, jnp.where(buffer == ACTIVATION, slot, -1), payload)
        if (kinds == GRADIENT).any():
            gradient = put(gradient, jnp.where(buffer == GRADIENT, slot, -1), payload[..., : pipe.width])
    return buffers._replace(activation=activation, gradient=gradient)


def put(buffers: Any, row: Any, values: Any) -> Any:
    """Writes row `row` of every array."""
    write = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda buffer, x: write(buffer, x.astype(buffer.dtype), row, 0), buffers, values)


def pick(tree: Any, row: Any) -> Any:
    """Row `row` of every array."""
    return jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, row, 0, False), tree)


def embed(member: Member, embedding: Any, batch: Batch) -> jax.Array:
    """What enters a model's first slice."""
    model = member.model
    own = cast_floating(embedding, model.compute_dtype)
    return embed_tokens(own, batch, model.cfg, model.make_ops(plain_einsum)({}).ops, model.compute_dtype)


def last_loss(pipe: Pipeline, y_BTD: jax.Array, teacher_BTD: list[jax.Array], outer: Any, batch: Batch) -> Any:
    """The objective and sums of a microbatch from what leaves the last slices; `outer` is the student's."""
    teacher = None
    if pipe.teacher is not None:
        teacher = jax.lax.stop_gradient(_output(pipe.teacher, teacher_BTD[0], pipe.teacher.share.outer))
    return pipe.losses.last(_output(pipe.student, y_BTD, outer), teacher, batch)


def _output(member: Member, y_BTD: jax.Array, outer: Any) -> Output:
    model, share = member
    seen = cast_floating(outer, model.compute_dtype)
    hidden_BTD = last_hidden(y_BTD, seen["final_norm"], model.cfg, model.output_dtype)
    head = seen["embed"]["table"] if model.cfg.tied else seen["head"]["w"]
    return Output(hidden_BTD, head, share.ranges, {})
