"""A forward pass in one piece over layers that lie on several pipeline stages: evaluation, calibration, importance.

XLA gathers a stack that is cut over its layers before it loops over them: every device would hold all weights. Here a turn of the loop brings one layer to
all stages, which then compute alike: its stage sends it, in a sum to which the others add zeros. Training does not come here: it has a schedule.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmeff.parallel.mesh import Layout
from lmeff.parallel.stages import AXIS

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def layer_scan(layout: Layout) -> Callable[..., Any]:
    """`jax.lax.scan` for `forward` on this layout; not to be differentiated where layers are cut."""
    return functools.partial(_scan, layout) if AXIS in layout.axes("L") else jax.lax.scan


def _scan(layout: Layout, step: Callable[..., Any], carry: Any, layers: Any, *, unroll: int = 1) -> Any:
    """`jax.lax.scan(step, carry, layers)`, a layer at a time on every stage."""
    count = jax.tree.leaves(layers)[0].shape[0]
    if count % layout.size((AXIS,)):  # layers that do not divide are on every stage
        return jax.lax.scan(step, carry, layers, unroll=unroll)
    fetch = jax.shard_map(
        _fetch, mesh=layout.mesh, in_specs=(P(AXIS), P()), out_specs=P(), axis_names={AXIS}, check_vma=False
    )

    def turn(carry: Any, index: jax.Array) -> Any:
        return step(carry, fetch(layers, index))

    return jax.lax.scan(turn, carry, jnp.arange(count), unroll=unroll)


def _fetch(runs: Any, index: jax.Array) -> Any:
    """Inside a `jax.shard_map` over pipe: layer `index` of stacks whose run [L / p, ...] is here."""

    def leaf(run: jax.Array) -> jax.Array:
        own = index - jax.lax.axis_index(AXIS) * run.shape[0]
        here = (own >= 0) & (own < run.shape[0])
        layer = run[jnp.where(here, own, 0)]
        bits = _to_bits(layer)
        return _from_bits(jax.lax.psum(jnp.where(here, bits, jnp.zeros_like(bits)), AXIS), layer.dtype)

    return jax.tree.map(leaf, runs)


def _to_bits(x: jax.Array) -> jax.Array:
    """Whole numbers with the bits of `x`: added to zeros they stay what they are, whatever they mean."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize])
    return x.astype(jnp.int8) if x.dtype == jnp.bool_ or jnp.iinfo(x.dtype).bits < 8 else x


def _from_bits(bits: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype) if jnp.issubdtype(dtype, jnp.floating) else bits.astype(dtype)
