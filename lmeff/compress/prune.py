"""Magnitude pruning by masks: the smallest weights of each layer, of the whole model, or of each group along the contracted dim.

A pruned weight keeps its raw value under the mask and has no gradient: it changes by weight decay and what momentum is left, and comes back
only where a later mask, made while the schedule still runs, finds it larger than others.

Nothing is sorted or gathered: the k-th largest magnitude is found by bisection on the bits of its float, whose order is that of the numbers. Each
halving is one elementwise pass and a count, so a sharded weight stays where it is. Ties go to the lower index: exactly k weights are kept.

Schedule: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878. N:M: Mishra et al. 2021, https://arxiv.org/abs/2104.08378.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.compress.base import Compression, Leaf, LeafTransform, State, per_leaf
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten, unflatten

SCOPES = ("leaf", "global")
INFINITY = 0x7F800000  # the bits of float32 infinity: no magnitude has larger ones
NEVER = 2**30  # beyond this the float sum decides the sign of a count that int32 cannot hold

Weights = Mapping[str, jax.Array]
Masks = dict[str, jax.Array]


class Ramp(NamedTuple):
    """Sparsity over steps: `sparsity * (1 - (1 - (t - begin) / (end - begin))^3)` at begin, begin + every, ... and end; constant afterwards.

    With `end == 0` the mask is made at the start and never again.
    """

    sparsity: float
    begin: int = 0
    end: int = 0
    every: int = 1

    def at(self, step: int) -> float:
        """The sparsity that holds after `step` steps."""
        if step >= self.end:
            return self.sparsity
        if step < self.begin:
            return 0.0
        since = (step - self.begin) // self.every * self.every
        return self.sparsity * (1 - (1 - since / (self.end - self.begin)) ** 3)

    @property
    def updates(self) -> list[int]:
        """The steps after which a mask is made."""
        return sorted({*range(self.begin, self.end, self.every), self.end})

    def kept(self, size: int) -> list[int]:
        """How many of `size` weights each of the updates keeps."""
        return [size - round(self.at(step) * size) for step in self.updates]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("keep",), meta_fields=("axes", "inner"))
@dataclass(frozen=True)
class Mask:
    """Which weights are kept; the auxiliary state of a leaf.

    keep:  bool, in the shape of the weight.
    axes:  the dims that are pruned together, as negative axes: all but the stack of layers.
    inner: the contracted dim that an N:M pattern runs along, as a negative axis.
    """

    keep: Any
    axes: tuple[int, ...]
    inner: int


def magnitude_pruning(ramp: Ramp, *, pattern: tuple[int, int] | None = None, scope: str = "leaf") -> Compression:
    """Masks the smallest weights of every leaf.

    pattern: (n, m) keeps n of each m weights along the contracted dim (`ramp.sparsity` is then 1 - n / m); None prunes without a pattern.
    scope:   "leaf" reaches the sparsity in every layer of every leaf, "global" over all leaves and layers together.
    """
    assert scope in SCOPES, scope
    assert pattern is None or scope == "leaf", "a pattern fixes the sparsity of every group"
    lifted = per_leaf(LeafTransform(_everything, _apply, lambda w, grad, t, mask, step: mask, _apply))

    def select(weights: Weights, masks: Mapping[str, Mask], index: Any) -> Masks:
        if pattern is not None:
            kept = _at(ramp.kept(pattern[1]), index)
            return {path: largest_in_groups(w, kept, masks[path].inner, pattern[1]) for path, w in weights.items()}
        if scope == "global":
            return _select_globally(weights, masks, ramp, index)
        return {
            path: largest(w, _at(ramp.kept(_slice_size(w, masks[path].axes)), index), masks[path].axes)
            for path, w in weights.items()
        }

    def remade(params: Any, auxiliary: Any, index: Any) -> Any:
        masks = {path: leaf.value for path, leaf in flatten(auxiliary).items()}
        chosen = {path: w for path, w in flatten(params).items() if path in masks}
        made = select(chosen, masks, index)
        return unflatten({path: Leaf(dataclasses.replace(masks[path], keep=keep)) for path, keep in made.items()})

    def init(params: Any, specs: Tree) -> State:
        dense = lifted.init(params, specs)
        return dense if ramp.at(0) == 0 else State(dense.trainable, remade(params, dense.auxiliary, 0))

    def update(params: Any, grads: Any, state: State, step: Any) -> Any:
        if ramp.end == 0 or ramp.sparsity == 0:
            return state.auxiliary
        since = step - ramp.begin
        due = (since >= 0) & (step <= ramp.end) & ((since % ramp.every == 0) | (step == ramp.end))
        index = jnp.clip(-(-since // ramp.every), 0, len(ramp.updates) - 1)
        return jax.lax.cond(due, lambda: remade(params, state.auxiliary, index), lambda: state.auxiliary)

    return lifted._replace(init=init, update=update)


def _everything(w: Any, spec: ParamSpec) -> tuple[None, Mask]:
    return None, Mask(jnp.ones(w.shape, bool), spec.own_axes, spec.axes[-1])


def _apply(w: jax.Array, trainable: None, mask: Mask) -> jax.Array:
    return jnp.where(mask.keep, w, jnp.zeros((), w.dtype))


def _slice_size(w: jax.Array, axes: tuple[int, ...]) -> int:
    return math.prod(w.shape[axis] for axis in axes)


def _at(table: list[int], index: Any) -> jax.Array:
    return jnp.asarray(table, jnp.int32)[index]


def largest(w: jax.Array, keep: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """True at the `keep` largest magnitudes of each slice over `axes`; exactly so many, ties go to the lower index."""
    bits = magnitude_bits(w)
    shape = tuple(1 if axis - w.ndim in axes else size for axis, size in enumerate(w.shape))
    low, high = jnp.full(shape, -2, jnp.int32), jnp.full(shape, INFINITY, jnp.int32)
    bound = bisect(lambda t: _count(bits > t, axes) <= keep, low, high, 32)
    above = bits > bound
    return above | first(bits == bound, keep - _count(above, axes), axes)


def largest_in_groups(w: jax.Array, keep: jax.Array, axis: int, size: int) -> jax.Array:
    """True at the `keep` largest magnitudes of each run of `size` along `axis` (negative); exactly so many, ties go to the lower index."""
    at = w.ndim + axis
    groups = magnitude_bits(w).reshape(*w.shape[:at], -1, size, *w.shape[at + 1 :])
    own, other = jnp.expand_dims(groups, at + 2), jnp.expand_dims(groups, at + 1)
    order = jnp.arange(size).reshape(size, *(1,) * (w.ndim - at - 1))
    earlier = jnp.expand_dims(order, 0) < jnp.expand_dims(order, 1)
    rank = jnp.sum((other > own) | ((other == own) & earlier), axis=at + 2)
    return (rank < keep).reshape(w.shape)


def magnitude_bits(w: jax.Array) -> jax.Array:
    """|w| as int32 whose order is that of the magnitudes."""
    return jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(w)).astype(jnp.float32), jnp.int32)


def bisect(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array, halvings: int) -> jax.Array:
    """The smallest integers in (low, high] where `holds` is true; it must be monotone and true at `high`."""

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        inside = middle > low  # else the interval is down to `high`
        holding = holds(middle)
        return jnp.where(inside & ~holding, middle, low), jnp.where(inside & holding, middle, high)

    return jax.lax.fori_loop(0, halvings, halve, (low, high))[1]


def first(chosen: jax.Array, keep: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The first `keep` true entries of each slice over `axes`, in row-major order."""

    def cut() -> jax.Array:
        index = _index(chosen.shape, axes)
        low, high = jnp.full_like(keep, -1), jnp.full_like(keep, _slice_size(chosen, axes))
        halvings = _slice_size(chosen, axes).bit_length() + 1
        bound = bisect(lambda i: _count(chosen & (index < i), axes) >= keep, low, high, halvings)
        return chosen & (index < bound)

    return jax.lax.cond(jnp.all(_count(chosen, axes) == keep), lambda: chosen, cut)


