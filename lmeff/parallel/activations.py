"""Bytes of activations that a device keeps for the backward pass, from the traced block alone, and the remat policy that fits a budget.

The sum of what one block's gradient rule is given, times the device's layers: exact where a policy names what is kept. Without one ("none") XLA
keeps somewhat less, because it merges and recomputes on its own.

A block is traced once for each kind of model and policy, at small sizes that are all different, so that every dim of what is kept names its letter. The
letters then have the sizes of any model of that kind on any mesh.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.core.grouped import block_size, padded_rows
from lmeff.core.ops import make_ops
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import map_with_path
from lmeff.models.attention import SHORT, attention, form_of
from lmeff.models.config import ModelConfig, MoE
from lmeff.models.moe import row_capacity
from lmeff.models.remat import HOST, parse, wrapper
from lmeff.models.splash import LANES
from lmeff.models.transformer import ROUTER, block, param_specs, sites
from lmeff.parallel.mesh import BATCH_AXES, Layout, MeshPlan, plan_layout

HEAD = ("C", "r", "s", "c")  # letters of a head's channels
ORDER = ("none", "dots", "names", "save:attn_out", "full")  # from least to most recomputation


def kept_bytes(remat: str, cfg: ModelConfig, layout: Layout, rows: int, tokens: int, dtype: Any) -> int:
    """Bytes a device keeps of all its layers under a policy, for a microbatch of so many rows [B, T] of the whole mesh."""
    return -(-cfg.layers // layout.size(("pipe",))) * layer_bytes(remat, cfg, layout, rows, tokens, dtype)


def layer_bytes(remat: str, cfg: ModelConfig, layout: Layout, rows: int, tokens: int, dtype: Any) -> int:
    """Of one layer. What waits in the host's memory is not counted, but on the CPU, which has only that."""
    sizes, arrays = local_sizes(cfg, layout, rows, tokens), kept_arrays(remat, cfg, layout, tokens, dtype)
    filled = stored_sizes(sizes, layout.platform)
    return sum(
        array.bytes(filled if array.of_heads else sizes)
        for array in arrays
        if not array.host or layout.platform == "cpu"
    )


