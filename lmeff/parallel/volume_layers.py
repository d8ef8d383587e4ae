"""Rows of `parallel/volume.py`: activations over tensor and fsdp, from the embedding through the layers to the loss, and over pipe."""

from collections.abc import Iterator

import jax.numpy as jnp

from lmeff.parallel.members import PIPE, Member
from lmeff.parallel.mesh import ZERO_AXIS
from lmeff.parallel.stages import exchange, layer_table
from lmeff.parallel.volume_term import PARTIAL, Term, order
from lmeff.parallel.volume_weights import exchanges_rows
from lmeff.parallel.workload import CONTEXT, EXPERT, TENSOR, Step


def embedding(step: Step) -> Iterator[Term]:
    """Rows of the table: over fsdp by an all-to-all of what every device found of its columns, after a gather of the ids, which all models share; over
    tensor summed and scattered over T."""
    dtype, runs = step.policy.compute, step.accumulate * step.first
    if exchanges_rows(step):
        yield Term("all-gather", (ZERO_AXIS,), step.tokens_here * step.degrees[ZERO_AXIS], jnp.int32)
    for member in step.members:
        rows = step.tokens_here * member.cfg.width
        back = exchanges_rows(step) and member.trained
        forth = exchanges_rows(step) and step.plan.zero == 3  # of stage 2 only the gradient
        forth |= not step.region and member.trained and step.stored is not step.leaves
        yield Term("all-to-all", (ZERO_AXIS,), rows, dtype, forth + back)
        yield Term("reduce-scatter", (TENSOR,), rows, dtype, runs, loop="microbatch")
        yield Term("all-gather", (TENSOR,), rows, dtype, runs * member.trained, loop="microbatch")


def layers(step: Step) -> Iterator[Term]:
    """Tensor parallelism in the blocks: T is gathered on the way into a sublayer and sums are scattered over T on its way out, and the other way round
    in the backward pass, where each product of a sublayer's input (q, k, v; up, gate) has its own sum.

    Routed experts scatter their sum themselves and have one sum of all that enters them, both in the dtype that they compute in.
    """
    for member in step.members:
        cfg, dense = member.cfg, member.cfg.moe is None or member.cfg.moe.shared > 0
        unit, again = step.tokens_here * cfg.width, member.again
        for_weights = (1 + dense) * (step.schedule is not None or _cut_inside(step))
        routed = cfg.moe is not None
        inputs = 3 + (1 + cfg.gated) * dense
        gathers = 2 * member.forward + (1 + dense + routed + again.gathers + for_weights) * member.backward
        sums = (1 + dense) * member.forward + (inputs + again.reductions) * member.backward
        yield Term("all-gather", (TENSOR,), unit, step.policy.compute, gathers, loop="layer")
        yield Term("reduce-scatter", (TENSOR,), unit, PARTIAL, sums, placed=True, loop="layer")
        if (
            cfg.qk_norm == "width"
        ):  # the mean squares of queries and of keys, a number a token each, and their gradients
            runs = member.forward + (1 + again.any) * member.backward
            yield Term("all-reduce", (TENSOR,), step.tokens_here, jnp.float32, 2 * runs, loop="layer")
        if cfg.moe is not None:
            yield Term("reduce-scatter", (TENSOR,), unit, step.policy.compute, member.forward, loop="layer")
            yield Term(
                "reduce-scatter", (TENSOR,), unit, step.policy.compute, member.backward, placed=True, loop="layer"
            )
            yield from _gates(step, member, cfg.moe.top_k * (step.degrees[EXPERT] if cfg.moe.capacity is None else 1))


def _cut_inside(step: Step) -> bool:
    """Whether XLA gathers the cotangents of the sublayers' outputs again for the gradients of weights: W of a pipeline does, and in a `jax.shard_map`
    whatever still cuts tokens beside tensor."""
    inside = (CONTEXT,) if step.region else (*step.batch, CONTEXT)
    return step.nested and step.layout.size(inside) > 1


def _gates(step: Step, member: Member, copies: int) -> Iterator[Term]:
    """Gradients of the weights of a token's experts: each device's is a part of the sum. In a `jax.shard_map` it is the router's (`inner_gradients`)."""
    if not step.nested:
        elements = step.tokens_here * copies
        yield Term("all-reduce", (TENSOR,), elements, jnp.float32, member.backward, loop="layer")


def loss(step: Step) -> Iterator[Term]:
    """The vocabulary cut over tensor: hidden states gathered, the student's gradients summed, and numbers of each token (`_numbers`)."""
    if not step.last:
        return
    for member in step.members:
        hidden = step.tokens_here * member.cfg.width
        yield Term("all-gather", (TENSOR,), hidden, step.policy.output, step.accumulate, loop="microbatch")
    summed = Term("reduce-scatter", (TENSOR,), step.activation, step.policy.output, placed=True, loop="microbatch")
    yield summed._replace(times=step.accumulate)
    if step.turns_head:
        yield from _gathered_rows(step, step.tokens_here * step.degrees[ZERO_AXIS])
    else:
        tokens = step.tokens_here
        padded = -(-tokens // min(step.chunk, tokens)) * min(step.chunk, tokens)
        times = step.accumulate * _numbers(step)[0]
        yield Term("all-reduce", (TENSOR,), padded, jnp.float32, times, loop="microbatch")


def _numbers(step: Step) -> tuple[int, int]:
    """How many numbers of each token are added up over the vocabulary, and how many gradients of such sums over the rows' devices alone: in a
    `jax.shard_map` that does not check, over the vocabulary too.

    The largest logit, the sum of exponentials, the target's logit, and gradients; with a teacher twice the first two at a temperature and theirs,
    and the divergence.
    """
    over_both, over_rows = (4, 1) if step.teacher is None else (10, 2)
    return (over_both + over_rows, 0) if step.nested else (over_both, over_rows)


def _gathered_rows(step: Step, rows: int) -> Iterator[Term]:
    """The vocabulary cut over fsdp too: hidden states, targets and weights of its devices gathered chunk by chunk, the student's gradient scattered back."""
    both = order(axis for axis in (ZERO_AXIS, TENSOR) if step.degrees[axis] > 1)
    for member in step.members:
        yield Term("all-gather", (ZERO_AXIS,), rows * member.cfg.width, step.policy.output)
    yield Term("reduce-scatter", (ZERO_AXIS,), rows * step.cfg.width, step.policy.output)
    yield Term("all-gather", (ZERO_AXIS,), rows, jnp.int32)
    yield Term("all-gather", (ZERO_AXIS,), rows, jnp.float32)
    over_both, over_rows = _numbers(step)
    yield Term("all-reduce", both, rows, jnp.float32, over_both)
    yield Term("all-reduce", (ZERO_AXIS,), rows, jnp.float32, over_rows)


def pipeline(step: Step) -> Iterator[Term]:
    """Two permutes of the payload, all models' beside each other, in every tick (of two stages, XLA for TPUs may make one); layers of several chunks are
    brought to their stages and the student's gradients back."""
    if step.schedule is None:
        return
    payload = step.tokens_here * sum(cfg.width for cfg in step.models) / step.degrees[TENSOR]
    yield Term("collective-permute", (PIPE,), payload, step.policy.compute, 2 * step.schedule.ticks, loop="tick")
    for member in step.members:
        found = exchange(layer_table(step.schedule, member.cfg.layers), member.cfg.layers)
        for leaf in member.leaves:
            if PIPE in leaf.axes:
                for kind, count in found[: 1 + member.trained]:
                    yield Term(kind, (PIPE,), leaf.elements / leaf.layers * count, step.policy.params)
