"""Optimizers and schedules by name: optax does the work, this maps a config to it."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lmeff.core.errors import ConfigError
from lmeff.core.precision import Policy
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten
from lmeff.train.loss_scale import dynamic_loss_scale

Schedule = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters follow gradients.

    learning_rate:  the peak, for every optimizer on the scale of AdamW's except "sgd", "lamb" and "adafactor", which have their own.
    schedule:       its course after `warmup_steps` of linear warm-up, down to `final_fraction` of the peak ("constant" and "rsqrt" have no such end).
                    A run of fewer steps than that warms up until its last step.
    weight_decay:   decoupled and times the learning rate, on matrices only (not on norms, biases and learned scales).
    clip_norm:      global gradient norm is clipped to this; None does not clip.
    ema:            decay of an exponential moving average of the parameters, which is then what the stage gives; None keeps none.
    offload:        the optimizer's moments lie in the host's memory between steps: device memory for time on the bus.
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup_steps: int = 20
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    ema: float | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        """Refuses names and values that do not exist."""
        for field, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            got = getattr(self, field)
            if got not in table:
                near = difflib.get_close_matches(got, table, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ConfigError(f"optim.{field}: got '{got}', expected one of {', '.join(sorted(table))}{hint}")
        for field, (holds, expected) in LIMITS.items():
            got = getattr(self, field)
            if got is not None and not holds(got):
                raise ConfigError(f"optim.{field}: got {got}, expected {expected}")


LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda x: x > 0, "a positive number"),
    "warmup_steps": (lambda x: x >= 0, "0 or more"),
    "final_fraction": (lambda x: 0 <= x <= 1, "0 to 1"),
    "weight_decay": (lambda x: x >= 0, "0 or more"),
    "b1": (lambda x: 0 <= x < 1, "0 to below 1"),
    "b2": (lambda x: 0 <= x < 1, "0 to below 1"),
    "eps": (lambda x: x > 0, "a positive number"),
    "clip_norm": (lambda x: x > 0, "a positive number, or None"),
    "ema": (lambda x: 0 < x < 1, "a decay between 0 and 1, or None"),
}


def learning_rate_schedule(config: OptimConfig, steps: int) -> Schedule:
    """The learning rate as a function of the step: linear warm-up, then the named course over what is left."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    course = SCHEDULES[config.schedule](config, max(steps - warmup, 1))
    if not warmup:
        return course
    rise = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, course], [warmup])


def learning_rate_at(config: OptimConfig, steps: int, step: int) -> float:
    """The learning rate that step number `step` (from 0) uses."""
    return float(learning_rate_schedule(config, steps)(step))


def make_optimizer(
    config: OptimConfig, steps: int, *, policy: Policy, specs: Tree
) -> optax.GradientTransformationExtraArgs:
    """Clipping, then the named optimizer, over `(params, trainable state of the compression)`; loss scaling around it for float16."""
    check_state(config, policy)
    rate = learning_rate_schedule(config, steps)
    chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    chain.append(OPTIMIZERS[config.name](config, rate, Kinds(flatten(specs))))
    tx = stored_as(policy.state, optax.chain(*chain))
    return optax.with_extra_args_support(dynamic_loss_scale(tx) if policy.needs_loss_scale else tx)


def check_state(config: OptimConfig, policy: Policy) -> None:
    """Refuses moments in a dtype too coarse for how slowly they change."""
    if policy.state == jnp.bfloat16 and config.b2 > BFLOAT16_B2:
        raise ConfigError(
            f"optim.b2: got {config.b2} with precision state=bfloat16, expected at most {BFLOAT16_B2}: a second moment that shrinks by less than "
            "2^-8 a step is rounded back to what it was and never shrinks. Lower optim.b2 or set state=float32."
        )


BFLOAT16_B2 = 0.996


class Kinds(NamedTuple):
    """What a leaf of `(params, trainable state of the compression)` is, by its path.

    Learned scales mirror the paths of weights, but hang below a `Leaf`: their last key is not a dict key.
    """

    specs: Mapping[str, ParamSpec]

    def matrices(self, tree: Any) -> Any:
        """Which leaves are weights of a matrix product: what weight decay acts on."""
        return self._map(lambda spec, own, x: spec is not None and own and spec.is_matmul, tree)

    def stacked(self, tree: Any) -> Any:
        """Which leaves have the stack of layers as their leading dim."""
        return self._map(lambda spec, own, x: spec is not None and spec.stacked and x.shape[:1] == spec.shape[:1], tree)

    def muon(self, tree: Any) -> Any:
        """[L, in..., out...] as matrices, layer by layer and expert by expert, by the letters that the model contracts; None for what is not one."""

        def leaf(spec: ParamSpec | None, own: bool, x: Any) -> Any:
            if spec is None or not own or not spec.is_matmul or not spec.stacked:
                return None
            inputs = tuple(x.ndim + axis for axis in spec.axes)
            outputs = tuple(x.ndim + axis for axis in spec.own_axes if axis not in spec.axes)
            return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

        return self._map(leaf, tree)

    def _map(self, fn: Callable[[ParamSpec | None, bool, Any], Any], tree: Any) -> Any:
        def leaf(path: Any, x: Any) -> Any:
            keys = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
            return fn(self.specs.get(keys), isinstance(path[-1], jax.tree_util.DictKey), x)

        return jax.tree_util.tree_map_with_path(leaf, tree)


