"""Host batches on a mesh: which rows a process needs, and in which order their tokens lie."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lmeff.core.batch import Batch
from lmeff.parallel.mesh import WHOLE, Layout


def place_batch(batch: Batch, layout: Layout, total: int | None = None) -> Batch:
    """A host batch on the mesh: rows over the batch axes, tokens over context, in the layout's order (`Layout.token_order`).

    total: where `batch` holds only `own_rows(layout, total)` of a global batch of so many rows; None where it holds all of them.
    """
    order = layout.token_order(batch.tokens.shape[1])
    if order is not None:
        batch = jax.tree.map(lambda x: x[:, order], batch)
    if not layout.mesh.is_multi_process:
        return jax.device_put(batch, jax.tree.map(lambda x: layout.sharding("BS", x.shape), batch))
    rows = np.arange(len(batch.tokens)) if total is None else own_rows(layout, total)

    def placed(x: np.ndarray) -> jax.Array:
        shape = (total or len(x), *x.shape[1:])

        def shard(at: Any) -> np.ndarray:
            return x[np.isin(rows, np.arange(shape[0])[at[0]]), at[1]]

        return jax.make_array_from_callback(shape, layout.sharding("BS", shape), shard)

    return jax.tree.map(placed, batch)


def own_rows(layout: Layout, total: int, devices: Sequence[Any] | None = None) -> np.ndarray:
    """The rows of a global batch of `total` that these devices hold (default: those of this process), ascending.

    Processes share rows where an axis that does not cut them goes across processes.
    """
    here = set(layout.mesh.local_devices if devices is None else devices)
    held = layout.sharding("B" + WHOLE, (total, 1)).devices_indices_map((total, 1))
    return np.unique(np.concatenate([np.arange(total)[at[0]] for device, at in held.items() if device in here]))
