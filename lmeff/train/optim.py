"""Optimizers and schedules by name: optax does the work, this maps a config to it."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lmeff.core.errors import ConfigError
from lmeff.core.precision import Policy
from lmeff.core.tree import Tree, flatten
from lmeff.train.loss_scale import dynamic_loss_scale

Schedule = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters follow gradients.

    learning_rate:  the peak. schedule: its course after `warmup_steps` of linear warm-up, down to `final_fraction` of the peak.
    weight_decay:   decoupled, on matrices only (not on norms, biases and learned scales).
    clip_norm:      global gradient norm is clipped to this; None does not clip.
    ema:            decay of an exponential moving average of the parameters, which is then what the stage gives; None keeps none.
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

    def __post_init__(self) -> None:
        """Refuses names and values that do not exist."""
        for field, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            got = getattr(self, field)
            if got not in table:
                near = difflib.get_close_matches(got, table, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ConfigError(f"optim.{field}: got '{got}', expected one of {', '.join(sorted(table))}{hint}")
        if self.learning_rate <= 0:
            raise ConfigError(f"optim.learning_rate: got {self.learning_rate}, expected a positive number")
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps: got {self.warmup_steps}, expected 0 or more")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"optim.ema: got {self.ema}, expected a decay between 0 and 1, or None")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"optim.clip_norm: got {self.clip_norm}, expected a positive number, or None")


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
    rate = learning_rate_schedule(config, steps)
    matrices = {path for path, spec in flatten(specs).items() if spec.is_matmul}
    chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    chain.append(OPTIMIZERS[config.name](config, rate, policy.state, lambda tree: _is_matrix(tree, matrices)))
    tx = optax.chain(*chain)
    return optax.with_extra_args_support(dynamic_loss_scale(tx) if policy.needs_loss_scale else tx)


def _is_matrix(tree: Any, matrices: set[str]) -> Any:
    """Which leaves are weights of a matrix product. Learned scales mirror the paths of weights, but hang below a `Leaf`."""

    def leaf(path: Any, _: Any) -> bool:
        keys = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return keys in matrices and isinstance(path[-1], jax.tree_util.DictKey)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def ema_update(average: Any, new: Any, decay: float) -> Any:
    """`decay * average + (1 - decay) * new`."""
    return jax.tree.map(lambda a, n: (decay * a + (1 - decay) * n).astype(a.dtype), average, new)


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
    return lambda step: config.learning_rate * jnp.sqrt(start / (start + step))


SCHEDULES: dict[str, Callable[[OptimConfig, int], Schedule]] = {
    "constant": lambda config, steps: optax.constant_schedule(config.learning_rate),
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "wsd": _wsd,
}


def _adamw(c: OptimConfig, rate: Schedule, dtype: Any, mask: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, c.b1, c.b2, c.eps, mu_dtype=dtype, weight_decay=c.weight_decay, mask=mask)


def _lion(c: OptimConfig, rate: Schedule, dtype: Any, mask: Any) -> optax.GradientTransformation:
    return optax.lion(rate, c.b1, c.b2, mu_dtype=dtype, weight_decay=c.weight_decay, mask=mask)


def _adafactor(c: OptimConfig, rate: Schedule, dtype: Any, mask: Any) -> optax.GradientTransformation:
    decay = c.weight_decay or None
    return optax.adafactor(rate, dtype_momentum=dtype, weight_decay_rate=decay, weight_decay_mask=mask)


def _muon(c: OptimConfig, rate: Schedule, dtype: Any, mask: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on the matrices of the blocks, layer by layer; AdamW on the rest."""
    return contrib.muon(
        rate,
        mu_dtype=dtype,
        weight_decay=c.weight_decay,
        weight_decay_mask=mask,
        adam_b1=c.b1,
        adam_b2=c.b2,
        muon_weight_dimension_numbers=_muon_dims,
    )


def _muon_dims(tree: Any) -> Any:
    """[L, in..., out...] as matrices: the leading dim is the layers, and the narrower side of the rest is split off as heads are."""

    def leaf(path: Any, x: Any) -> Any:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        if "blocks" not in keys or x.ndim < 3 or not isinstance(path[-1], jax.tree_util.DictKey):
            return None
        inputs = tuple(range(1, x.ndim - 1)) if keys[-1] == "wo" else (1,)
        outputs = tuple(i for i in range(1, x.ndim) if i not in inputs)
        return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _sgd(c: OptimConfig, rate: Schedule, dtype: Any, mask: Any) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(c.weight_decay, mask)
    return optax.chain(decay, optax.sgd(rate, c.b1, nesterov=True, accumulator_dtype=dtype))


def _lamb(c: OptimConfig, rate: Schedule, dtype: Any, mask: Any) -> optax.GradientTransformation:
    return optax.lamb(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask)


OPTIMIZERS: dict[str, Callable[[OptimConfig, Schedule, Any, Any], optax.GradientTransformation]] = {
    "adafactor": _adafactor,
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}
