"""Rows of `parallel/volume.py`: gradients that cross the batch axes once a step, exact or compressed, and parameters of workers that train apart."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp

from lmeff.parallel.compressed import Reduce, sides
from lmeff.parallel.members import Leaf
from lmeff.parallel.mesh import ZERO_AXIS
from lmeff.parallel.volume_term import Term, order
from lmeff.parallel.workload import TENSOR, Step


def reduced(step: Step, leaf: Leaf) -> Iterator[Term]:
    """A gradient summed in a region, over the axes that do not cut it; fsdp that does gives each device its part."""
    config = step.reduce
    return _exact(step, leaf) if config is None else METHODS[config.method](step, leaf, config)


def _left(step: Step, leaf: Leaf) -> tuple[str, ...]:
    """The axes that leave a leaf whole."""
    return order(axis for axis in step.layout.axes("BL") if axis not in leaf.axes)


def _summed(step: Step, leaf: Leaf) -> tuple[str, ...]:
    """All that its gradient is summed over (`Region.summed`)."""
    return order({*_left(step, leaf), *({ZERO_AXIS} & set(leaf.axes))})


def _exact(step: Step, leaf: Leaf) -> Iterator[Term]:
    if ZERO_AXIS in leaf.axes:
        yield Term("reduce-scatter", (ZERO_AXIS,), leaf.elements, step.policy.params)
    yield Term("all-reduce", _left(step, leaf), leaf.part(step.degrees[ZERO_AXIS]), step.policy.params)


def _int8(step: Step, leaf: Leaf, config: Reduce) -> Iterator[Term]:
    """Codes and scales of whole blocks, each to who sums it, and those of the sums to all but the devices that own another part."""
    everyone = _summed(step, leaf)
    if leaf.elements < step.layout.size(everyone) * config.block:
        yield from _exact(step, leaf)
        return
    parts = step.degrees[ZERO_AXIS] if ZERO_AXIS in leaf.axes else 1
    gathered = _left(step, leaf)
    unit = step.layout.size(gathered) * config.block
    own = -(-leaf.elements // (parts * unit)) * unit
    for kind, axes, elements in (("all-to-all", everyone, own * parts), ("all-gather", gathered, own)):
        yield Term(kind, axes, elements, jnp.int8)
        yield Term(kind, axes, elements / config.block, jnp.float32)


def _powersgd(step: Step, leaf: Leaf, config: Reduce) -> Iterator[Term]:
    """Two factors of each matrix. Where tensor cuts the matrix, the product that contracts what is cut is summed over it, and the other factor is gathered:
    its orthogonalisation, and the next step's start, want it whole."""
    if not leaf.is_matmul:
        yield from _exact(step, leaf)
        return
    rows, columns = sides(leaf.spec)
    if config.rank * (rows + columns) >= rows * columns:
        yield from _exact(step, leaf)
        return
    cut = step.degrees[TENSOR] if TENSOR in leaf.axes else 1
    stacks = leaf.elements * cut / (rows * columns)
    by_rows = cut > 1 and _tensor_cuts_rows(step, leaf)
    whole = {True: stacks * config.rank * rows, False: stacks * config.rank * columns}
    for is_rows, elements in whole.items():
        here = elements / (cut if is_rows == by_rows else 1)
        yield Term("all-reduce", _summed(step, leaf), here, jnp.float32)
        if cut > 1:
            kind = "all-gather" if is_rows == by_rows else "all-reduce"
            yield Term(kind, (TENSOR,), elements, jnp.float32)


def _tensor_cuts_rows(step: Step, leaf: Leaf) -> bool:
    partition = step.layout.partition(leaf.spec.letters, leaf.spec.shape)
    (letter,) = (x for x, entry in zip(leaf.spec.letters, partition, strict=True) if entry and TENSOR in entry)
    return letter in leaf.spec.contract


def meetings(step: Step) -> Iterator[Term]:
    """Workers that train apart: the mean of what each moved, every parameter once in `every` steps, in float32, whatever the fragments. After the last
    step of a run all meet once more, which is not counted."""
    if step.local is not None:
        for leaf in step.stored:
            own = leaf.part(step.degrees[ZERO_AXIS])
            yield Term("all-reduce", (step.local.axis,), own, jnp.float32, 1 / step.local.every)


METHODS: dict[str, Callable[[Step, Leaf, Reduce], Iterator[Term]]] = {"int8": _int8, "powersgd": _powersgd}
