"""Dynamic loss scaling for float16, as an optax-style transform (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2).

The step multiplies the loss by `current_scale(opt_state)` before differentiating and divides the gradients by it, in float32. This transform skips the
whole update where one of them is not finite (halving the scale), and doubles the scale after a run of clean steps. The skipping is
`optax.apply_if_finite`'s.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PATIENCE = 50  # overflows in a row: more than it takes to halve the scale from its start to its minimum


class LossScaleState(NamedTuple):
    """scale: float32; clean: clean steps since the last change; guarded: the wrapped state, and how many updates were skipped."""

    scale: jax.Array
    clean: jax.Array
    guarded: Any


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
    minimum: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer. A step with a non-finite gradient leaves parameters and its state bit for bit as they were.

    After `PATIENCE` such steps in a row the gradient is not finite at any scale and is let through, so that the loss says so.
    """
    guard = optax.apply_if_finite(inner, PATIENCE)

    def init(params: Any) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.int32(0), guard.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, LossScaleState]:
        guarded: Any
        stepped, guarded = guard.update(updates, state.guarded, params, **extra)
        finite = guarded.last_finite
        clean = jnp.where(finite, state.clean + 1, 0)
        grow = clean >= growth_interval
        scale = jnp.where(finite, state.scale, jnp.maximum(state.scale / factor, minimum))
        scale = jnp.where(grow, scale * factor, scale)
        return stepped, LossScaleState(scale, jnp.where(grow, 0, clean), guarded)

    return optax.GradientTransformationExtraArgs(init, update)


def find(opt_state: Any) -> LossScaleState | None:
    """The loss scale's state within an optimizer's, or None."""
    is_scale = lambda x: isinstance(x, LossScaleState)  # noqa: E731
    return next((x for x in jax.tree.leaves(opt_state, is_leaf=is_scale) if is_scale(x)), None)


def current_scale(opt_state: Any) -> jax.Array:
    """The factor for the loss; 1 where the optimizer does not scale. Float32 scalar."""
    found = find(opt_state)
    return jnp.float32(1.0) if found is None else found.scale
