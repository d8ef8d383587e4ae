"""What the rows of `parallel/volume.py` are made of: one collective, and in which loop of the step it runs."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from lmeff.parallel.mesh import AXES

PARTIAL = jnp.float32  # sums of products are float32 until they are reduced
# Once a step; for every microbatch; for every layer of each; for every tick of a pipeline.
LOOPS = ("step", "microbatch", "layer", "tick")


class Term(NamedTuple):
    """A collective and how often it runs.

    elements: of the whole tensor, which a gather ends with and a reduction starts with; of what a device holds for an all-to-all and a permute.
    times:    in a step, all turns of its loop counted; below 1 where it does not run in every step.
    placed:   left to XLA, which may write a reduce-scatter as an all-reduce and a slice.
    loop:     the innermost of `LOOPS` around it.
    """

    kind: str
    axes: tuple[str, ...]
    elements: float
    dtype: Any
    times: float = 1
    placed: bool = False
    loop: str = "step"


def order(axes: Iterable[str]) -> tuple[str, ...]:
    """Outermost first."""
    found = set(axes)
    return tuple(axis for axis in AXES if axis in found)
