"""Workers that train apart and meet now and then: DiLoCo (Douillard et al. 2023, https://arxiv.org/abs/2311.08105).

A worker is one place along a mesh axis: its own parameters and optimizer state, and the usual train step on its own rows, under whatever the other axes
cut. Every so many steps the mean over workers of (outer parameters - own parameters) is the gradient of an outer SGD with Nesterov
momentum, and all go on from its result. Streaming (https://arxiv.org/abs/2501.18512, without its overlap and its 4-bit transport): every leaf in
fragments, strided (of layers: each n-th), each of which meets at its own step, so that the largest exchange is one fragment.

The worker's step runs inside a `jax.shard_map` over the axis, so nothing can cross it but what is written here: the mean of the
metrics, and in the branch that is taken where a meeting is due, the fragment.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmeff.compress.base import Compression, State
from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.parallel.mesh import Layout
from lmeff.train.state import TrainState

AXES = ("dcn", "data")
Step = Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]


@dataclass(frozen=True, kw_only=True)
class LocalUpdates:
    """Workers along a mesh axis train apart and meet every so many steps, and after the last.

    every:               steps between two meetings of a parameter.
    axis:                the mesh axis of the workers, "dcn" or "data".
    outer_learning_rate: of the outer SGD on the mean of what the workers moved; 1 without momentum is their average.
    outer_momentum:      its Nesterov momentum.
    fragments:           parts of the parameters that meet one after the other, evenly spread over the steps.
    """

    every: int = 50
    axis: str = "data"
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    fragments: int = 1

    def __post_init__(self) -> None:
        """Refuses what is no schedule or no optimizer."""
        checks = {
            "every": (self.every >= 1, "at least 1"),
            "axis": (self.axis in AXES, f"one of {', '.join(AXES)}: other axes cut the model"),
            "outer_learning_rate": (self.outer_learning_rate > 0, "a positive number"),
            "outer_momentum": (0 <= self.outer_momentum < 1, "0 to below 1"),
            "fragments": (1 <= self.fragments <= self.every, "1 to every, so that each has a step of its own"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"train.local.{name}: got {getattr(self, name)}, expected {expected}")


class Outer(NamedTuple):
    """What all workers share, in float32: the outer parameters, which are what the run gives, and the outer momentum."""

    trainable: Any
    momentum: Any


def spread(state: TrainState, workers: int) -> TrainState:
    """An ordinary state as that of workers, all alike: a leading dim for what is each one's own."""
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *jnp.shape(x))), of_worker(state))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), state.trainable)
    return state._replace(**own, outer=Outer(wide, jax.tree.map(jnp.zeros_like, wide)))


def spread_shardings(places: TrainState, axis: str) -> TrainState:
    """Where `spread` puts the leaves of a state that lay in `places`."""
    own = jax.tree.map(lambda s: NamedSharding(s.mesh, P(axis, *s.spec)), of_worker(places))
    return places._replace(**own, outer=Outer(places.trainable, places.trainable))


def of_worker(state: TrainState) -> dict[str, Any]:
    """The fields that every worker has for itself."""
    return {name: getattr(state, name) for name in ("trainable", "opt", "reduction")}


def by_workers(own: Step, config: LocalUpdates, layout: Layout, compression: Compression, last: int) -> Step:
    """A step of all workers, from that of one.

    own:         the step under `layout.within` the axis, with the compression's state left as it is.
    compression: whose other state (masks) all workers share; it follows the outer parameters, and sees the outer momentum as their gradient.
    last:        the step after which all parameters meet, whatever the schedule.
    """
    mine, shared = P(config.axis), P()
    places = TrainState(mine, mine, shared, shared, shared, mine, shared)  # type: ignore[arg-type]

    def step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        one = state._replace(**jax.tree.map(lambda x: x[0], of_worker(state)))
        new, metrics = own(one, batch, frozen)
        trainable, outer = meet(config, last, new.step, new.trainable, state.outer)
        seen = jax.tree.map(lambda wide, x: wide.astype(x.dtype), outer.trainable, trainable)
        shown = State(seen.compression, state.auxiliary)
        auxiliary = compression.update(seen.params, outer.momentum.params, shown, new.step)
        stacked = jax.tree.map(lambda x: x[None], of_worker(new._replace(trainable=trainable)))
        return new._replace(**stacked, auxiliary=auxiliary, outer=outer), jax.lax.pmean(metrics, config.axis)

    return jax.shard_map(
        step,
        mesh=layout.mesh,
        in_specs=(places, mine, shared),
        out_specs=(places, shared),
        axis_names={config.axis},
        check_vma=False,
    )


