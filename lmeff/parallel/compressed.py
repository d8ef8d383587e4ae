"""Gradients that cross the network as few bits: reducers that stand in for `region.reduce`.

int8: each device cuts its gradient into blocks of values with one float32 scale (the block's largest magnitude is code 127), rounds stochastically, and
sends each device its part (all-to-all over the axes); parts are added in float32, rounded again and gathered. A leaf cut over fsdp needs no gathering over
it. (1 + 4 / block) / 4 of the bytes of float32; what a sum expects is what it was (stochastic rounding is unbiased), so nothing is kept.

powersgd (Vogels et al. 2019, https://arxiv.org/abs/1905.13727, algorithms 1 and 2): a matrix [A, Z] of every layer is sent as P [A, R] and Q [Z, R]:
one step of the power iteration from the last Q. What that leaves out is added to the device's next gradient (error feedback). So each device keeps
one float32 gradient, whole over fsdp, and Q. Norms, biases, learned scales and matrices too small to gain are reduced in full.
"""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmeff.core.errors import ConfigError
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten
from lmeff.parallel.mesh import ZERO_AXIS, is_cut, names
from lmeff.parallel.region import EXACT, Reducer, Region, reduce

SEED = 0x5EED


@dataclass(frozen=True, kw_only=True)
class Reduce:
    """Gradients are reduced in fewer bytes than float32 takes.

    method: "int8" or "powersgd".
    block:  int8: values that share a scale.
    rank:   powersgd: columns of the factors.
    """

    method: str = "int8"
    block: int = 256
    rank: int = 4

    def __post_init__(self) -> None:
        """Refuses methods and sizes that do not exist."""
        if self.method not in METHODS:
            near = difflib.get_close_matches(self.method, METHODS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"train.reduce.method: got '{self.method}', expected one of {', '.join(sorted(METHODS))}{hint} (no train.reduce is exact)"
            )
        for name, least in (("block", 16), ("rank", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"train.reduce.{name}: got {getattr(self, name)}, expected at least {least}")


def make_reducer(config: Reduce | None, specs: Tree) -> Reducer:
    """The reducer of a config; without one, exact sums. `specs` of the parameters say what is a matrix."""
    return EXACT if config is None else METHODS[config.method](config, specs)


def quantize_blocks(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes (int8) and scales (float32 [..., 1]) of blocks [..., block], stochastically rounded: the mean of `codes * scales` is x.

    A block that is not finite gets a scale that is not, so overflows stay visible.
    """
    scale = jnp.abs(x).max(-1, keepdims=True) / 127
    codes = jnp.floor(x / jnp.where(scale == 0, 1, scale) + jax.random.uniform(key, x.shape))
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scale


def _int8(config: Reduce, specs: Tree) -> Reducer:
    def apply(region: Region, grads: Any, state: Any, step: jax.Array) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(grads)
        cuts = tree.flatten_up_to(region.cuts)

        def local(leaves: list[jax.Array], step: jax.Array) -> list[jax.Array]:
            # Devices that hold different parts of a sum must not round alike; those that differ in nothing do no harm if they do.
            device = jax.lax.axis_index(tuple(axis for axis, n in region.layout.mesh.shape.items() if n > 1))
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), step), device)
            keys = jax.random.split(key, max(len(leaves), 1))
            return [_exchange(region, *own, config.block) for own in zip(leaves, cuts, keys, strict=True)]

        summed = region.layout.on_parts(local, (cuts, P()), cuts)(leaves, step)
        return tree.unflatten(summed), state

    return EXACT._replace(apply=apply)


def _exchange(region: Region, x: jax.Array, cut: P, key: jax.Array, block: int) -> jax.Array:
    """`reduce` of one leaf, this device's part of it over the other axes. What fills less than a block a device is summed in full."""
    everyone = region.summed(cut)
    size = region.layout.size
    if x.size < size(everyone) * block or not everyone:
        return reduce(x, cut, region.axes)
    dim = next((i for i, entry in enumerate(cut) if ZERO_AXIS in names(entry)), None) if ZERO_AXIS in everyone else None
    gathered = everyone if dim is None else everyone[1:]
    parts = size(everyone) // size(gathered)
    ours = x if dim is None else jnp.moveaxis(x, dim, 0)
    flat = ours.reshape(parts, -1).astype(jnp.float32)
    padded = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % (size(gathered) * block))))
    first, second = jax.random.split(key)
    blocks = quantize_blocks(padded.reshape(size(everyone), -1, block), first)
    codes, scales = (jax.lax.all_to_all(part, everyone, 0, 0, tiled=True) for part in blocks)
    total = (codes.astype(jnp.float32) * scales).sum(0)
    if gathered:
        blocks = quantize_blocks(total, second)
        codes, scales = (jax.lax.all_gather(part, gathered, tiled=True) for part in blocks)
        total = codes.astype(jnp.float32) * scales
    total = total.reshape(-1)[: flat.shape[1]].astype(x.dtype)
    shape = (ours.shape[0] // parts, *ours.shape[1:])
    return total.reshape(shape) if dim is None else jnp.moveaxis(total.reshape(shape), 0, dim)


class Factored(NamedTuple):
    """What PowerSGD keeps of a leaf.

    error: float32 [devices, *shape]: what each device has not sent yet.
    q:     float32 [stacks..., Z, R]: where the next power iteration starts; the same on all devices.
    """

    error: Any
    q: Any


def as_matrices(x: jax.Array, spec: ParamSpec) -> jax.Array:
    """[stacks..., A, Z]: the contracted letters against all others; layers and experts are stacks."""
    order, stacks, rows = _order(spec)
    moved = jnp.transpose(x, order)
    return moved.reshape(*moved.shape[:stacks], math.prod(moved.shape[stacks : stacks + rows]), -1)


def from_matrices(matrices: jax.Array, spec: ParamSpec, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `as_matrices`, to a leaf of this shape."""
    order = _order(spec)[0]
    moved = matrices.reshape([shape[i] for i in order])
    return jnp.transpose(moved, [order.index(i) for i in range(len(order))])


def sides(spec: ParamSpec) -> tuple[int, int]:
    """The rows and columns of each of a parameter's matrices."""
    order, stacks, rows = _order(spec)
    sizes = [spec.shape[i] for i in order[stacks:]]
    return math.prod(sizes[:rows]), math.prod(sizes[rows:])


def _order(spec: ParamSpec) -> tuple[list[int], int, int]:
    """The dims as stacks, rows, columns; and how many of the first two."""
    stacks = [i for i, letter in enumerate(spec.letters) if letter in "LE"]
    rows = [i for i, letter in enumerate(spec.letters) if letter in spec.contract]
    columns = [i for i in range(len(spec.letters)) if i not in (*stacks, *rows)]
    return [*stacks, *rows, *columns], len(stacks), len(rows)


def _powersgd(config: Reduce, specs: Tree) -> Reducer:
    flat: dict[str, ParamSpec] = flatten(specs)

    def chosen(tree: Any) -> dict[int, tuple[str, ParamSpec]]:
        """The leaves, by position, that are matrices which two factors are smaller than."""
        found = {}
        for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_cut)[0]):
            keys = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
            spec = flat.get(keys)
            if spec is None or not spec.is_matmul or not isinstance(path[-1], jax.tree_util.DictKey):
                continue
            rows, columns = sides(spec)
            if config.rank * (rows + columns) < rows * columns:
                found[i] = keys, spec
        return found

    def init(region: Region, trainable: Any) -> dict[str, Factored] | None:
        leaves, tree = jax.tree.flatten(trainable)
        cuts = tree.flatten_up_to(region.cuts)
        if not region.axes:
            return None
        made = {}
        for i, (path, spec) in chosen(trainable).items():
            devices = region.layout.size(region.summed(cuts[i]))
            *stacks, _, columns = jax.eval_shape(lambda x, s=spec: as_matrices(x, s), leaves[i]).shape
            key = jax.random.fold_in(jax.random.key(SEED), i)
            q = jax.random.normal(key, (*stacks, columns, config.rank), jnp.float32)
            made[path] = Factored(jnp.zeros((devices, *leaves[i].shape), jnp.float32), q)
        return made

    def partitions(region: Region, state: Any) -> Any:
        if state is None:
            return None
        cuts, found = jax.tree.leaves(region.cuts, is_leaf=is_cut), {}
        for i, (path, spec) in chosen(region.cuts).items():
            cut, whole = cuts[i], [tuple(a for a in names(entry) if a != ZERO_AXIS) or None for entry in cuts[i]]
            stacks = [whole[j] for j, letter in enumerate(spec.letters) if letter in "LE"]
            found[path] = Factored(P(region.summed(cut) or None, *whole), P(*stacks, None, None))
        return found

    def apply(region: Region, grads: Any, state: Any, step: jax.Array) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(grads)
        cuts = tree.flatten_up_to(region.cuts)
        matrices, kept = chosen(grads), {}
        for i, x in enumerate(leaves):
            if i in matrices:
                path, spec = matrices[i]
                leaves[i], kept[path] = _project(region, x, cuts[i], spec, state[path])
            else:
                leaves[i] = region.sum(x, cuts[i])
        return tree.unflatten(leaves), kept

    return Reducer(init, partitions, apply)


def _project(region: Region, x: jax.Array, cut: P, spec: ParamSpec, kept: Factored) -> tuple[jax.Array, Factored]:
    """The sum of a leaf's matrices on the columns that the power iteration finds, and what this device is left with."""
    axes = region.summed(cut)
    add = functools.partial(jax.lax.psum, axis_name=axes) if axes else lambda part: part
    matrix = as_matrices(x.astype(jnp.float32) + kept.error[0], spec)
    basis = jnp.linalg.qr(add(jnp.einsum("...az,...zr->...ar", matrix, kept.q)))[0]
    own = jnp.einsum("...az,...ar->...zr", matrix, basis)
    q = add(own)
    back = functools.partial(jnp.einsum, "...ar,...zr->...az", basis)
    error = from_matrices(matrix - back(own), spec, x.shape)
    total = from_matrices(back(q), spec, x.shape).astype(x.dtype)
    return _own_part(total, cut, axes), Factored(error[None], q)


def _own_part(x: jax.Array, cut: P, axes: tuple[str, ...]) -> jax.Array:
    """This device's part over fsdp of a leaf that is whole, where the leaf is cut over it."""
    for dim, entry in enumerate(cut):
        if ZERO_AXIS in names(entry) and ZERO_AXIS in axes:
            count = x.shape[dim] // jax.lax.axis_size(ZERO_AXIS)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(ZERO_AXIS) * count, count, dim)
    return x


METHODS: dict[str, Callable[[Reduce, Tree], Reducer]] = {"int8": _int8, "powersgd": _powersgd}
