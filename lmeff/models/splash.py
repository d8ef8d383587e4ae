"""Attention on TPUs: the Pallas kernel that JAX ships ("splash": sparse flash), with the model's conventions around it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lmeff.models.mask import Mask

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
    *,
    interpret: bool = False,
) -> jax.Array:
    """A form of attention, for shapes that fit. Inside `jax.shard_map` only where it does not check what varies over the mesh.

    interpret: runs the kernel step by step on any platform, for tests.
    """
    run = _kernel(q_BTHC.shape[1], q_BTHC.shape[2], mask, interpret)
    scaled = q_BTHC * jnp.asarray(q_BTHC.shape[-1] ** -0.5, q_BTHC.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (scaled, k_BSKC, v_BSKC))
    out_BHTC: Any = jax.vmap(run)(*heads_first, kernel.SegmentIds(segments_BT, segments_BT))
    # To the kernel padding is a document like any other.
    return jnp.where(segments_BT[..., None, None] > 0, out_BHTC.swapaxes(1, 2), 0)


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
