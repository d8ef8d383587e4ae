"""Which layers a pipeline stage holds, and how they get there.

Parameters are stacked [L, ...] for every plan, cut over pipe into equal runs of layers where L divides. A schedule wants them by stage and chunk,
[v, n, ...] on each stage. With one chunk a stage and L divisible that is where they are; with several chunks they are exchanged, once a step each way;
where L does not divide, slices differ by one layer and the missing ones are padding that is passed through.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.parallel.tables import Schedule

AXIS = "pipe"
PADDING = -1


def slice_layers(layers: int, slices: int) -> int:
    """Layers that a device runs of a slice, padding included: all slices are filled up to the longest."""
    return -(-layers // slices)


def layer_table(schedule: Schedule, layers: int) -> np.ndarray:
    """The layers of each stage and chunk, int32 [p, v, n], with `PADDING` where a slice has fewer than n; the first slices have the larger part."""
    sizes = [layers // schedule.slices + (index < layers % schedule.slices) for index in range(schedule.slices)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    table = np.full((schedule.stages, schedule.chunks, slice_layers(layers, schedule.slices)), PADDING, np.int32)
    for index, size in enumerate(sizes):
        table[(*schedule.home(index), slice(0, size))] = np.arange(starts[index], starts[index] + size)
    return table


def take_layers(x: jax.Array, table: np.ndarray, *, cut: bool) -> jax.Array:
    """Inside a region over pipe: this stage's layers [v, n, ...] of a stack, whole [L, ...] or (`cut`) in equal runs [L / p, ...].

    Differentiable: gradients go back the way the layers came. Padding repeats layer 0 and has no gradient.
    """
    stages, chunks, size = table.shape
    if cut and table.size == x.shape[0] * stages and PADDING not in table:
        runs = x.reshape(chunks, size, *x.shape[1:])
        in_place = np.array_equal(table, np.arange(table.size).reshape(table.shape))
        return runs if in_place else _exchange(runs, table[..., 0] // size)
    whole = jax.lax.all_gather(x, AXIS, axis=0, tiled=True) if cut else x
    return whole[own_layers(table)]


def exchange(table: np.ndarray, layers: int) -> list[tuple[str, int]]:
    """What `take_layers` and its gradient send when layers are cut over pipe: the kinds of collectives, and how many layers a device holds (all-to-all) or
    are whole (the others)."""
    stages, _, size = table.shape
    if table.size != layers or PADDING in table:
        return [("all-gather", layers), ("reduce-scatter", layers)]
    if np.array_equal(table.ravel(), np.arange(layers)):
        return []
    most = _routes(table[..., 0] // size)[0].shape[-1]
    return [("all-to-all", stages * most * size)] * 2


def _exchange(runs: jax.Array, slices: np.ndarray) -> jax.Array:
    """[v, n, ...] runs of layers as they lie to [v, n, ...] as the schedule wants them; `slices` [p, v] says which slice goes where."""
    send, receive = _routes(slices)
    here = jax.lax.axis_index(AXIS)
    arrived = jax.lax.all_to_all(runs[jnp.asarray(send)[here]], AXIS, split_axis=0, concat_axis=0)
    flat = arrived.reshape(send.shape[1] * send.shape[2], *arrived.shape[2:])
    return flat[jnp.asarray(receive)[here]]


def _routes(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runs that each stage sends to each other [p, p, most], and where in what arrived, [p * most], each chunk of a stage is [p, v]."""
    stages, chunks = slices.shape
    source, run = np.divmod(slices, chunks)  # stage s holds slices s * v, ..., s * v + v - 1
    place = np.zeros_like(slices)  # among those that go from the same stage to the same stage
    for (stage, chunk), own in np.ndenumerate(source):
        place[stage, chunk] = (source[stage, :chunk] == own).sum()
    most = int(place.max()) + 1
    send = np.zeros((stages, stages, most), np.int32)
    for (stage, chunk), own in np.ndenumerate(source):
        send[own, stage, place[stage, chunk]] = run[stage, chunk]
    return send, source * most + place


def own_layers(table: np.ndarray) -> jax.Array:
    """Inside a region over pipe: which layers of the model this stage has, [v, n]; padding is as layer 0."""
    return jnp.maximum(jnp.asarray(table)[jax.lax.axis_index(AXIS)], 0)


def layers_present(table: np.ndarray) -> Any:
    """Inside a region over pipe: which of this stage's layers [v, n] are none of the padding; None where all are."""
    return None if (table != PADDING).all() else jnp.asarray(table != PADDING)[jax.lax.axis_index(AXIS)]