def _index(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """The row-major position of every entry within its slice."""
    index, stride = jnp.zeros((), jnp.int32), 1
    for axis in sorted(axes, reverse=True):
        index = index + stride * jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis)
        stride *= shape[axis]
    return index


def _count(chosen: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(chosen, axis=axes, keepdims=True, dtype=jnp.int32)


def _select_globally(weights: Weights, masks: Mapping[str, Mask], ramp: Ramp, index: Any) -> Masks:
    """One threshold for all slices of all leaves.

    Counts of all weights may not fit int32, so what is summed is each slice's count less its even share of the target.
    """
    bits = {path: magnitude_bits(w) for path, w in weights.items()}
    axes = {path: masks[path].axes for path in weights}
    sizes = {path: _slice_size(w, axes[path]) for path, w in weights.items()}
    slices = {path: w.size // sizes[path] for path, w in weights.items()}
    shares = {path: ramp.kept(size) for path, size in sizes.items()}
    wanted = ramp.kept(sum(w.size for w in weights.values()))
    rest = [total - sum(slices[path] * shares[path][i] for path in weights) for i, total in enumerate(wanted)]

    def excess(bound: jax.Array) -> jax.Array:
        parts = [(_count(bits[path] > bound, axes[path]) - _at(shares[path], index)).ravel() for path in weights]
        return jnp.concatenate([*parts, -_at(rest, index)[None]])

    def fits(bound: jax.Array) -> jax.Array:
        parts = excess(bound)
        rough = parts.astype(jnp.float32).sum()
        return jnp.where(jnp.abs(rough) > NEVER, rough < 0, parts.sum() <= 0)

    bound = bisect(fits, jnp.int32(-2), jnp.int32(INFINITY), 32)
    missing = -excess(bound).sum()
    made = {}
    for path in weights:
        ties = bits[path] == bound
        count = _count(ties, axes[path])
        before = (jnp.cumsum(count.ravel()) - count.ravel()).reshape(count.shape)
        made[path] = (bits[path] > bound) | first(ties, jnp.clip(missing - before, 0, count), axes[path])
        missing = missing - jnp.minimum(count.sum(), missing)
    return made
