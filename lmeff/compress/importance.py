"""How much each ffn neuron, head, key-value group and layer matters: the scores that structured pruning ranks by.

"activation" follows Minitron (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679): of a channel `a` it is `sqrt(sum_rows (mean_tokens |a|)^2)`, for
layers the block influence `1 - E[cos(x_in, x_out)]` (Men et al. 2024, https://arxiv.org/abs/2403.03853). Sums are float32 on the device and float64 over
batches, never bfloat16.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError, DataError
from lmeff.core.numerics import materialize
from lmeff.core.ops import MakeOps, Ranges, Records, Scope, recording
from lmeff.core.tree import flatten
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import forward, param_specs
from lmeff.parallel.layers import layer_scan
from lmeff.parallel.mesh import Layout
from lmeff.parallel.rows import place_batch
from lmeff.parallel.seam import layout_ops


class Scores(NamedTuple):
    """Importance on the host; only the order within an array means something.

    neurons: [L, F]; [L, 0] where experts take the place of the ffn. heads: [L, H], to rank query heads within their group.
    groups: [L, K], key-value heads with their queries. layers: [L].
    """

    neurons: np.ndarray
    heads: np.ndarray
    groups: np.ndarray
    layers: np.ndarray


def scores(
    method: str, cfg: ModelConfig, params: Any, batches: Iterable[Batch], layout: Layout, *, seed: int = 0
) -> Scores:
    """Scores by "activation" (one jitted pass a batch), "magnitude" (weights alone) or "random" (the control arm; `seed` decides).

    params: the weights as the forward pass sees them; arrays or packed leaves. Only "activation" reads `batches`, and not their padding.
    """
    if method not in METHODS:
        raise ConfigError(f"shrink.importance: got '{method}', expected one of {', '.join(sorted(METHODS))}")
    found = METHODS[method](cfg, params, batches, layout, seed)
    for name, value in found._asdict().items():
        if not np.isfinite(value).all():
            raise DataError(
                f"importance ({method}): the scores of {name} are not finite, so nothing can be ranked; expected a model whose weights "
                "and activations are numbers. Use an earlier checkpoint."
            )
    return found


def _activation(cfg: ModelConfig, params: Any, batches: Iterable[Batch], layout: Layout, seed: int) -> Scores:
    def measured(params: Any, batch: Batch) -> Records:
        make = _listening(layout_ops(layout), batch.segments > 0)
        return forward(params, batch, cfg, make_ops=make, scan=layer_scan(layout)).records

    run = jax.jit(measured, out_shardings=layout.replicated)
    sums: dict[str, np.ndarray] = {}
    tokens = 0
    for batch in batches:
        tokens += int((np.asarray(batch.segments) > 0).sum())
        for name, value in jax.device_get(run(params, place_batch(batch, layout))).items():
            sums[name] = sums.get(name, 0.0) + value.astype(np.float64)
    if not tokens:
        raise DataError("importance: no batch has a token outside padding; give more text or raise calibration_batches")
    heads = np.sqrt(sums["blocks/attn.heads"].sum(-1))  # L2 over the head's channels
    return Scores(
        neurons=np.sqrt(sums["blocks/mlp.neurons"]) if cfg.moe is None else _no_neurons(cfg),
        heads=heads,
        groups=_by_group(heads, cfg),
        layers=sums["blocks/block.out"] / tokens,
    )


def _listening(make: MakeOps, real_BT: jax.Array) -> MakeOps:
    """A seam that records importance. Block influence needs two taps of one layer: the first waits in the scope that the trace opened."""

    def open_scope(ranges: Ranges) -> Scope:
        entered: dict[str, jax.Array] = {}

        def measure(name: str, x: jax.Array) -> jax.Array | None:
            if name in ("mlp.neurons", "attn.heads"):
                return channel_energy(x, real_BT)
            if name == "block.in":
                entered[name] = x
            if name == "block.out":
                return turned(entered["block.in"], x, real_BT)
            return None

        return recording(make, measure)(ranges)

    return open_scope


def channel_energy(x: jax.Array, real_BT: jax.Array) -> jax.Array:
    """`sum_rows (mean |x| over the row's real tokens)^2` of [B, T, ...], float32 [...]; a row of padding adds nothing."""
    real = real_BT.reshape(*real_BT.shape, *(1,) * (x.ndim - 2))
    total = jnp.where(real, jnp.abs(x.astype(jnp.float32)), 0.0).sum(1)
    tokens_B = jnp.maximum(real_BT.sum(1), 1).astype(jnp.float32)
    return jnp.square(total / tokens_B.reshape(-1, *(1,) * (x.ndim - 2))).sum(0)


def turned(x_BTD: jax.Array, y_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The sum of `1 - cos(x, y)` over real tokens, float32. By half the squared distance of the directions: a small angle keeps its digits."""
    x, y = (_direction(v.astype(jnp.float32)) for v in (x_BTD, y_BTD))
    return jnp.where(real_BT, 0.5 * jnp.square(x - y).sum(-1), 0.0).sum()


def _direction(x_BTD: jax.Array) -> jax.Array:
    return x_BTD * jax.lax.rsqrt(jnp.maximum(jnp.square(x_BTD).sum(-1, keepdims=True), 1e-30))


def _magnitude(cfg: ModelConfig, params: Any, batches: Iterable[Batch], layout: Layout, seed: int) -> Scores:
    """L2 norms of all the block's weights that belong to a neuron, a head or a group; of a layer, of its matrices."""
    specs = flatten(param_specs(cfg))

    def energies(params: Any) -> dict[str, jax.Array]:
        own = "FHK" if cfg.moe is None else "HK"
        sums: dict[str, Any] = dict.fromkeys(own + "L", 0.0)
        for path, w in flatten(materialize(params)).items():
            letters = specs[path].letters
            for letter in [c for c in own if c in letters] + ["L"] * (specs[path].stacked and specs[path].is_matmul):
                axes = tuple(i for i, other in enumerate(letters) if other not in ("L", letter))
                sums[letter] += jnp.square(w.astype(jnp.float32)).sum(axes)
        return sums

    found = jax.tree.map(
        lambda x: x.astype(np.float64), jax.device_get(jax.jit(energies, out_shardings=layout.replicated)(params))
    )
    heads = np.sqrt(found["H"])
    return Scores(
        neurons=np.sqrt(found["F"]) if cfg.moe is None else _no_neurons(cfg),
        heads=heads,
        groups=np.sqrt(found["K"] + _by_group(heads, cfg) ** 2),
        layers=np.sqrt(found["L"]),
    )


def _random(cfg: ModelConfig, params: Any, batches: Iterable[Batch], layout: Layout, seed: int) -> Scores:
    """Independent of weights and text."""
    rng = np.random.default_rng(seed)
    return Scores(*(rng.random(shape) for shape in _shapes(cfg)))


def _shapes(cfg: ModelConfig) -> Scores:
    layers = cfg.layers
    return Scores((layers, cfg.ffn if cfg.moe is None else 0), (layers, cfg.heads), (layers, cfg.kv_heads), (layers,))  # type: ignore[arg-type]


def _no_neurons(cfg: ModelConfig) -> np.ndarray:
    return np.zeros((cfg.layers, 0))


def _by_group(heads_LH: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """L2 over the query heads of each key-value head, [L, K]."""
    return np.sqrt(np.square(heads_LH.reshape(cfg.layers, cfg.kv_heads, -1)).sum(-1))


METHODS: dict[str, Callable[[ModelConfig, Any, Iterable[Batch], Layout, int], Scores]] = {
    "activation": _activation,
    "magnitude": _magnitude,
    "random": _random,
}
