"""Digests of arrays that do not depend on the mesh, to notice a flipped bit that storage did not.

Each element's bits are mixed with its position in the whole array and summed modulo 2^32: a sum, so any sharding gives the same number, and a product with
an odd constant, so a change of any single bit changes it.
"""

from typing import Any

import jax
import jax.numpy as jnp

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digest(x: jax.Array) -> jax.Array:
    """A uint32 that identifies the bits of `x` and where they stand."""
    bits = _bits(x).reshape(-1) if x.ndim == 0 else _bits(x)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = (bits ^ (position * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        return x.astype(jnp.int8).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)


@jax.jit
def _digests(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    return {path: digest(x) for path, x in leaves.items()}


def digests(leaves: dict[str, Any]) -> dict[str, int]:
    """`{path: digest}` of a flat dict of arrays."""
    return {path: int(value) for path, value in jax.device_get(_digests(leaves)).items()}