def stored_as(dtype: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the floating arrays of an optimizer's state in `dtype` between steps; a step computes, and gives its updates, in float32."""

    def cast(tree: Any, dtype: Any) -> Any:
        is_moment = lambda x: x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(dtype) if is_moment(x) else x, tree)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = jnp.float32
        updates, state = inner.update(cast(updates, wide), cast(state, wide), cast(params, wide))
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def ema_update(average: Any, new: Any, decay: float) -> Any:
    """`decay * average + (1 - decay) * new`, in the dtype of `average`."""
    # A bfloat16 weight times a Python number would round before it is averaged.
    wide = jax.tree.map(lambda n, a: n.astype(a.dtype), new, average)
    return optax.incremental_update(wide, average, 1 - decay)


def _cosine(config: OptimConfig, steps: int) -> Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, steps, alpha=config.final_fraction)


def _linear(config: OptimConfig, steps: int) -> Schedule:
    return optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_fraction, steps)


def _wsd(config: OptimConfig, steps: int) -> Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, https://arxiv.org/abs/2404.06395): constant, then linear over the last fifth."""
    decay = max(steps // 5, 1)
    fall = optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_fraction, decay)
    return optax.join_schedules([optax.constant_schedule(config.learning_rate), fall], [steps - decay])


def _rsqrt(config: OptimConfig, steps: int) -> Schedule:
    start = max(config.warmup_steps, 1)
    return lambda step: config.learning_rate * jnp.sqrt(start / (start + jnp.maximum(step, 0)))


SCHEDULES: dict[str, Callable[[OptimConfig, int], Schedule]] = {
    "constant": lambda config, steps: optax.constant_schedule(config.learning_rate),
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "wsd": _wsd,
}


def _decayed(c: OptimConfig, rate: Schedule, kinds: Kinds, direction: optax.GradientTransformation) -> Any:
    """Decoupled weight decay and the learning rate after a direction (uphill)."""
    decay = optax.add_decayed_weights(c.weight_decay, kinds.matrices)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(rate))


def _adamw(c: OptimConfig, rate: Schedule, kinds: Kinds) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""
    return _decayed(c, rate, kinds, optax.scale_by_adam(c.b1, c.b2, c.eps))


def _lion(c: OptimConfig, rate: Schedule, kinds: Kinds) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675)."""
    return _decayed(c, rate, kinds, optax.scale_by_lion(c.b1, c.b2))


def _adafactor(c: OptimConfig, rate: Schedule, kinds: Kinds) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235): factored second moments, steps relative to each leaf's size."""
    # optax.adafactor's own weight decay is not multiplied by the learning rate.
    return _decayed(c, rate, kinds, optax.chain(optax.adafactor(), optax.scale(-1.0)))


def _muon(c: OptimConfig, rate: Schedule, kinds: Kinds) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on the matrices of the blocks, layer by layer, with updates as large as AdamW's (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982); AdamW on the rest."""
    # contrib.muon has no mask for the decay of what Adam trains; so it gives the direction alone.
    direction = contrib.muon(
        1.0,
        adam_b1=c.b1,
        adam_b2=c.b2,
        eps=c.eps,
        muon_weight_dimension_numbers=kinds.muon,
        consistent_rms=0.2,
    )
    return _decayed(c, rate, kinds, optax.chain(direction, optax.scale(-1.0)))


def _sgd(c: OptimConfig, rate: Schedule, kinds: Kinds) -> optax.GradientTransformation:
    """SGD with Nesterov momentum `b1`."""
    return _decayed(c, rate, kinds, optax.trace(c.b1, nesterov=True))


def _lamb(c: OptimConfig, rate: Schedule, kinds: Kinds) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, https://arxiv.org/abs/1904.00962); a stacked leaf has one trust ratio a layer."""
    decay = optax.add_decayed_weights(c.weight_decay, kinds.matrices)
    trust = _by_layer(optax.scale_by_trust_ratio(), kinds)
    return optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), decay, trust, optax.scale_by_learning_rate(rate))


def _by_layer(inner: optax.GradientTransformation, kinds: Kinds) -> optax.GradientTransformation:
    """A transform without state that looks at one leaf at a time, on each layer of a stacked leaf."""

    def one(update: jax.Array, param: jax.Array) -> Any:
        return inner.update(update, optax.EmptyState(), param)[0]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        each = lambda stacked, u, p: (jax.vmap(one) if stacked else one)(u, p)  # noqa: E731
        return jax.tree.map(each, kinds.stacked(updates), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


OPTIMIZERS: dict[str, Callable[[OptimConfig, Schedule, Kinds], optax.GradientTransformation]] = {
    "adafactor": _adafactor,
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}
