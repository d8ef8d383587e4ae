"""Attention on TPUs: the Pallas kernel that JAX ships ("splash": sparse flash), with the model's conventions around it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lmeff.models.mask import Mask, by_kind

BLOCKS = (512, 256, 128)  # tokens of a tile, the largest that divides the row; a TPU's vector has 128 lanes
LANES = 128


def fits(q_shape: Sequence[int], k_shape: Sequence[int]) -> bool:
    """Whether the kernel takes local shapes [B, T, H, C] and [B, S, K, C]: whole tiles, heads of whole vectors or of half of one."""
    length, width = q_shape[1], q_shape[3]
    return length == k_shape[1] and length % BLOCKS[-1] == 0 and (width % LANES == 0 or width == LANES // 2)


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array,
    mask: Mask,
    full: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """A form of attention, for shapes that fit. Inside `jax.shard_map` only where it does not check what varies over the mesh.

    interpret: runs the kernel step by step on any platform, for tests.
    Products of bfloat16 need `jax_default_matmul_precision` at its default: the kernel cannot be compiled at a higher one.
    """
    scaled = q_BTHC * jnp.asarray(q_BTHC.shape[-1] ** -0.5, q_BTHC.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (scaled, k_BSKC, v_BSKC))
    if full is None:
        out_BHTC = _run(q, k, v, segments_BT, mask, interpret)
    else:
        out_BHTC: Any = _chosen(q, k, v, segments_BT, full, mask, interpret)
    # To the kernel padding is a document like any other.
    return jnp.where(segments_BT[..., None, None] > 0, out_BHTC.swapaxes(1, 2), 0)


def _run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, mask: Mask, interpret: bool) -> Any:
    run = _kernel(q.shape[2], q.shape[1], mask, interpret)
    return jax.vmap(run)(q, k, v, kernel.SegmentIds(segments, segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chosen(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: jax.Array, mask: Mask, interpret: bool
) -> jax.Array:
    """The kernel with or without a window. The gradient of a choice would keep what both kernels keep, blocks of masks and all; this one keeps the inputs
    and runs the chosen kernel's forward pass again."""
    return by_kind(lambda mask: _run(q, k, v, segments, mask, interpret), mask, full)


def _pull(mask: Mask, interpret: bool, saved: Any, g: jax.Array) -> Any:
    q, k, v, segments, full = saved

    def gradients(mask: Mask) -> Any:
        return jax.vjp(lambda q, k, v: _run(q, k, v, segments, mask, interpret), q, k, v)[1](g)

    return (*by_kind(gradients, mask, full), None, None)


def _save(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, full: jax.Array, mask: Mask, interpret: bool
) -> Any:
    return checkpoint_name(_chosen(q, k, v, segments, full, mask, interpret), "attn_out"), (q, k, v, segments, full)


_chosen.defvjp(_save, _pull)


def _kernel(length: int, heads: int, mask: Mask, interpret: bool) -> kernel.SplashAttentionKernel:
    """The kernel of one row. Its name for what it keeps is the one the other forms use, so remat policies see it too."""
    size = next(block for block in BLOCKS if length % block == 0)
    # The fused backward kernel would keep a query gradient for every block of keys: length / 512 times the memory.
    blocks: Any = {f"block_{name}": size for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    square = (length, length)
    seen = masks.CausalMask(square) if mask.window is None else masks.LocalMask(square, (mask.window - 1, 0), 0)
    return kernel.make_splash_mha(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=mask.softcap,
        residual_checkpoint_name="attn_out",
        interpret=interpret,
    )


interpreted = functools.partial(attend, interpret=True)
