"""Dynamic loss scaling for float16, as an optax-style transform (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2).

The step multiplies the loss by `current_scale(opt_state)` before differentiating; this transform divides the gradients, skips the whole update where
one of them is not finite (halving the scale), and doubles the scale after a run of clean steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LossScaleState(NamedTuple):
    """scale: float32; clean: clean steps since the last change; skipped: updates skipped in all; inner: the wrapped state."""

    scale: jax.Array
    clean: jax.Array
    skipped: jax.Array
    inner: Any


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
    minimum: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer. A step with a non-finite gradient leaves parameters and `inner` bit for bit as they were."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.int32(0), jnp.int32(0), inner.init(params))

    def update(updates: Any, state: LossScaleState, params: Any = None, **extra: Any) -> tuple[Any, LossScaleState]:
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates)]))
        unscaled = jax.tree.map(lambda g: g / state.scale.astype(g.dtype), updates)
        stepped, new_inner = inner.update(unscaled, state.inner, params, **extra)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        clean = jnp.where(finite, state.clean + 1, 0)
        grow = clean >= growth_interval
        scale = jnp.where(finite, state.scale, jnp.maximum(state.scale / factor, minimum))
        scale = jnp.where(grow, scale * factor, scale)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        made = LossScaleState(scale, jnp.where(grow, 0, clean), skipped, keep(new_inner, state.inner))
        return keep(stepped, jax.tree.map(jnp.zeros_like, stepped)), made

    return optax.GradientTransformationExtraArgs(init, update)


def current_scale(opt_state: Any) -> jax.Array:
    """The factor for the loss; 1 where the optimizer does not scale. Float32 scalar."""
    is_scale = lambda x: isinstance(x, LossScaleState)  # noqa: E731
    found = [x.scale for x in jax.tree.leaves(opt_state, is_leaf=is_scale) if is_scale(x)]
    return found[0] if found else jnp.float32(1.0)
