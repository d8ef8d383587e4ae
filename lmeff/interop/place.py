"""A leaf of the parameters from tensors in files, and back: through the host one shard, or one tensor, at a time.

`jax.make_array_from_callback` asks for every shard before it sends any, and for each replica anew. Here a shard is filled, sent to all devices that
hold it, and let go before the next: the host holds the largest shard and a piece of what fills it, never two copies of a leaf.
"""

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from lmeff.interop.strips import fill

Index = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each dim

# What is asked for at once, in bytes of the leaf's dtype: a sixteenth of the shard, within these bounds. A piece may come in a wider dtype and turned around
# as a copy, and is still small beside its shard.
PIECES = 16
LEAST_BYTES, MOST_BYTES = 1 << 20, 32 << 20


def place_leaf(
    shape: Sequence[int],
    dtype: Any,
    sharding: Sharding,
    read: Callable[..., np.ndarray],
    *,
    stacked: int = 0,
    outer: int = 0,
) -> jax.Array:
    """The array whose values `read` gives, cast to `dtype`. Each distinct shard is read once, in order of its place, however many devices hold it.

    read:    `read(index)` gives the values at `index`, a slice for each dim. A leaf with `stacked` leading dims ("L": 1, "LE": 2) is asked for one of its
             tensors at a time, `read(index, layer)` or `read(index, layer, expert)`, and `index` is of the dims behind.
    outer:   of the dims behind, the one that is outermost in the file (1 where the file holds the transpose): large tensors are read in pieces along it.

    Every process reads what its own devices hold.
    """
    devices: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        devices.setdefault(_bounds(index, shape), []).append(device)
    parts: dict[Any, jax.Array] = {}
    for bounds in sorted(devices):
        host = _fill(bounds, dtype, read, stacked, outer)
        for device in devices[bounds]:
            parts[device] = jax.device_put(host, SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
        # Sending is asynchronous, and JAX lets go of what it has sent in its next call or when Python collects: here, before the next shard is filled.
        jax.block_until_ready([parts[device] for device in devices[bounds]])
        del host
        gc.collect(0)
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, [*parts.values()], dtype=dtype)


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _fill(bounds: Bounds, dtype: Any, read: Callable[..., np.ndarray], stacked: int, outer: int) -> np.ndarray:
    """One shard on the host, read by pieces: a tensor of the stack at a time, and of that so much along `outer`."""
    host = np.empty([stop - start for start, stop in bounds], dtype)
    stack, own = bounds[:stacked], bounds[stacked:]
    for at in itertools.product(*(range(*dim) for dim in stack)):
        target = host[*(i - start for i, (start, _) in zip(at, stack)), ...]
        for piece in _pieces(own, outer, host):
            index = tuple(slice(*dim) for dim in piece)
            values = read(index, *at)
            here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(piece, own))
            expected = tuple(b - a for a, b in piece)
            assert values.shape == expected, f"read{index}: got {values.shape}, expected {expected}"
            fill(target[*here, ...], values)
    return host


def _pieces(own: Bounds, outer: int, host: np.ndarray) -> Iterator[Bounds]:
    """A tensor's bounds cut along `outer`."""
    if not own:
        yield own
        return
    start, stop = own[outer]
    others = math.prod(b - a for dim, (a, b) in enumerate(own) if dim != outer) * host.itemsize
    rows = max(1, min(MOST_BYTES, max(LEAST_BYTES, host.nbytes // PIECES)) // max(1, others))
    for begin in range(start, stop, rows):
        yield (*own[:outer], (begin, min(begin + rows, stop)), *own[outer + 1 :])


def fetch(array: Any, index: Sequence[slice] = ()) -> np.ndarray:
    """The values of an array at `index` (dims left out are whole) on the host, put together from the shards that hold them: nothing is gathered on a device.

    Where one shard holds them all they may be read-only.

    On a pod every process makes the same calls and gets the same values: what no device of a process holds, its owner broadcasts.
    """
    whole = [*index, *[slice(None)] * (array.ndim - len(index))]
    wanted = _bounds(whole, array.shape)
    out: np.ndarray | None = None
    held = {_bounds(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    for bounds, owner in _owners(array).items():
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, wanted))
        if any(start >= stop for start, stop in common):
            continue
        values = _local(held[bounds], bounds, common) if bounds in held else None
        if values is None or not array.is_fully_addressable:
            values = _broadcast(values, common, array.dtype, owner)
        if common == wanted:
            return values
        out = np.empty([stop - start for start, stop in wanted], array.dtype) if out is None else out
        out[*(slice(a - start, b - start) for (a, b), (start, _) in zip(common, wanted))] = values
    return np.empty([stop - start for start, stop in wanted], array.dtype) if out is None else out


def tensors_of(array: Any, *, stacked: int = 0) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """`(position, values)` of each tensor of a leaf with so many leading dims of stack, one on the host at a time; a leaf without is its own."""
    for at in np.ndindex(*array.shape[:stacked]):
        yield at, fetch_tensor(array, *at)


def fetch_tensor(array: Any, *at: int) -> np.ndarray:
    """One tensor of a stacked leaf: `array[at]` on the host."""
    return fetch(array, [slice(i, i + 1) for i in at]).reshape(array.shape[len(at) :])


def _owners(array: Any) -> dict[Bounds, int]:
    """The process that speaks for each distinct shard, the same in every process."""
    owners: dict[Bounds, int] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        bounds = _bounds(index, array.shape)
        owners[bounds] = min(device.process_index, owners.get(bounds, device.process_index))
    return dict(sorted(owners.items()))


def _local(data: jax.Array, bounds: Bounds, common: Bounds) -> np.ndarray:
    """A part of a shard. Cut on its device also where it is all of it: an array keeps the host's copy of itself as long as it lives."""
    starts = [a - start for (a, _), (start, _) in zip(common, bounds)]
    return np.asarray(jax.lax.dynamic_slice(data, starts, [b - a for a, b in common]))


def _broadcast(values: np.ndarray | None, common: Bounds, dtype: Any, owner: int) -> np.ndarray:
    shape = [b - a for a, b in common]
    own = np.zeros(shape, dtype) if values is None else np.ascontiguousarray(values)
    speaks = jax.process_index() == owner
    # As bytes: the broadcast is a sum with zeros, which is exact for whole numbers whatever they mean.
    sent = multihost_utils.broadcast_one_to_all(own.reshape(-1).view(np.uint8), is_source=speaks)
    return np.asarray(sent).view(dtype).reshape(shape)
