"""What a compressed model takes to store, in bits, everything counted."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.numerics import QTensor, dequantize, is_qtensor, stored_bits
from lmeff.core.tree import Tree, flatten
from lmeff.parallel.processes import whole

CONVENTION = (
    "stored size: every number of every leaf. Codes of 2 to 4 bits take a slot of 4, those of 5 to 8 bits and fp8 a slot of 8; scales take 32 bits and zero "
    "points 8. A pruned leaf counts as the smallest of three: dense; one bit a weight and the nonzero values; and, where it has an N:M pattern, "
    "N values and ceil(log2 C(M, N)) bits a group. Effective bits are stored bits over the parameters of the dense original."
)


class Sparse(NamedTuple):
    """A pruned leaf: without a pattern, or with `kept` of each `size` weights along `axis` (negative)."""

    kept: int = 0
    size: int = 0
    axis: int = 0


def storage_bits(params: Tree, pruned: Mapping[str, Sparse] | None = None) -> int:
    """Bits of a tree of arrays and `QTensor`s with their masks applied, under `CONVENTION`.

    pruned: the leaves that have masks, by path (`config.pruned`). Their zeros are counted and their patterns checked, never assumed.
    """
    pruned = pruned or {}
    return sum(leaf_bits(leaf, pruned.get(path)) for path, leaf in flatten(params).items())


def effective_bits(params: Tree, parameters: int, pruned: Mapping[str, Sparse] | None = None) -> float:
    """Stored bits for each of the `parameters` of the dense original."""
    return storage_bits(params, pruned) / parameters


def quantized_bytes(params: Tree) -> tuple[int, int]:
    """Bytes of the packed leaves alone, scales and zero points included, and the bytes of the same leaves in float32."""
    packed = [leaf for leaf in flatten(params).values() if is_qtensor(leaf)]
    return sum(stored_bits(t) for t in packed) // 8, sum(4 * math.prod(t.shape) for t in packed)


def leaf_bits(leaf: Any, sparse: Sparse | None = None) -> int:
    """Bits of one array or `QTensor`."""
    if sparse is None:
        return stored_bits(leaf) if is_qtensor(leaf) else math.prod(leaf.shape) * _width(leaf)
    nonzero = _nonzero(leaf)
    holds = sparse.size > 0 and int(_in_groups(nonzero, sparse).max()) <= sparse.kept
    return pruned_bits(leaf, sparse if holds else Sparse(), _total(nonzero))


def pruned_bits(leaf: Any, sparse: Sparse, nonzero: int) -> int:
    """Bits of one leaf, or of its spec, with so many values that are not zero and a pattern that is known to hold."""
    size, width = math.prod(leaf.shape), _width(leaf)
    dense = leaf_bits(leaf)
    scales = dense - size * width
    choices = [dense, scales + size + width * nonzero]
    if sparse.size:
        index = math.ceil(math.log2(math.comb(sparse.size, sparse.kept)))
        choices.append(scales + size // sparse.size * (sparse.kept * width + index))
    return min(choices)


def _width(leaf: Any) -> int:
    """Bits of one value or code."""
    if isinstance(leaf, QTensor):
        return leaf.format.width
    return jnp.finfo(leaf.dtype).bits


def _nonzero(leaf: Any) -> jax.Array:
    """True where the value is not zero; a code is compared with its zero point."""
    if not isinstance(leaf, QTensor):
        return leaf != 0
    return dequantize(leaf) != 0


def _total(nonzero: jax.Array) -> int:
    """Counted by rows and summed on the host: a whole model has more weights than int32 can count."""
    rows = jnp.sum(nonzero, axis=tuple(range(1, nonzero.ndim)), dtype=jnp.int32)
    return int(np.sum(whole(rows), dtype=np.int64))


def _in_groups(nonzero: jax.Array, sparse: Sparse) -> jax.Array:
    at = nonzero.ndim + sparse.axis
    shape = nonzero.shape
    return nonzero.reshape(*shape[:at], -1, sparse.size, *shape[at + 1 :]).sum(at + 1)
