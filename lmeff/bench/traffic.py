"""What a forward pass with a cache must read of memory, counted from the arrays that are really there.

Per device, the fullest bound from below: each weight once, each key and value that is seen once; activations and what is written are left out. Of an embedding
only the rows of the batch's tokens are read, of experts those that are expected to be chosen where all are liked alike.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.tree import Tree, flatten
from lmeff.infer.served import Served
from lmeff.models.cache import Cache
from lmeff.models.config import ModelConfig
from lmeff.models.cost import flops_per_token
from lmeff.models.transformer import param_specs


class Traffic(NamedTuple):
    """Bytes on one device: all weights as they lie there, those of them that a pass reads, and keys and values that it reads (or, of a prompt, writes)."""

    stored: float
    weights: float
    cache: float

    @property
    def total(self) -> float:
        """What a pass moves at least."""
        return self.weights + self.cache


def decode_traffic(served: Served, cache: Cache, batch: int, seen: float) -> Traffic:
    """Of a step of `batch` tokens, one a row, that see `seen` tokens each."""
    return Traffic(weight_bytes(served.params), read_bytes(served, batch), cache_bytes(cache, seen))


def prefill_traffic(served: Served, cache: Cache, batch: int, tokens: int) -> Traffic:
    """Of `batch` prompts of `tokens` tokens: every weight is read once, keys and values are written once."""
    return Traffic(weight_bytes(served.params), read_bytes(served, batch * tokens), cache_bytes(cache, tokens))


def prefill_flops(cfg: ModelConfig, batch: int, tokens: int) -> float:
    """FLOPs of the prompts' products on all devices: `models.cost.flops_per_token`, but the head for each row's last token alone."""
    head = 2 * cfg.width * cfg.vocab
    return batch * (tokens * (flops_per_token(cfg, tokens) - head) + head)


def weight_bytes(params: Any) -> float:
    """Bytes of a tree's arrays on one device; codes of four bits count half a byte."""
    return sum(array_bytes(x) for x in jax.tree.leaves(params))


def read_bytes(served: Served, tokens: int) -> float:
    """Bytes of weights that a pass over so many tokens reads."""
    specs: Tree = flatten(param_specs(served.cfg))
    return sum(
        weight_bytes(leaf) * read_share(path, specs[path], served.cfg, tokens)
        for path, leaf in flatten(served.params).items()
    )


def read_share(path: str, spec: Any, cfg: ModelConfig, tokens: int) -> float:
    """The part of a leaf that so many tokens make a pass read."""
    if path.startswith("embed/") and not (cfg.tied and path == "embed/table"):
        return min(1.0, tokens / spec.shape[0])
    if spec.is_expert and cfg.moe is not None:
        return 1 - (1 - cfg.moe.top_k / cfg.moe.experts) ** tokens
    return 1.0


def cache_bytes(cache: Cache, seen: float) -> float:
    """Bytes of keys, values and scales that lie in the slots of the last `seen` tokens."""
    total = 0.0
    for stack in cache.stacks:
        share = min(1.0, seen / stack.v.shape[SLOTS])
        total += sum(array_bytes(x) for x in jax.tree.leaves(stack)) * share
    return total


SLOTS = 3  # the dim of slots in keys and values [L, B, K, S, C]


def array_bytes(x: jax.Array) -> float:
    """Bytes of a device's part of an array."""
    return math.prod(x.sharding.shard_shape(x.shape)) * dtype_bits(x.dtype) / 8


def dtype_bits(dtype: Any) -> int:
    """Bits of a number, also of those that are narrower than a byte."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits
