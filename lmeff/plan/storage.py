"""Bytes that arrays take where they are stored, which on a TPU is more than their elements: it stores tiles of 8 rows of 128.

XLA picks, for each shape, which two dims the tiles lie in, so that the least is wasted; a head of 64 numbers does not always cost 128. The rule here is
read off the layouts that libtpu gives to a program's arguments, and the tests hold it to them.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp

LANES, ROWS = 128, 8
WORD = 32  # bits: narrower numbers of several rows share one


def stored_bytes(shape: tuple[int, ...], dtype: Any, platform: str) -> int:
    """Bytes of an array, or of a device's part of one, as an argument of a program for "cpu", "gpu" or "tpu".

    >>> stored_bytes((2, 100), "int4", "cpu"), stored_bytes((3, 100), "float32", "tpu")
    (100, 2048)
    """
    bits = bits_of(dtype)
    elements = _tiled(tuple(shape), bits) if platform == "tpu" else math.prod(shape)
    return -(-elements * bits // 8)


def bits_of(dtype: Any) -> int:
    """Bits of an element: two int4 share a byte, whatever `nbytes` says; a bool takes one."""
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else dtype.itemsize * 8


@functools.lru_cache(maxsize=4096)
def _tiled(shape: tuple[int, ...], bits: int) -> int:
    """Elements with what fills the tiles up."""
    size, packed = math.prod(shape), WORD // bits
    if len(shape) < 2:
        return _up(size, min(max(LANES * packed, _power(size)), max(1024, LANES * packed)))
    pairs = ((i, j) for i in range(len(shape)) for j in range(len(shape)) if i != j)
    return min(size // (shape[i] * shape[j]) * _up(shape[i], LANES) * _rows(shape[j], packed) for i, j in pairs)


def _rows(size: int, packed: int) -> int:
    """Rows as stored: few of them lie in tiles of 1, 2 or 4, as far as a word holds whole ones."""
    return _up(size, max(packed, min(ROWS, _power(size))))


def _power(size: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(size - 1, 0).bit_length()


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
