"""What XLA for TPUs must be told so that a step takes no more memory than it needs. No result depends on it."""

from typing import Any

import jax
import jax.numpy as jnp

from lmeff.parallel.mesh import Layout


def pinned(layout: Layout, weights: Any, index: jax.Array) -> Any:
    """A layer's weights as a loop hands them over, made to depend on the layer's index.

    XLA would else cast the weights of all layers at once, before the loop: a second copy of the parameters for as long as the loop runs. An
    optimization barrier does not keep it from that. The sum is part of the cast and costs nothing.
    """
    if layout.platform != "tpu":
        return weights
    zero = jnp.minimum(index, 0)
    return jax.tree.map(lambda w: w + zero.astype(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, weights)
