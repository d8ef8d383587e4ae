"""Bytes of activations that a device keeps for the backward pass, from the traced block alone, and the remat policy that fits a budget.

The sum of what one block's gradient rule is given, times the device's layers: exact where a policy names what is kept. Without one ("none") XLA
keeps somewhat less, because it merges and recomputes on its own.
"""

import dataclasses
import functools
from typing import Any

import jax

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.core.ops import make_ops
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import map_with_path
from lmeff.models.attention import attention
from lmeff.models.config import ModelConfig
from lmeff.models.remat import HOST, parse, wrapper
from lmeff.models.transformer import block, param_specs, sites
from lmeff.parallel.mesh import BATCH_AXES, Layout

ORDER = ("none", "dots", "names", "save:attn_out", "full")  # from least to most recomputation


def kept_bytes(remat: str, cfg: ModelConfig, layout: Layout, rows: int, tokens: int, dtype: Any) -> int:
    """Bytes a device keeps of all its layers under a policy, for a microbatch of so many rows [B, T] of the whole mesh."""
    parts = layout.size(("tensor",))
    local = dataclasses.replace(
        cfg, heads=cfg.heads // parts, kv_heads=cfg.kv_heads // parts, ffn=cfg.ffn // parts, head_width=cfg.head_size
    )
    own_rows, length = rows // layout.size(BATCH_AXES), tokens // layout.size(("context",))
    stream = (own_rows, length, cfg.width)
    each = _kept(remat, local, layout.platform, stream, dtype)
    total = sum(x.size * x.dtype.itemsize for x in each)
    if length % parts == 0:
        # The residual stream, and what is added to it, is cut over T also where no head or neuron is. An ffn as wide as the stream would look alike.
        alone = local if local.ffn != cfg.width else dataclasses.replace(local, ffn=cfg.width + 1)
        streams = [x for x in _kept(remat, alone, layout.platform, stream, dtype) if x.shape == stream]
        total -= sum(x.size * x.dtype.itemsize * (parts - 1) // parts for x in streams)
    return -(-cfg.layers // layout.size(("pipe",))) * total


def _kept(remat: str, cfg: ModelConfig, platform: str, stream: tuple[int, ...], dtype: Any) -> list[Any]:
    """What the gradient rule of one block is given besides weights and ids."""
    ids = jax.ShapeDtypeStruct(stream[:2], "int32")
    x = jax.ShapeDtypeStruct(stream, dtype)
    p = map_with_path(_layer(dtype), param_specs(cfg)["blocks"])
    ops = make_ops(attend=functools.partial(_attend, platform))({}).ops

    def pulled(x: Any, p: Any, ids: Any) -> Any:
        step = wrapper(parse(remat, sites(cfg)))(lambda x, p: block(x, p, Batch(*[ids] * 5), cfg, ops))
        return jax.vjp(step, x, p)[1]

    traced = jax.make_jaxpr(pulled)(x, p, ids).jaxpr
    given = {id(v) for v in traced.invars[1:]}  # all but the block's input
    outs = {id(v): v.aval for v in traced.outvars if id(v) not in given and v.aval.shape}
    return list(outs.values())


def _attend(platform: str, q: Any, k: Any, v: Any, segments: Any, **options: Any) -> Any:
    return attention(q, k, v, segments_BT=segments, platform=platform, **options)


def _layer(dtype: Any) -> Any:
    """A stacked weight's spec as the shape of one layer."""

    def leaf(path: str, spec: ParamSpec) -> Any:
        return jax.ShapeDtypeStruct(spec.shape[1:], dtype)

    return leaf


def choose(remat: str, cfg: ModelConfig, layout: Layout, rows: int, tokens: int, dtype: Any) -> str:
    """The policy that a budget means on this mesh: the first of `ORDER` whose kept bytes fit. Other policies are given back as they are.

    Raises `ConfigError` where none fits, or where activations would go to the host's memory and the devices cannot reach it.
    """
    wanted = parse(remat, sites(cfg))
    if wanted.kind == "offload":
        refuse_without_host_memory(layout, f"train.remat: got '{remat}'")
    if wanted.kind != "budget":
        return remat
    sizes = {name: kept_bytes(name, cfg, layout, rows, tokens, dtype) for name in ORDER}
    for name, size in sizes.items():
        if size <= wanted.budget:
            return name
    raise ConfigError(
        f"train.remat: got '{remat}', expected at least {sizes['full'] / 2**20:.1f}MiB: what a device keeps of its layers' inputs alone. "
        "Raise the budget, or lower train.batch or raise train.accumulate, mesh.context or mesh.tensor."
    )


def refuse_without_host_memory(layout: Layout, where: str) -> None:
    """Raises `ConfigError` where the devices cannot address the host's memory; devices that are only planned for can."""
    if layout.kind is not None:
        return
    kinds = [memory.kind for memory in layout.mesh.devices.flat[0].addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"{where}, expected devices with memory of the kind '{HOST}'; {layout.platform} devices here have {', '.join(kinds)}. Turn offloading off."
        )
