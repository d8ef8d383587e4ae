"""Bytes that each device sends in a train step, by kind of collective and mesh axes, from formulas: nothing is compiled.

The convention is that of rings (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 7): of a tensor of P bytes over n devices an
all-gather or a reduce-scatter sends (n-1)/n P, an all-reduce 2(n-1)/n P; an all-to-all (n-1)/n of what a device holds, a permute all of it.
`lmeff.parallel.hlo.volumes` reads the same numbers from a compiled program.

What moves follows from how a step runs. Automatic (one microbatch, no pipeline): XLA places collectives from constraints; weights cut over fsdp are
gathered a layer at a time, forward and backward, and each layer's gradient is reduced there. Region (several microbatches, or a pipeline): weights are
gathered once, gradients reduced once.

Counted as built, waste included: gradients of the input of q, k and v (and of up and gate) are reduced one by one. Left out: scalars, the few
numbers of a compression's state, and a teacher.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from lmeff.parallel.collective import RING, Key
from lmeff.parallel.mesh import AXES, ZERO_AXIS
from lmeff.parallel.stages import exchange, layer_table
from lmeff.parallel.workload import EMBEDDING, PIPE, TENSOR, Leaf, Step, leaves_of

PARTIAL = jnp.float32  # sums of products are float32 until they are reduced


class Term(NamedTuple):
    """A collective and how often it runs.

    elements: of the whole tensor, which a gather ends with and a reduction starts with; of what a device holds for an all-to-all and a permute.
    placed:   left to XLA, which may write a reduce-scatter as an all-reduce and a slice.
    loop:     the innermost loop around it: "step", "microbatch", "layer" or "tick".
    """

    kind: str
    axes: tuple[str, ...]
    elements: float
    dtype: Any
    times: float = 1
    placed: bool = False
    loop: str = "step"


def weights(step: Step) -> Iterator[Term]:
    """Parameters made whole over fsdp: once in a region, else for the forward and again for the backward pass of each layer.

    The head turns, and its gradient turns back (`Step.turns_head`), or it is gathered once. Of the embedding, rows are looked up (`embedding`). With
    rematerialisation XLA gathers a norm's scale a third time, and beside tensor parallelism the attention's output matrix where its product is
    computed again.
    """
    for leaf in step.leaves:
        if ZERO_AXIS not in leaf.axes:
            continue
        if step.region:
            yield Term("all-gather", (ZERO_AXIS,), leaf.elements, step.policy.params)
        elif step.is_head(leaf) and step.turns_head:
            yield Term("all-to-all", (ZERO_AXIS,), leaf.elements / step.degrees[ZERO_AXIS], step.policy.compute, 2)
        elif step.is_head(leaf) or leaf.path != EMBEDDING:
            third = step.remat != "none" and leaf.path.startswith("blocks/") and not leaf.is_matmul
            third |= leaf.path.endswith("/wo") and TENSOR in leaf.axes and AGAIN[step.remat].reductions > 0
            times = 1 if step.is_head(leaf) else 3 if third else 2
            yield Term("all-gather", (ZERO_AXIS,), leaf.elements, step.policy.compute, times)


def updates(step: Step) -> Iterator[Term]:
    """Stages 1 and 2 of ZeRO: each device updates its part of the parameters, and all parts are gathered."""
    if step.plan.zero in (1, 2):
        for leaf in leaves_of(step.cfg, step.layout.of_optimizer):
            if ZERO_AXIS in leaf.axes:
                yield Term("all-gather", (ZERO_AXIS,), leaf.elements, step.policy.params)


def gradients(step: Step) -> Iterator[Term]:
    """Gradients summed over the axes of rows, and over pipe where every stage has a parameter. What is cut over fsdp is scattered there, and its part
    summed over the others.

    Automatic: stages 2 and 3 of ZeRO scatter, stage 1 sums whole; vectors, and the head, whose gradient the loss sums itself, are never scattered. In a
    region only stage 3 scatters.
    """
    for leaf in step.leaves:
        if step.region:
            left = tuple(a for a in step.layout.axes("BL") if a not in leaf.axes)
            dtype, scattered, placed = step.policy.params, ZERO_AXIS in leaf.axes, False
        else:
            left = step.batch
            scattered = step.plan.zero >= 2 and ZERO_AXIS in left and leaf.is_matmul
            dtype, placed = PARTIAL, True
            if leaf.path == EMBEDDING:
                yield from _table_gradient(step, leaf)
                continue
            if step.is_head(leaf):
                yield _head_gradient(step, leaf)
                continue
        left = order(axis for axis in left if axis != ZERO_AXIS or not scattered)
        if scattered:
            yield Term("reduce-scatter", (ZERO_AXIS,), leaf.elements, dtype, placed=placed)
        yield Term("all-reduce", left, leaf.elements / (step.degrees[ZERO_AXIS] if scattered else 1), dtype)


def _table_gradient(step: Step, leaf: Leaf) -> Iterator[Term]:
    """Of the embedding's table. Its rows come to where they are summed (`embedding`) as they went; a tied head adds its own."""
    exchanged = exchanges_rows(step)
    left = order(axis for axis in step.batch if axis != ZERO_AXIS or not exchanged)
    yield Term("all-reduce", left, leaf.elements / (step.degrees[ZERO_AXIS] if exchanged else 1), step.policy.compute)
    if step.is_head(leaf):
        yield _head_gradient(step, leaf)


