"""Rows of `parallel/volume.py`: weights made whole over fsdp, and gradients summed over everything that cuts rows and tokens."""

from collections.abc import Iterator

import jax.numpy as jnp

from lmeff.parallel.members import EMBEDDING, POSITIONS, Leaf, leaves_of
from lmeff.parallel.mesh import ZERO_AXIS
from lmeff.parallel.volume_reduced import reduced
from lmeff.parallel.volume_term import PARTIAL, Term, order
from lmeff.parallel.workload import CONTEXT, EXPERT, TENSOR, Step

SUMMED = ("/o_bias", "/down_bias")


def weights(step: Step) -> Iterator[Term]:
    """Parameters made whole over fsdp: once in a region, else for the forward and again for the backward pass of each layer.

    The head turns, and its gradient turns back (`Step.turns_head`), or it is gathered once. Of the embedding, rows are looked up (`embedding`). A
    teacher has no backward pass.
    """
    for member in step.members:
        for leaf in step.stored if member.trained else member.leaves:
            if ZERO_AXIS not in leaf.axes:
                continue
            if step.region:
                yield Term("all-gather", (ZERO_AXIS,), leaf.elements, step.policy.params)
            elif member.is_head(leaf) and step.turns_head:
                part = leaf.elements / step.degrees[ZERO_AXIS]
                yield Term("all-to-all", (ZERO_AXIS,), part, step.policy.compute, 1 + member.trained)
            elif member.is_head(leaf) or leaf.path != EMBEDDING:
                times = 1 if member.is_head(leaf) or not member.trained else _gathers(step, leaf)
                dtype = step.policy.params if leaf.is_router else step.policy.compute
                yield _by_layer(leaf, Term("all-gather", (ZERO_AXIS,), leaf.elements, dtype, times))


def _gathers(step: Step, leaf: Leaf) -> int:
    """How often a layer's weight is gathered in a forward and a backward pass.

    What the layer of experts gathers itself is kept for the backward pass, unless it is run again, and no gradient needs what is only added (biases,
    positions). With rematerialisation XLA gathers a norm's scale a third time, and beside tensor parallelism an output matrix whose product is computed
    again; nothing after the ffn's product is computed again but for a norm's gradient.
    """
    again, name = step.student.again, leaf.path.rsplit("/", 1)[-1]
    last = leaf.path.startswith("blocks/mlp_post_norm/") or (name == "down_bias" and step.cfg.norm_at == "pre")
    rerun = again.any and leaf.in_block
    if leaf.routed or leaf.path == POSITIONS or name == "bias" or name.endswith("_bias"):
        return 1 + (rerun and not last)
    third = rerun and not last and not leaf.is_matmul
    return 3 if third or (name in again.outputs and TENSOR in leaf.axes) else 2


def updates(step: Step) -> Iterator[Term]:
    """Stages 1 and 2 of ZeRO: each device updates its part of the parameters, and all parts are gathered; of workers apart also what they share, the
    outer parameters and their momentum, whether they meet or not."""
    if step.plan.zero in (1, 2):
        for leaf in leaves_of(step.cfg, step.layout.of_optimizer):
            if ZERO_AXIS in leaf.axes:
                yield Term("all-gather", (ZERO_AXIS,), leaf.elements, step.policy.params)
                yield Term("all-gather", (ZERO_AXIS,), leaf.elements, PARTIAL, 2 * (step.local is not None))


def gradients(step: Step) -> Iterator[Term]:
    """Gradients summed over the axes of rows, and over pipe where every stage has a parameter. What is cut over fsdp is scattered there, and its part
    summed over the others.

    Automatic: stages 2 and 3 of ZeRO scatter, stage 1 sums whole; vectors, and the head, whose gradient the loss sums itself, are never scattered. In a
    region only stage 3 scatters, or what crosses is compressed.
    """
    for leaf in step.leaves:
        if step.region:
            yield from reduced(step, leaf)
        elif leaf.path == EMBEDDING:
            yield from _table_gradient(step, leaf)
        elif step.student.is_head(leaf):
            yield _head_gradient(step, leaf)
        else:
            yield from (_by_layer(leaf, term) for term in _placed_gradient(step, leaf))


