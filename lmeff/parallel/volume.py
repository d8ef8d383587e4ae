"""Bytes that each device sends in a train step, by kind of collective and mesh axes, from formulas: nothing is compiled.

The convention is that of rings (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 7): of a tensor of P bytes over n devices an
all-gather or a reduce-scatter sends (n-1)/n P, an all-reduce 2(n-1)/n P; an all-to-all (n-1)/n of what a device holds, a permute all of it.
`lmeff.parallel.hlo.volumes` reads the same numbers from a compiled program.

What moves follows from how a step runs. Automatic (one microbatch, no pipeline, exact sums): XLA places collectives from constraints; weights cut over fsdp are
gathered a layer at a time, forward and backward, and each layer's gradient is reduced there. Region (several microbatches, a pipeline, or compressed
sums): weights are gathered once, gradients reduced once.

Counted as built, waste included: gradients of the input of q, k and v (and of up and gate) are reduced one by one. Left out: scalars, and the few
numbers of a compression's state.
"""

from collections.abc import Callable, Collection, Iterator

import jax.numpy as jnp

from lmeff.parallel.collective import RING, Key
from lmeff.parallel.volume_experts import experts
from lmeff.parallel.volume_layers import embedding, layers, loss, pipeline
from lmeff.parallel.volume_reduced import meetings
from lmeff.parallel.volume_sequence import sequence
from lmeff.parallel.volume_term import Term
from lmeff.parallel.volume_weights import gradients, inner_gradients, updates, weights
from lmeff.parallel.workload import Step


def terms(step: Step) -> dict[str, list[Term]]:
    """What moves, by row of the table; collectives over axes of one device are none, and axes of one device are not named."""
    wide = {axis for axis, size in step.degrees.items() if size > 1}

    def moving(row: Iterator[Term]) -> Iterator[Term]:
        for term in row:
            axes = tuple(axis for axis in term.axes if axis in wide)
            if axes and term.times > 0 and term.elements > 1:  # scalars cost no bandwidth
                yield term._replace(axes=axes)

    return {name: list(moving(row(step))) for name, row in ROWS.items()}


def volume(step: Step, *, scatters: bool = True, rows: Collection[str] | None = None) -> dict[Key, float]:
    """`{(kind, axes): bytes that a device sends in a step}`.

    rows:     of the table, by name; None is all.
    scatters: whether the compiler makes a reduce-scatter of an all-reduce whose result is cut. XLA does for TPUs; for the CPU it leaves the
        all-reduce, twice the bytes.
    """
    total: dict[Key, float] = {}
    for (kind, axes, _), sent in volume_by_loop(step, scatters=scatters, rows=rows).items():
        total[kind, axes] = total.get((kind, axes), 0) + sent
    return total


def volume_by_loop(
    step: Step, *, scatters: bool = True, rows: Collection[str] | None = None
) -> dict[tuple[str, tuple[str, ...], str], float]:
    """`{(kind, axes, loop): bytes}`, the same by the innermost of `volume_term.LOOPS` that a collective runs in."""
    total: dict[tuple[str, tuple[str, ...], str], float] = {}
    for name, row in terms(step).items():
        for term in row if rows is None or name in rows else ():
            kind = "all-reduce" if term.placed and not scatters else term.kind
            sent = term.times * term.elements * _itemsize(term) * RING[kind](step.layout.size(term.axes))
            total[kind, term.axes, term.loop] = total.get((kind, term.axes, term.loop), 0) + sent
    return total


def _itemsize(term: Term) -> int:
    return jnp.dtype(term.dtype).itemsize


ROWS: dict[str, Callable[[Step], Iterator[Term]]] = {
    "weights": weights,
    "updates": updates,
    "gradients": gradients,
    "inner gradients": inner_gradients,
    "meetings": meetings,
    "embedding": embedding,
    "layers": layers,
    "sequence": sequence,
    "experts": experts,
    "loss": loss,
    "pipeline": pipeline,
}
