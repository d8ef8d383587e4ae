"""FLOPs of what runs beside the model's products: fake quantization, masks, and the optimizer's update. Counted in traced programs, on shapes alone."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmeff.compress.base import State
from lmeff.core.numerics import QFormat
from lmeff.core.ops import fake_activation
from lmeff.core.precision import Policy
from lmeff.core.precision import parse as parse_precision
from lmeff.core.specs import abstract
from lmeff.core.tree import flatten
from lmeff.models.transformer import param_specs
from lmeff.parallel.members import leaves_of
from lmeff.parallel.mesh import Layout
from lmeff.plan.jaxprs import elementwise_flops, product_flops, total, traced
from lmeff.plan.job import Shape
from lmeff.train.optim import OptimConfig, ema_update, make_optimizer
from lmeff.train.state import build_state


@functools.lru_cache(maxsize=256)
def view_flops(shape: Shape, precision: str) -> tuple[float, float]:
    """(forward, backward) of all weights seen once through their transforms: elementwise FLOPs of every layer on one device that holds all.

    What a schedule of masks does between steps is not counted: it comes seldom.
    """
    if not shape.recipe.transforms or shape.recipe.packed:
        return 0.0, 0.0
    compression, params, state = _compressed(shape, parse_precision(precision))

    def see(params: Any, trainable: Any, auxiliary: Any) -> Any:
        return compression.apply(params, State(trainable, auxiliary))

    def both(params: Any, trainable: Any, auxiliary: Any) -> Any:
        seen, pull = jax.vjp(lambda p, t: see(p, t, auxiliary), params, trainable)
        return seen, pull(seen)

    first, all_of_it = (total(traced(fn, params, *state), elementwise_flops) for fn in (see, both))
    return first, all_of_it - first


def seen_paths(shape: Shape) -> frozenset[str]:
    """The weights that transforms act on."""
    if not shape.recipe.transforms or shape.recipe.packed:
        return frozenset()
    return _seen_paths(shape)


@functools.lru_cache(maxsize=256)
def _seen_paths(shape: Shape) -> frozenset[str]:
    _, _, state = _compressed(shape, Policy())
    return frozenset(path for member in state.auxiliary for path in flatten(member))


@functools.lru_cache(maxsize=256)
def _compressed(shape: Shape, policy: Policy) -> tuple[Any, Any, State]:
    """The compression, the weights and its state, as shapes."""
    specs, compression = param_specs(shape.cfg), shape.recipe.compression
    params = abstract(specs, policy.params)
    return compression, params, jax.eval_shape(lambda p: compression.init(p, specs), params)


@functools.cache
def activation_flops(format: QFormat) -> tuple[float, float]:
    """(forward, backward) of an activation put on its integer grid, FLOPs for each of its numbers."""
    shape, site = jax.ShapeDtypeStruct((64, 256), jnp.float32), "x"
    ranges = jax.ShapeDtypeStruct((2,), jnp.float32)

    def see(x: Any, range_2: Any) -> Any:
        return fake_activation(x, (-1,), format, {site: range_2}, site)

    def both(x: Any, range_2: Any) -> Any:
        seen, pull = jax.vjp(lambda x: see(x, range_2), x)
        return seen, pull(seen)

    first, all_of_it = (total(traced(fn, shape, ranges), elementwise_flops) / (64 * 256) for fn in (see, both))
    return first, all_of_it - first


@functools.lru_cache(maxsize=256)
def optimizer_flops(shape: Shape, optim: OptimConfig, precision: str) -> float:
    """One update of all that is trained, with clipping and the moving average: elementwise FLOPs, and products where the optimizer has some (Muon)."""
    policy, specs = parse_precision(precision), param_specs(shape.cfg)
    compression, params, _ = _compressed(shape, policy)
    tx = make_optimizer(optim, STEPS, policy=policy, specs=specs)
    state = jax.eval_shape(lambda p: build_state(p, specs, compression, tx, ema=optim.ema is not None), params)

    def update(grads: Any, state: Any) -> Any:
        updates, opt = tx.update(grads, state.opt, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return trainable, opt, None if optim.ema is None else ema_update(state.ema, trainable, optim.ema)

    program = traced(update, state.trainable, state)
    return total(program, elementwise_flops) + total(program, product_flops())


def copies(layout: Layout, shape: Shape, paths: frozenset[str] | None = None) -> float:
    """On how many devices the same part of a weight lies, a mean over weights by their size: each of them does its elementwise work."""
    chosen = [leaf for leaf in leaves_of(shape.cfg, layout) if paths is None or leaf.path in paths]
    if layout.single or not chosen:
        return 1.0
    sizes = [math.prod(leaf.spec.shape) for leaf in chosen]
    held = sum(size * layout.mesh.size / layout.size(leaf.axes) for size, leaf in zip(sizes, chosen, strict=True))
    return held / sum(sizes)


STEPS = 1000  # of the schedule: its length changes no count