def _placed_gradient(step: Step, leaf: Leaf) -> Iterator[Term]:
    """Of a leaf in an automatic step, all layers. What is scattered is summed over context together with what is left, else apart (`_of_block`).

    XLA for TPUs scatters sums as they are, float32, and makes an all-reduce in the dtype that the sum is rounded to.
    """
    if leaf.routed:
        yield from _routed_gradient(step, leaf)
    elif scatters(step, leaf):
        left = {axis for axis in step.batch if axis != ZERO_AXIS}
        yield Term("reduce-scatter", (ZERO_AXIS,), leaf.elements, PARTIAL, placed=True)
        yield Term("all-reduce", order({*left, CONTEXT}), leaf.elements / step.degrees[ZERO_AXIS], step.policy.compute)
    else:
        yield Term("all-reduce", step.batch, leaf.elements, step.policy.compute)


def _routed_gradient(step: Step, leaf: Leaf) -> Iterator[Term]:
    """The layer of experts sums its own, over context too, in the dtype that it computes in: where weights are used, so whole (a router with all experts'
    columns), and only then scattered."""
    dtype = step.policy.params if leaf.is_router else step.policy.compute
    columns = step.degrees[EXPERT] if leaf.is_router else 1
    left = {axis for axis in step.batch if axis not in leaf.axes}
    yield Term("all-reduce", order({*left, CONTEXT}), leaf.elements * columns, dtype)
    if scatters(step, leaf):
        yield Term("reduce-scatter", (ZERO_AXIS,), leaf.elements, dtype)


def scatters(step: Step, leaf: Leaf) -> bool:
    """Whether an automatic step cuts a gradient over fsdp as it is summed there."""
    if ZERO_AXIS not in step.batch or not leaf.is_matmul:
        return False
    return ZERO_AXIS in leaf.axes if leaf.routed else step.plan.zero >= 2


def _by_layer(leaf: Leaf, term: Term) -> Term:
    """A term of all layers as that of each."""
    if not leaf.in_block:
        return term
    return term._replace(elements=term.elements / leaf.layers, times=term.times * leaf.layers, loop="layer")


def _table_gradient(step: Step, leaf: Leaf) -> Iterator[Term]:
    """Of the embedding's table. Its rows come to where they are summed (`embedding`) as they went; a tied head adds its own."""
    left = {axis for axis in step.batch if axis != ZERO_AXIS or not exchanges_rows(step)}
    part = leaf.elements / (step.degrees[ZERO_AXIS] if exchanges_rows(step) else 1)
    if step.layout.axes("VD"):
        yield Term("all-reduce", order({*left, CONTEXT}), part, step.policy.compute)
    elif step.nested:
        yield from gathered_rows(step, order({*left, CONTEXT}))
    else:
        yield Term("all-reduce", order(left), part, step.policy.compute)
        yield Term("all-reduce", (CONTEXT,), part, step.policy.compute)
    if step.student.is_head(leaf):
        yield _head_gradient(step, leaf)


def gathered_rows(step: Step, axes: tuple[str, ...]) -> Iterator[Term]:
    """Inside a `jax.shard_map` XLA does not sum a whole table that it scatters rows into: it gathers the rows and their ids."""
    tokens = step.tokens_here * step.layout.size(axes)
    runs = step.accumulate * step.first
    yield Term("all-gather", axes, tokens * step.cfg.width, step.policy.compute, runs, loop="microbatch")
    yield Term("all-gather", axes, tokens, jnp.int32, runs, loop="microbatch")


def _head_gradient(step: Step, leaf: Leaf) -> Term:
    """Summed by the loss, of this device's part of the vocabulary."""
    left = order(axis for axis in (*step.batch, CONTEXT) if axis != ZERO_AXIS or not step.turns_head)
    part = leaf.elements / (step.degrees[ZERO_AXIS] if step.turns_head else 1)
    return Term("all-reduce", left, part, step.policy.compute)