def turns(config: LocalUpdates) -> tuple[int, ...]:
    """After which step of each `every` a fragment meets; the last after the last."""
    return tuple((i + 1) * config.every // config.fragments % config.every for i in range(config.fragments))


def meet(config: LocalUpdates, last: int, step: jax.Array, trainable: Any, outer: Outer) -> tuple[Any, Outer]:
    """The worker's parameters and the outer ones after a step, with what is due exchanged."""
    due = step % config.every == jnp.asarray(turns(config))
    index = jnp.where(due.any(), jnp.argmax(due) + 1, 0)
    branches = [lambda trainable, outer: (trainable, outer)]
    branches += [functools.partial(_exchange, config, i) for i in range(config.fragments)]
    branches += [functools.partial(_exchange, config, None)] if config.fragments > 1 else []
    return jax.lax.switch(jnp.where(step == last, len(branches) - 1, index), branches, trainable, outer)


def _exchange(config: LocalUpdates, fragment: int | None, trainable: Any, outer: Outer) -> tuple[Any, Outer]:
    """The outer step on one fragment, or on all."""

    def leaf(position: int, x: jax.Array, start: jax.Array, momentum: jax.Array) -> tuple[jax.Array, ...]:
        cut = _Cut.of(x.shape, config.fragments, position, fragment)
        if not cut.due:
            return x, start, momentum
        own, outer, old = (cut.take(part) for part in (x.astype(jnp.float32), start, momentum))
        moved = jax.lax.pmean(outer - own, config.axis)
        kept = config.outer_momentum * old + moved
        made = outer - config.outer_learning_rate * (moved + config.outer_momentum * kept)
        return cut.put(x, made.astype(x.dtype)), cut.put(start, made), cut.put(momentum, kept)

    leaves, tree = jax.tree.flatten(trainable)
    others = (tree.flatten_up_to(part) for part in outer)
    made = [leaf(i, *parts) for i, parts in enumerate(zip(leaves, *others, strict=True))]
    new, start, momentum = (tree.unflatten(part) for part in zip(*made, strict=True))
    return new, Outer(start, momentum)


class _Cut(NamedTuple):
    """The part of a leaf that meets: each n-th of the first dim that n divides; a leaf without one goes whole, in the turn of its position."""

    due: bool
    dim: int | None = None
    count: int = 1
    index: int = 0

    @classmethod
    def of(cls, shape: tuple[int, ...], count: int, position: int, index: int | None) -> "_Cut":
        if index is None or count == 1:
            return cls(True)
        dim = next((dim for dim, size in enumerate(shape) if size % count == 0), None)
        return cls(position % count == index) if dim is None else cls(True, dim, count, index)

    def _grid(self, x: jax.Array) -> jax.Array:
        assert self.dim is not None
        return x.reshape(*x.shape[: self.dim], -1, self.count, *x.shape[self.dim + 1 :])

    def take(self, x: jax.Array) -> jax.Array:
        return x if self.dim is None else jnp.take(self._grid(x), self.index, axis=self.dim + 1)

    def put(self, x: jax.Array, part: jax.Array) -> jax.Array:
        if self.dim is None:
            return part
        where = (*[slice(None)] * (self.dim + 1), self.index)
        return self._grid(x).at[where].set(part).reshape(x.shape)
