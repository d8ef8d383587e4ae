"""Rows of `parallel/volume.py`: tokens and experts that meet (`parallel/experts.py`)."""

from collections.abc import Iterator

import jax.numpy as jnp

from lmeff.models.config import MoE
from lmeff.models.moe import row_capacity
from lmeff.parallel.members import Member
from lmeff.parallel.volume_term import Term
from lmeff.parallel.workload import CONTEXT, EXPERT, Step


def experts(step: Step) -> Iterator[Term]:
    """What layers of experts send over the expert axis, and the sums over a row's parts over context.

    Whatever rematerialisation keeps, what enters the experts is exchanged again. Routers are whole, in the dtype of the parameters.
    """
    for member in step.members:
        moe = member.cfg.moe
        if moe is None:
            continue
        forward = member.forward + member.backward * member.again.any
        found = [*_router(step, member, moe, forward)]
        found += (_dropless if moe.capacity is None else _with_capacity)(step, member, moe, forward)
        yield from (term._replace(loop="layer") for term in found)
        yield from _row_sums(step, member, moe, forward)


def _router(step: Step, member: Member, moe: MoE, forward: float) -> Iterator[Term]:
    """Of all experts' columns each device holds its own experts'."""
    columns = member.cfg.width * moe.experts
    yield Term("all-gather", (EXPERT,), columns, step.policy.params, forward)
    yield Term("reduce-scatter", (EXPERT,), columns, step.policy.params, member.backward)


def _dropless(step: Step, member: Member, moe: MoE, forward: float) -> Iterator[Term]:
    """Tokens, their choices and weights to all; sums of results back; gradients the other way."""
    tokens, dtype = step.tokens_here * step.degrees[EXPERT], step.policy.compute
    rows, choices = tokens * member.cfg.width, tokens * moe.top_k
    yield Term("all-gather", (EXPERT,), rows, dtype, forward + member.backward)
    yield Term("reduce-scatter", (EXPERT,), rows, dtype, member.forward + member.backward)
    for kind in (jnp.int32, jnp.float32):
        yield Term("all-gather", (EXPERT,), choices, kind, forward)
    yield Term("reduce-scatter", (EXPERT,), choices, jnp.float32, member.backward)


def _with_capacity(step: Step, member: Member, moe: MoE, forward: float) -> Iterator[Term]:
    """Buffers of a fixed shape there and back."""
    room = min(row_capacity(moe, step.tokens), step.tokens // step.degrees[CONTEXT])
    slots = moe.experts * step.rows_here * room
    yield Term("all-to-all", (EXPERT,), slots * member.cfg.width, step.policy.compute, 2 * (forward + member.backward))


def _row_sums(step: Step, member: Member, moe: MoE, forward: float) -> Iterator[Term]:
    """Of rows cut over context: how many tokens each expert got, and what the objective sums (`models.moe`); with a capacity who chose what, in order.

    In a `jax.shard_map` the gradients of what the objective sums are added up, too. A row's tokens and targets, and positions, are the same in all layers.
    """
    rows, row = step.rows_here, step.tokens_here * step.degrees[CONTEXT]
    limited = moe.capacity is not None
    sums = (2 + limited) * member.forward + (2 * member.backward if step.nested else 0)
    yield Term("all-reduce", (CONTEXT,), rows * moe.experts, jnp.int32, forward, loop="layer")
    yield Term("all-reduce", (CONTEXT,), rows, jnp.float32, sums, loop="layer")
    yield Term("all-reduce", (CONTEXT,), rows, jnp.int32, 2 * step.accumulate, loop="microbatch")
    if limited:
        yield Term("all-gather", (CONTEXT,), row * moe.top_k, jnp.int32, forward, loop="layer")
        yield Term("all-gather", (CONTEXT,), row, jnp.int32, step.accumulate, loop="microbatch")
