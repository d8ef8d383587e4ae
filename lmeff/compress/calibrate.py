"""Static activation ranges from calibration batches: one jitted pass a batch, recorded through the seam.

Padding is left out: it would widen ranges with values that no loss ever sees. Sites with dynamic formats are quantized during the pass as
they will be later; static ones stay in floating point, since their grid is what is being sought.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.compress.activations import Activations
from lmeff.core.batch import Batch
from lmeff.core.errors import DataError
from lmeff.core.ops import Numerics, recording
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import View, forward, identity_view
from lmeff.parallel.layers import layer_scan
from lmeff.parallel.mesh import Layout
from lmeff.parallel.rows import place_batch
from lmeff.parallel.seam import layout_ops

BISECTIONS = 32  # halvings of a range when a percentile is sought: down to the spacing of float32


def calibrate(
    config: Activations,
    cfg: ModelConfig,
    params: Any,
    batches: Iterable[Batch],
    layout: Layout,
    *,
    view: View = identity_view,
    view_state: Any = (),
    compute_dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
    """Ranges (low, high) of the statically quantized sites: `{site: [L, 2]}`, [2] for the head; float32, the same on every mesh.

    params:     arrays or packed leaves, on the mesh or on the host.
    view:       with `view_state`, how the forward pass sees the weights (`compression.apply`): compressed weights are calibrated as they act.
    """
    numerics = config.resolve(cfg)
    if not numerics.static_sites:
        return {}

    def measured(params: Any, state: Any, batch: Batch) -> dict[str, jax.Array]:
        return batch_ranges(config, cfg, numerics, layout, params, state, batch, view, compute_dtype)

    run = jax.jit(measured, out_shardings=layout.replicated)
    found = [jax.device_get(run(params, view_state, place_batch(batch, layout))) for batch in batches if _real(batch)]
    if not found:
        raise DataError(
            "calibration: no batch has a token outside padding; give more text or lower activations.batches"
        )
    merged = {site: _merge(config, np.stack([ranges[site] for ranges in found])) for site in found[0]}
    for site, value in merged.items():
        if not np.isfinite(value).all():
            layers = np.unique(np.argwhere(~np.isfinite(value.reshape(-1, 2)))[:, 0]).tolist()
            raise DataError(
                f"calibration: the activations entering '{site}' are not finite in layers {layers}; the weights have diverged or overflow "
                "their precision. Calibrate an earlier checkpoint or a wider precision."
            )
    return jax.device_put(merged, layout.replicated)


def batch_ranges(
    config: Activations,
    cfg: ModelConfig,
    numerics: Numerics,
    layout: Layout,
    params: Any,
    view_state: Any,
    batch: Batch,
    view: View,
    compute_dtype: Any,
) -> dict[str, jax.Array]:
    """The range of each static site over one batch; pure."""
    real_BT = batch.segments > 0
    wanted = set(numerics.static_sites)
    dynamic = Numerics(tuple(pair for pair in numerics.activations if pair[0] not in wanted))

    def measure(name: str, x: jax.Array) -> jax.Array | None:
        return extent(x, real_BT, config) if name in wanted else None

    out = forward(
        params,
        batch,
        cfg,
        make_ops=recording(layout_ops(layout, dynamic), measure),
        view=view,
        view_state=view_state,
        scan=layer_scan(layout),
        compute_dtype=compute_dtype,
    )
    ranges = {name.removeprefix("blocks/"): value for name, value in out.records.items()}
    if "head" in wanted:  # the head is applied by the objective, chunk by chunk; its input is the last hidden state
        ranges["head"] = extent(out.hidden_BTD, real_BT, config)
    return ranges


def extent(x: jax.Array, real_BT: jax.Array, config: Activations) -> jax.Array:
    """(low, high) of the entries [B, T, ...] of real tokens, float32 [2]; (inf, -inf) where there are none."""
    x = x.reshape(*real_BT.shape, -1).astype(jnp.float32)
    real = real_BT[..., None]
    low = jnp.where(real, x, jnp.inf).min()
    high = jnp.where(real, x, -jnp.inf).max()
    if config.ranges == "percentile":
        tail = 1 - config.percentile / 100
        low, high = _quantile(x, real, tail, low, high), _quantile(x, real, 1 - tail, low, high)
    return jnp.stack([low, high])


def _quantile(x: jax.Array, real: jax.Array, fraction: float, low: jax.Array, high: jax.Array) -> jax.Array:
    """The least value that at least this fraction of the real entries does not exceed. By bisection on counts: sorting would gather shards."""
    needed = fraction * (real.sum() * jnp.float32(x.shape[-1]))

    def halve(_: Any, bounds: Any) -> Any:
        below, above = bounds
        middle = below + (above - below) / 2
        reached = ((x <= middle) & real).sum(-1).astype(jnp.float32).sum() >= needed
        return jnp.where(reached, below, middle), jnp.where(reached, middle, above)

    already = ((x <= low) & real).sum() >= needed  # the least entry itself is the answer
    return jnp.where(already, low, jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))[1])


def _merge(config: Activations, ranges: np.ndarray) -> np.ndarray:
    """Ranges of all batches [N, ..., 2] as one."""
    if config.ranges == "minmax":
        return np.stack([ranges[..., 0].min(0), ranges[..., 1].max(0)], axis=-1)
    if config.ranges == "percentile":
        return ranges.mean(0, dtype=np.float64).astype(np.float32)
    average = ranges[0].astype(np.float64)
    for new in ranges[1:]:
        average = config.decay * average + (1 - config.decay) * new
    return average.astype(np.float32)


def _real(batch: Batch) -> bool:
    return bool((np.asarray(batch.segments) > 0).any())