def _head_gradient(step: Step, leaf: Leaf) -> Term:
    """Summed by the loss, of this device's part of the vocabulary."""
    left = order(axis for axis in step.batch if axis != ZERO_AXIS or not step.turns_head)
    return Term("all-reduce", left, leaf.elements / (step.degrees[ZERO_AXIS] if step.turns_head else 1), PARTIAL)


def exchanges_rows(step: Step) -> bool:
    """Whether rows of the embedding travel over fsdp: in an automatic step whose table is cut over D, or only its gradient is (stage 2)."""
    cut_gradient = step.plan.zero == 2 and step.degrees[TENSOR] == 1
    return not step.region and step.degrees[ZERO_AXIS] > 1 and (step.plan.zero == 3 or cut_gradient)


def embedding(step: Step) -> Iterator[Term]:
    """Rows of the table: over fsdp by an all-to-all of what every device found of its columns, after a gather of the ids; over tensor summed and
    scattered over T."""
    dtype = step.policy.compute
    if exchanges_rows(step):
        ids = step.activation / step.cfg.width * step.degrees[ZERO_AXIS]
        yield Term("all-gather", (ZERO_AXIS,), ids, jnp.int32)
        yield Term("all-to-all", (ZERO_AXIS,), step.activation, dtype, 2 if step.plan.zero == 3 else 1)
    if step.first:
        yield Term("reduce-scatter", (TENSOR,), step.activation, dtype, step.accumulate)
        yield Term("all-gather", (TENSOR,), step.activation, dtype, step.accumulate)


def layers(step: Step) -> Iterator[Term]:
    """Tensor parallelism in the blocks: T is gathered on the way into a sublayer and sums are scattered over T on its way out, and the other way round
    in the backward pass, where each product of a sublayer's input (q, k, v; up, gate) has its own sum.

    Scales and biases that tensor does not cut see a part of T each.
    """
    again = AGAIN[step.remat]
    inputs = 3 + 1 + step.cfg.gated
    forward = 1 + (step.schedule is not None and step.plan.stash == "input")
    for_weights = 2 * (step.schedule is not None)  # the cotangents of the sublayers' outputs, as W multiplies them
    gathers, reductions = 2 * forward + 2 + again.gathers + for_weights, 2 * forward + inputs + again.reductions
    yield Term("all-gather", (TENSOR,), step.activation, step.policy.compute, step.passes * gathers)
    yield Term("reduce-scatter", (TENSOR,), step.activation, PARTIAL, step.passes * reductions, placed=True)
    for leaf in step.leaves:
        if leaf.path.startswith("blocks/") and TENSOR not in leaf.axes:
            yield Term("all-reduce", (TENSOR,), leaf.elements / leaf.layers, step.policy.compute, step.passes)


