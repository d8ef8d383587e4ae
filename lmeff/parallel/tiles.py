"""The order in which a TPU stores arrays: the last dim along its 128 lanes."""

from typing import Any

import jax
from jax.experimental.layout import Layout as Order
from jax.experimental.layout import with_layout_constraint

from lmeff.core.tree import Tree
from lmeff.parallel.mesh import Layout, shardings

LANES = 128


def row_major(tree: Any, specs: Tree, layout: Layout) -> Any:
    """Gradients in the order that parameters and moments are stored in.

    A transposed product would leave a gradient transposed, and XLA would then copy the parameter and both moments into its order for all of the
    step, where one copy of the gradient does. Shards that do not fill the lanes are left alone: they would be padded.
    """
    if layout.platform != "tpu":
        return tree

    def leaf(x: jax.Array, place: Any) -> jax.Array:
        if x.ndim < 2 or place.shard_shape(x.shape)[-1] % LANES:
            return x
        return with_layout_constraint(x, Order(major_to_minor=tuple(range(x.ndim))))

    return jax.tree.map(leaf, tree, shardings(tree, specs, layout))
