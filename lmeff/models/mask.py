"""What attention may see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Mask(NamedTuple):
    """What a query may see, besides no later token: tokens of its own document, within a window; scores may be capped."""

    window: int | None
    softcap: float | None

    @property
    def full(self) -> "Mask":
        """The same without the window."""
        return self._replace(window=None)


def by_kind(fn: Callable[[Mask], Any], mask: Mask, full: jax.Array | None) -> Any:
    """`fn(mask)`; where layers differ, `full` (traced) says whether this one sees all, and only what it says is run.

    Not to be differentiated: a gradient would keep what either choice needs. Callers have gradients of their own, outside.
    """
    return fn(mask) if full is None else jax.lax.cond(full, lambda: fn(mask.full), lambda: fn(mask))