def loss(step: Step) -> Iterator[Term]:
    """The vocabulary cut over tensor: hidden states gathered, their gradients summed, and for each token its largest logit, the sum of exponentials, the
    target's logit, and gradients of these sums."""
    if not step.last:
        return
    yield Term("all-gather", (TENSOR,), step.activation, step.policy.output, step.accumulate)
    yield Term("reduce-scatter", (TENSOR,), step.activation, step.policy.output, step.accumulate, placed=True)
    tokens = step.activation // step.cfg.width
    padded = -(-tokens // min(step.chunk, tokens)) * min(step.chunk, tokens)
    if step.turns_head:
        yield from _gathered_rows(step, tokens * step.degrees[ZERO_AXIS])
    else:
        yield Term("all-reduce", (TENSOR,), padded, jnp.float32, step.accumulate * (5 if step.region else 4))
    for leaf in step.leaves:
        if leaf.path.startswith("final_norm"):
            yield Term("all-reduce", (TENSOR,), leaf.elements, step.policy.output, step.accumulate)


def _gathered_rows(step: Step, rows: int) -> Iterator[Term]:
    """The vocabulary cut over fsdp too: hidden states, targets and weights of its devices gathered chunk by chunk, their gradient scattered back."""
    both = tuple(axis for axis in (ZERO_AXIS, TENSOR) if step.degrees[axis] > 1)
    yield Term("all-gather", (ZERO_AXIS,), rows * step.cfg.width, step.policy.output)
    yield Term("reduce-scatter", (ZERO_AXIS,), rows * step.cfg.width, step.policy.output)
    yield Term("all-gather", (ZERO_AXIS,), rows, jnp.int32)
    yield Term("all-gather", (ZERO_AXIS,), rows, jnp.float32)
    yield Term("all-reduce", both, rows, jnp.float32, 4)
    yield Term("all-reduce", (ZERO_AXIS,), rows, jnp.float32)


def pipeline(step: Step) -> Iterator[Term]:
    """Two permutes of the payload in every tick (of two stages, XLA for TPUs may make one); layers of several chunks are brought to their stages and
    their gradients back."""
    if step.schedule is None:
        return
    payload = step.activation / step.degrees[TENSOR]
    yield Term("collective-permute", (PIPE,), payload, step.policy.compute, 2 * step.schedule.ticks)
    table = layer_table(step.schedule, step.cfg.layers)
    for leaf in step.leaves:
        if PIPE in leaf.axes:
            for kind, count in exchange(table, step.cfg.layers):
                yield Term(kind, (PIPE,), leaf.elements / leaf.layers * count, step.policy.params)


def order(axes: Iterable[str]) -> tuple[str, ...]:
    """Outermost first."""
    found = set(axes)
    return tuple(axis for axis in AXES if axis in found)


def terms(step: Step) -> dict[str, list[Term]]:
    """What moves, by row of the table; collectives over axes of one device are none."""

    def moves(term: Term) -> bool:
        return step.layout.size(term.axes) > 1 and term.times > 0

    return {name: list(filter(moves, row(step))) for name, row in ROWS.items()}


def volume(step: Step, *, scatters: bool = True) -> dict[Key, float]:
    """`{(kind, axes): bytes that a device sends in a step}`.

    scatters: whether the compiler makes a reduce-scatter of an all-reduce whose result is cut. XLA does for TPUs; for the CPU it leaves the
        all-reduce, twice the bytes.
    """
    total: dict[Key, float] = {}
    for row in terms(step).values():
        for term in row:
            kind = "all-reduce" if term.placed and not scatters else term.kind
            sent = term.times * term.elements * jnp.dtype(term.dtype).itemsize * RING[kind](step.layout.size(term.axes))
            total[kind, term.axes] = total.get((kind, term.axes), 0) + sent
    return total


class Again(NamedTuple):
    """What a layer's backward pass does again of the collectives of its forward pass."""

    gathers: int
    reductions: int


AGAIN = {"none": Again(0, 0), "dots": Again(2, 0), "names": Again(2, 1), "full": Again(2, 1)}

ROWS: dict[str, Callable[[Step], Iterator[Term]]] = {
    "weights": weights,
    "updates": updates,
    "gradients": gradients,
    "embedding": embedding,
    "layers": layers,
    "loss": loss,
    "pipeline": pipeline,
}