def offloaded_bytes(remat: str, cfg: ModelConfig, layout: Layout, rows: int, tokens: int, dtype: Any) -> int:
    """Bytes of all layers of a device that wait in the host's memory, for a microbatch."""
    sizes, arrays = local_sizes(cfg, layout, rows, tokens), kept_arrays(remat, cfg, layout, tokens, dtype)
    own = -(-cfg.layers // layout.size(("pipe",)))
    return own * sum(array.bytes(sizes) for array in arrays if array.host)


class Kept(NamedTuple):
    """An array that the backward pass of one block is given: the letters of each dim (several where dims are merged), bytes of a number, and whether it
    waits in the host's memory.

    The residual stream and what is added to it, [B, T, D], are cut over T also where no head or neuron is.
    """

    dims: tuple[str, ...]
    itemsize: int
    host: bool = False

    @property
    def of_heads(self) -> bool:
        """Whether the last dim is a head's channels, or those of them that turn or do not."""
        return self.dims[-1] in HEAD

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """On a device where letters have these sizes."""
        dims = ("B", "t", "D") if self.dims == ("B", "T", "D") else self.dims
        return self.itemsize * math.prod(sizes[letter] for dim in dims for letter in dim)


def local_sizes(cfg: ModelConfig, layout: Layout, rows: int, tokens: int) -> dict[str, int]:
    """What a device has of each letter: T is time whole over tensor, t as the residual stream is cut; of a head r channels turn in c pairs, s do not;
    of experts A choices, M rows of buffers."""
    parts, shape = layout.size(("tensor",)), layout.mesh.shape
    length = tokens // shape["context"]
    sizes = {
        **cfg.sizes,
        "B": rows // layout.size(BATCH_AXES),
        "T": length,
        "t": length // parts if length % parts == 0 else length,
    }
    for letter in "HKF":
        sizes[letter] = max(sizes[letter] // parts, 1)
    turned = cfg.rotary_size
    sizes |= {"G": sizes["H"] // sizes["K"], "c": turned // 2, "r": turned, "s": cfg.head_size - turned}
    return sizes if cfg.moe is None else sizes | _expert_sizes(cfg, sizes, shape["expert"], tokens)


def stored_sizes(sizes: Mapping[str, int], platform: str) -> dict[str, int]:
    """The sizes of letters in arrays that end with a head's channels: on a TPU these fill whole vectors, so that a head of 64 takes as much as one of 128."""
    whole = {letter: -(-sizes[letter] // LANES) * LANES for letter in HEAD}
    return {**sizes, **whole} if platform == "tpu" else {**sizes}


def _expert_sizes(cfg: ModelConfig, sizes: Mapping[str, int], devices: int, tokens: int) -> dict[str, int]:
    """Of the letters that a layer of experts adds: E on this device, e in all; k choices a token, N tokens, A choices and M rows of the buffers here."""
    moe, own = cfg.moe, sizes["B"] * sizes["T"]
    assert moe is not None
    held = moe.experts // devices
    found = {"E": held, "e": moe.experts, "k": moe.top_k, "f": moe.shared * sizes["F"]}
    if moe.capacity is None:
        tokens, most = own * devices, own * devices * min(moe.top_k, held)
        return found | {
            "N": tokens,
            "A": tokens * moe.top_k,
            "M": padded_rows(most, held, block_size(most, held)),
            "Q": 0,
        }
    room = sizes["B"] * min(row_capacity(moe, tokens), sizes["T"])
    return found | {"N": own, "A": own * moe.top_k, "M": moe.experts * room, "Q": room * devices}


def kept_arrays(remat: str, cfg: ModelConfig, layout: Layout, tokens: int, dtype: Any) -> tuple[Kept, ...]:
    """What the gradient rule of one block is given besides weights and ids."""
    length, width = tokens // layout.mesh.shape["context"], cfg.head_size
    # Rows that are cut have forms of their own.
    platform = layout.platform if layout.mesh.shape["context"] == 1 else "cpu"
    splash = form_of(platform, (1, length, 1, width), (1, length, 1, width)) == "splash"
    small = dataclasses.replace(
        cfg,
        vocab=8,
        width=44,
        layers=2,
        heads=6,
        kv_heads=6 if cfg.heads == cfg.kv_heads else 3,
        head_width=width if splash else 20,
        ffn=52,
        norm_eps=1e-5,
        context=8 if cfg.positions == "learned" else None,
        rope_theta=1e4,
        rope_scaling=None,
        rope_local_theta=None,
        rope_fraction=1.0 if cfg.rope_fraction == 1 else 0.75 if splash else 0.8,
        window=None if cfg.window is None else 8,
        full_layers=(0,) if cfg.mixed else (),
        attention_scale=None,
        embed_scale=None,
        moe=None if cfg.moe is None else _small_experts(cfg.moe),
    )
    time = 384 if splash else 72 if length <= SHORT else SHORT + 256
    return _traced(remat, small, platform, time, jnp.dtype(dtype))


def _small_experts(moe: MoE) -> MoE:
    top = 1 if moe.top_k == 1 else 2
    return dataclasses.replace(moe, experts=7, top_k=top, shared=min(moe.shared, 1), balance=1.0, router_z=1.0)


@functools.cache
def _traced(remat: str, cfg: ModelConfig, platform: str, tokens: int, dtype: Any) -> tuple[Kept, ...]:
    """The same of a small model whose sizes are all different."""
    rows, specs = 5, param_specs(cfg)["blocks"]
    x, ids = jax.ShapeDtypeStruct((rows, tokens, cfg.width), dtype), jax.ShapeDtypeStruct((rows, tokens), "int32")
    batch = Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, "float32"))
    ops = make_ops(attend=functools.partial(_attend, platform))({}).ops

    def pulled(x: Any, p: Any, batch: Batch) -> Any:
        step = wrapper(parse(remat, sites(cfg)))(lambda x, p: block(x, p, batch, cfg, ops, 0))
        return jax.vjp(step, x, p)[1]

    traced = jax.make_jaxpr(pulled)(x, map_with_path(_layer(dtype), specs), batch).jaxpr
    given = {
        id(v) for v in (*traced.invars[1:], *traced.constvars)
    }  # all but the block's input; which layers see all is a constant
    outs = {id(v): v.aval for v in traced.outvars if id(v) not in given and v.aval.shape}
    letters = _letters_by_size(cfg, rows, tokens)
    return tuple(
        Kept(tuple(letters[size] for size in x.shape), x.dtype.itemsize, x.memory_space == jax.memory.Space.Host)
        for x in outs.values()
    )


def _letters_by_size(cfg: ModelConfig, rows: int, tokens: int) -> dict[int, str]:
    """The letters of a dim of so many, those of two that are merged last; raises `KeyError` when asked for a size that no letters have."""
    layout = plan_layout(MeshPlan(), 1)
    sizes = {
        letter: n for letter, n in local_sizes(cfg, layout, rows, tokens).items() if letter not in "etVLP" and n > 1
    }
    pairs = {sizes[a] * sizes[b]: a + b for a, b in itertools.combinations(sizes, 2)}
    blocks = {tokens // 128: ""}  # a dim of the splash kernel's table of blocks, a few bytes for the whole batch
    return {**blocks, **pairs, **{n: letter for letter, n in reversed(sizes.items())}, 1: ""}


def _attend(platform: str, q: Any, k: Any, v: Any, segments: Any, **options: Any) -> Any:
    return attention(q, k, v, segments_BT=segments, platform=platform, **options)


def _layer(dtype: Any) -> Any:
    """A stacked weight's spec as the shape of one layer; the router stays in float32, as `cast_floating` leaves it."""

    def leaf(path: str, spec: ParamSpec) -> Any:
        return jax.ShapeDtypeStruct(spec.shape[1:], jnp.float32 if path.endswith(ROUTER.key) else dtype)

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
