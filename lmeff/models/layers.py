"""The layers of a model over its cache: one loop whose carry is the residual stream and all stacks, so that the cache is updated in place.

Layers that see differently far have stacks of their own, and which one a layer uses must be known when the program is made. So a turn of the loop runs one
period of the pattern of windows (Gemma 3: five layers with a window and one without); what is left of the last period follows the loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.core.ops import Ops
from lmeff.models.cache import Cache, Stack, groups
from lmeff.models.cached import How, New
from lmeff.models.config import ModelConfig

Step = Callable[..., tuple[jax.Array, Any]]


class Place(NamedTuple):
    """Where a layer of a period keeps its keys: the stack, its index there in the first period, and how much that grows with each period."""

    stack: int
    first: int
    growth: int
    window: int | None


def period(cfg: ModelConfig) -> tuple[Place, ...]:
    """The shortest run of layers that the pattern of windows repeats."""
    seen = cfg.layer_windows
    size = next(n for n in range(1, cfg.layers + 1) if all(seen[i] == seen[i % n] for i in range(cfg.layers)))
    order = [group.window for group in groups(cfg)]
    own = seen[:size]
    return tuple(Place(order.index(w), own[:i].count(w), own.count(w), w) for i, w in enumerate(own))


def through_cache(
    step: Step, x_BTD: jax.Array, layers: Any, cache: Cache, batch: Batch, cfg: ModelConfig, unroll: int = 1
) -> tuple[jax.Array, Cache]:
    """All layers on new tokens: the residual stream, and the cache with these tokens in it.

    step: `(x_BTD, layer, change) -> (x_BTD, records)`, one layer through a seam that `change` has changed.
    layers: what a scan would go over, stacked.
    """
    real_BT = batch.segments > 0
    length_B = cache.length_B + real_BT.sum(1, dtype=jnp.int32)
    new = New(jnp.where(real_BT, batch.positions, -1), length_B)
    places = period(cfg)

    def turn(carry: Any, index: Any, count: int = len(places)) -> Any:
        x_BTD, stacks = carry
        for i, place in enumerate(places[:count]):
            layer = jax.tree.map(lambda leaf, i=i: _at(leaf, index * len(places) + i), layers)
            how = How(cache.format, place.window, cfg.attention_softcap, cache.fresh)
            change, close = _opened((stacks[place.stack], index * place.growth + place.first, new, how))
            x_BTD, _ = step(x_BTD, layer, change)
            stacks = (*stacks[: place.stack], close(), *stacks[place.stack + 1 :])
        return x_BTD, stacks

    turns, left = divmod(cfg.layers, len(places))
    start, once = (x_BTD, cache.stacks), lambda carry, index: (turn(carry, index), None)
    carry, _ = jax.lax.scan(once, start, jnp.arange(turns), unroll=max(1, min(unroll // len(places), turns)))
    x_BTD, stacks = turn(carry, turns, left)
    return x_BTD, Cache(stacks, length_B, cache.format, fresh=False)


def _at(leaf: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)


def _opened(cached: tuple[Stack, Any, New, How]) -> tuple[Callable[[Ops], Ops], Callable[[], Stack]]:
    """What changes a seam so that its attention sees one layer's cache, and what gives that cache after: opened and closed within one trace."""
    found = [cached[0]]

    def change(ops: Ops) -> Ops:
        attend_cached = ops.cached
        assert attend_cached is not None, "this seam was made without attention to a cache"

        def attend(q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, segments_BT: jax.Array, **_: Any) -> Any:
            o_BTHC, found[0] = attend_cached(q_BTHC, k_BTKC, v_BTKC, found[0], *cached[1:])
            return o_BTHC

        return ops._replace(attend=attend)

    return change, lambda: found[0]
