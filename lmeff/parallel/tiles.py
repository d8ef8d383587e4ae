"""What XLA for TPUs must be told so that a step takes no more memory than it needs. No result depends on it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as Order
from jax.experimental.layout import with_layout_constraint

from lmeff.core.tree import Tree
from lmeff.parallel.mesh import Layout, shardings

LANES = 128  # the last dim of an array lies along them


def pinned(layout: Layout, weights: Any, index: jax.Array) -> Any:
    """A layer's weights as a loop hands them over, made to depend on the layer's index.

    XLA would else cast the weights of all layers at once, before the loop: a second copy of the parameters for as long as the loop runs. An
    optimization barrier does not keep it from that. The sum is part of the cast and costs nothing.
    """
    if layout.platform != "tpu":
        return weights
    zero = jnp.minimum(index, 0)
    return jax.tree.map(lambda w: w + zero.astype(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, weights)


def row_major(tree: Any, specs: Tree, layout: Layout) -> Any:
    """Gradients of matrices outside the stack of layers in the order that parameters and moments are stored in.

    The head's is made transposed, and XLA would copy the parameter and both moments into its order for all of the step, where one copy of the
    gradient does. Shards that do not fill the lanes are left alone: they would be padded. So are stacked ones, which are updated in place.
    """
    if layout.platform != "tpu":
        return tree

    def leaf(x: jax.Array, place: Any) -> jax.Array:
        if x.ndim != 2 or place.shard_shape(x.shape)[-1] % LANES:
            return x
        return with_layout_constraint(x, Order(major_to_minor=(0, 1)))

    return jax.tree.map(leaf, tree, shardings(tree, specs, layout))
