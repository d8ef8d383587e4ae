"""Products of rows with the matrix of their group: what a layer of experts without a fixed capacity is made of.

Rows are sorted by group and every group begins at a multiple of a block, so that a block has one matrix (MegaBlocks: Gale et al. 2022,
https://arxiv.org/abs/2211.15841). The gap behind a group holds zeros; rows behind the last group are nobody's: what they come out as is never read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.dims import split_einsum


class Rows(NamedTuple):
    """Where each group's rows lie. `sizes_E` are multiples of `block`, in the order of the groups; the number of rows is one too."""

    sizes_E: jax.Array
    block: int


def block_size(rows: int, groups: int) -> int:
    """A power of two near the mean size of a group, 8 to 128: large ones fill a matrix unit, small ones waste less behind small groups."""
    return min(128, max(8, 1 << (rows // max(groups, 1)).bit_length()))


def padded_rows(rows: int, groups: int, block: int) -> int:
    """Enough for so many rows however they fall into groups, each rounded up to whole blocks."""
    return (rows + groups * (block - 1)) // block * block


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each of them varying over whatever mesh axes another one varies over; outside of `jax.shard_map` nothing happens."""
    if len({jax.typeof(x).manual_axis_type for x in arrays}) == 1:
        return arrays
    zeros = [jnp.where(False, x.ravel()[0], 0) for x in arrays]
    return tuple(x + sum(z.astype(x.dtype) for z in zeros) for x in arrays)


def grouped_product(equation: str, x: jax.Array, w: jax.Array, rows: Rows) -> jax.Array:
    """`"ND,EDF->NF"`: each row times the matrix of its group, summed in float32, in the dtype of `x`; reverse mode only."""
    return FORMS.get(jax.default_backend(), FORMS["any"])(equation, x, w, rows)


def _swapped(equation: str) -> str:
    """The equation of the left operand's gradient: the other dim of the matrices is contracted."""
    left, right, out = split_einsum(equation)
    return f"{out},{right}->{left}"


def _with_gradients(
    multiply: Callable[..., jax.Array], weight_gradient: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """A product of groups with both its gradients, from `multiply(equation, x, w, sizes, block)` and
    `weight_gradient(equation, x, g, w, sizes, block)`."""

    def pull(equation: str, block: int, saved: Any, g: jax.Array) -> Any:
        x, w, sizes = saved
        d_x = multiply(_swapped(equation), g, w, sizes, block).astype(x.dtype)
        return d_x, weight_gradient(equation, x, g, w, sizes, block).astype(w.dtype), None

    call = jax.custom_vjp(
        lambda equation, block, x, w, sizes: multiply(equation, x, w, sizes, block).astype(x.dtype),
        nondiff_argnums=(0, 1),
    )
    call.defvjp(
        lambda equation, block, x, w, sizes: (multiply(equation, x, w, sizes, block).astype(x.dtype), (x, w, sizes)),
        pull,
    )

    def product(equation: str, x: jax.Array, w: jax.Array, rows: Rows) -> jax.Array:
        x, w = alike(x, w)
        return call(equation, rows.block, x, w.astype(x.dtype), rows.sizes_E)

    return product


# ---- by XLA's own operation: what the TPU has a kernel for. Elsewhere it is dense, all rows times all matrices.


def _facing(equation: str, w: jax.Array) -> jax.Array:
    """The matrices with the contracted dim before the other."""
    left, right, _ = split_einsum(equation)
    return w if right.index(left[1]) == 1 else jnp.swapaxes(w, 1, 2)


def _ragged(equation: str, x: jax.Array, w: jax.Array, sizes_E: jax.Array, block: int) -> jax.Array:
    return jax.lax.ragged_dot(x, _facing(equation, w), sizes_E, preferred_element_type=jnp.float32)


OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_gradient(
    equation: str, x: jax.Array, g: jax.Array, w: jax.Array, sizes_E: jax.Array, block: int
) -> jax.Array:
    d_w = jax.lax.ragged_dot_general(x, g, sizes_E, OUTER, preferred_element_type=jnp.float32)
    return _facing(equation, d_w)


# ---- by blocks: a loop over those that have rows; costs what the rows cost, on any backend


def _loop(sizes_E: jax.Array, block: int, step: Callable[..., jax.Array], start: jax.Array) -> jax.Array:
    """`step(first row, group, carry)` for each block with rows."""
    ends_E = jnp.cumsum(sizes_E)

    def body(i: jax.Array, carry: jax.Array) -> jax.Array:
        return step(i * block, (ends_E <= i * block).sum(), carry)

    return jax.lax.fori_loop(0, ends_E[-1] // block, body, start)


def _zeros(shape: tuple[int, ...], *like: jax.Array) -> jax.Array:
    """Zeros that vary over the mesh as these arrays do."""
    return jnp.zeros(shape, jnp.float32) + sum(jnp.where(False, x.ravel()[0], 0).astype(jnp.float32) for x in like)


def _blocks(equation: str, x: jax.Array, w: jax.Array, sizes_E: jax.Array, block: int) -> jax.Array:
    left, right, out = split_einsum(equation)
    matrix = f"{left},{right[1:]}->{out}"

    def step(first: jax.Array, group: jax.Array, carry: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x, first, block)
        made = jnp.einsum(matrix, own, w[group], preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(carry, made, first, 0)

    width = w.shape[right.index(out[1])]
    return _loop(sizes_E, block, step, _zeros((x.shape[0], width), x, w, sizes_E))


def _blocks_gradient(
    equation: str, x: jax.Array, g: jax.Array, w: jax.Array, sizes_E: jax.Array, block: int
) -> jax.Array:
    left, right, out = split_einsum(equation)

    def step(first: jax.Array, group: jax.Array, carry: jax.Array) -> jax.Array:
        own_x, own_g = (jax.lax.dynamic_slice_in_dim(a, first, block) for a in (x, g))
        made = jnp.einsum(f"{left},{out}->{right[1:]}", own_x, own_g, preferred_element_type=jnp.float32)
        return carry.at[group].add(made)

    return _loop(sizes_E, block, step, _zeros(w.shape, x, g, sizes_E))


FORMS: dict[str, Callable[[str, jax.Array, jax.Array, Rows], jax.Array]] = {
    "tpu": _with_gradients(_ragged, _ragged_gradient),
    "any": _with_gradients(_blocks, _blocks_gradient),
}
