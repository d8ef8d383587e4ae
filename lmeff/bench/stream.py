"""The memory bandwidth that a device really has: loops over an array that is larger than its caches.

Two loops: one reads (the largest number of each row), one reads and writes in place (McCalpin's STREAM without the array for the result,
https://www.cs.virginia.edu/stream). What a program reaches is compared with the faster one.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MIB = 2**20
SIZES = {"cpu": 256 * MIB, "gpu": 2048 * MIB, "tpu": 1024 * MIB}  # bytes, many times the caches of the platform
ROWS = 1024


class Rate(NamedTuple):
    """Bytes/s of one turn of each loop."""

    read: float
    update: float

    @property
    def best(self) -> float:
        """The faster."""
        return max(self)


def make_stream(device: Any, size: int | None = None) -> Callable[[], Rate]:
    """The loops on one device, compiled; each call runs both once. size: bytes of the array; None takes the platform's."""
    size = SIZES.get(device.platform, SIZES["cpu"]) if size is None else size
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.jit(lambda: jnp.ones((ROWS, max(1, size // (4 * ROWS))), jnp.float32), out_shardings=place)()
    read = jax.jit(lambda x: x.max(axis=1))
    update = jax.jit(lambda x: x * 0.5 + 0.5, donate_argnums=0)

    def turn() -> Rate:
        nonlocal x
        start = time.perf_counter()
        read(x).block_until_ready()
        middle = time.perf_counter()
        x = update(x).block_until_ready()
        end = time.perf_counter()
        return Rate(x.nbytes / (middle - start), 2 * x.nbytes / (end - middle))

    turn()
    return turn
