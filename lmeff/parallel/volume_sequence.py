"""Rows of `parallel/volume.py`: attention over rows that are cut over the context axis (`parallel/context.py`)."""

import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from lmeff.parallel.members import Member
from lmeff.parallel.order import CHUNKS, reach
from lmeff.parallel.volume_term import Term
from lmeff.parallel.workload import CONTEXT, TENSOR, Step


def sequence(step: Step) -> Iterator[Term]:
    """Keys, or heads, of every layer; and the documents of a row, which all layers share: once a microbatch, in a pipeline in each F and each B."""
    if step.degrees[CONTEXT] == 1:
        return
    runs = step.accumulate if step.schedule is None else 2 * step.accumulate * step.schedule.chunks
    yield Term("all-gather", (CONTEXT,), step.tokens_here * step.degrees[CONTEXT], jnp.int32, runs, loop="microbatch")
    for member in step.members:
        for term in FORMS[step.plan.sequence](step, member):
            yield term._replace(loop="layer")


def _ring(step: Step, member: Member) -> Iterator[Term]:
    """Keys and values go round once forward and once backward, there with their float32 gradients one step behind. Where the forward pass is run again
    its first send is also the backward pass's, and XLA does it once."""
    devices, chunks = step.degrees[CONTEXT], CHUNKS["ring"]
    window = None if member.cfg.mixed else member.cfg.window
    behind, ahead = reach(devices, chunks, step.tokens // devices // chunks, window)
    keys, dtype = _keys(step, member), step.policy.compute
    again = (behind + ahead - (behind > 0)) * member.again.attention
    times = (behind + ahead) * (member.forward + member.backward) + again * member.backward
    yield Term("collective-permute", (CONTEXT,), keys, dtype, times)
    yield Term("collective-permute", (CONTEXT,), keys, jnp.float32, (behind + ahead) * member.backward)


def _keys(step: Step, member: Member) -> int:
    """Elements of a device's keys and values of its tokens."""
    return 2 * step.tokens_here * (member.cfg.kv_heads // step.degrees[TENSOR]) * member.cfg.head_size


def _gather(step: Step, member: Member) -> Iterator[Term]:
    """All keys and values forward and backward, and their float32 gradients scattered. A forward pass that is run again beside the backward pass shares
    its gather: that of rematerialisation, and of a pipeline's slice of one layer."""
    whole = _keys(step, member) * step.degrees[CONTEXT]
    shared = member.slice == 1 and member.forward > member.backward > 0
    times = member.forward + member.backward * (not shared)
    yield Term("all-gather", (CONTEXT,), whole, step.policy.compute, times)
    yield Term("reduce-scatter", (CONTEXT,), whole, jnp.float32, member.backward)


def _ulysses(step: Step, member: Member) -> Iterator[Term]:
    """Heads for tokens and back, and again in the backward pass, whatever rematerialisation keeps. Key-value heads that do not divide are sent more than
    once."""
    devices, cfg = step.degrees[CONTEXT], member.cfg
    q, k = (heads // step.degrees[TENSOR] for heads in (cfg.heads, cfg.kv_heads))
    k *= devices // math.gcd(devices, k)
    head = step.tokens_here * cfg.head_size
    times = member.forward + member.backward * (1 + member.again.any)
    for heads in (q + 2 * k, q):
        yield Term("all-to-all", (CONTEXT,), head * heads, step.policy.compute, times)


FORMS: dict[str, Callable[[Step, Member], Iterator[Term]]] = {"ring": _ring, "gather": _gather, "ulysses": _ulysses}