def exchanges_rows(step: Step) -> bool:
    """Whether rows of the embedding travel over fsdp: in an automatic step whose table is cut over D, or only its gradient is (stage 2)."""
    cut_gradient = step.plan.zero == 2 and step.degrees[TENSOR] == 1 and step.batch == (ZERO_AXIS,)
    return not step.region and step.degrees[ZERO_AXIS] > 1 and (step.plan.zero == 3 or cut_gradient)


def inner_gradients(step: Step) -> Iterator[Term]:
    """What context and tensor leave to be summed of gradients, in every microbatch: of a scale or bias that tensor does not cut each device has seen a
    part of T, of anything each part of the context its tokens. Biases of sums over tensor have seen all of T: their gradient is gathered anyway.
    """
    for leaf in step.leaves:
        if leaf.in_block:
            yield from _of_block(step, leaf)
            # On the way back from a stage, though it is summed already.
            if step.schedule is not None and TENSOR in leaf.axes:
                yield Term("all-reduce", (CONTEXT,), leaf.elements, step.policy.params)
        elif leaf.path.startswith("final_norm"):
            runs = step.accumulate * step.last
            axes = (CONTEXT,) if leaf.path.endswith("/bias") else (CONTEXT, TENSOR)
            yield Term("all-reduce", axes, leaf.elements, step.policy.output, runs, loop="microbatch")
        elif leaf.path == POSITIONS:
            yield from _of_positions(step, leaf)
        elif step.region:
            yield from _of_ends(step, leaf)


def _of_block(step: Step, leaf: Leaf) -> Iterator[Term]:
    """Of one layer."""
    size, times = leaf.elements / leaf.layers, step.student.backward
    over_tensor = () if TENSOR in leaf.axes else (TENSOR,)
    compute = step.policy.params if leaf.is_router else step.policy.compute
    if leaf.routed:
        if step.nested:
            yield Term("all-reduce", (CONTEXT, *over_tensor), size, compute, times, loop="layer")
    elif leaf.is_matmul:
        if step.region or not scatters(step, leaf):
            yield Term("all-reduce", (CONTEXT,), size, compute, times, loop="layer")
    elif leaf.path.endswith(SUMMED):
        yield Term("all-reduce", (CONTEXT,), size, compute, times, loop="layer")
    elif leaf.spec.letters.endswith("D"):
        yield Term("all-reduce", (CONTEXT, *over_tensor), size, compute, times, loop="layer")
    else:
        for axes in ((CONTEXT,), over_tensor):
            yield Term("all-reduce", axes, size, compute, times, loop="layer")


def _of_positions(step: Step, leaf: Leaf) -> Iterator[Term]:
    """Of the table of positions, whose rows are added to a part of T: summed, or inside a `jax.shard_map` gathered with their ids (`gathered_rows`)."""
    axes, runs = (CONTEXT, TENSOR), step.accumulate * step.first
    if not step.nested:
        yield Term("all-reduce", axes, leaf.elements, step.policy.compute, runs, loop="microbatch")
        return
    tokens = step.tokens_here * step.degrees[CONTEXT]
    yield Term("all-gather", axes, tokens * step.cfg.width, step.policy.compute, runs, loop="microbatch")
    yield Term("all-gather", axes, tokens, jnp.int32, runs, loop="microbatch")


def _of_ends(step: Step, leaf: Leaf) -> Iterator[Term]:
    """Of the table and the head in a region, whose microbatches each sum over context; an automatic step does it with the rows (`gradients`)."""
    if leaf.path == EMBEDDING:
        if step.layout.axes("V") or not step.nested:
            runs = step.accumulate * step.first
            yield Term("all-reduce", (CONTEXT,), leaf.elements, step.policy.compute, runs, loop="microbatch")
        elif step.degrees[CONTEXT] > 1:
            yield from gathered_rows(step, (CONTEXT,))
    if step.student.is_head(leaf):
        runs = step.accumulate * step.last
        yield Term("all-reduce", (CONTEXT,), leaf.elements, step.policy.compute, runs, loop="microbatch")
