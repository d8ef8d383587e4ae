"""Keys and values of the tokens that a model has seen: what is kept, in which numbers, and how many bytes that takes.

Layers that see equally far share a stack, [L, B, K, S, C]. A stack is a ring of slots: position p lies in slot p mod S. Layers with a window have only as many
slots as the window needs, the others one for every token, where nothing ever comes around. What a slot holds follows from the row's length alone, so
taking tokens back is setting the length.
"""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.errors import ConfigError
from lmeff.core.numerics import QFormat
from lmeff.models.config import ModelConfig

FLOATS: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
SCALES = ("token", "channel")


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """In which numbers keys and values are kept; integers are symmetric with float32 scales.

    numbers:  "float32", "bfloat16", "int8" or "int4" (two codes a byte: channels c and c + C/2 in the low and the high half).
    keys:     what shares a scale: "token", the channels of a token and head; or "channel", a channel of a head over `block` tokens, which suits keys, whose
              large channels stay the same (KIVI: Liu et al. 2024, https://arxiv.org/abs/2402.02750). Values have a scale for each token and head.
    block:    tokens of such a block. Those of the unfinished block are kept in floating point.
    residual: the numbers of these.
    """

    numbers: str = "bfloat16"
    keys: str = "token"
    block: int = 32
    residual: str = "bfloat16"

    def __post_init__(self) -> None:
        """Refuses formats that do not exist."""
        if self.numbers not in BITS:
            raise ConfigError(f"cache: got numbers '{self.numbers}', expected one of {', '.join(BITS)}")
        if self.keys not in SCALES:
            raise ConfigError(f"cache: got scales of keys by '{self.keys}', expected 'token' or 'channel'")
        if self.keys == "channel" and self.numbers in FLOATS:
            raise ConfigError(
                f"cache: got scales by channel for {self.numbers}, expected int8 or int4: floats have no scales"
            )
        if self.block < 1:
            raise ConfigError(f"cache: got blocks of {self.block} tokens, expected at least 1")
        if self.residual not in FLOATS:
            raise ConfigError(f"cache: got a residual in '{self.residual}', expected float32 or bfloat16")

    @property
    def quantized(self) -> QFormat | None:
        """The format of the codes; None of floats."""
        return None if self.numbers in FLOATS else QFormat(bits=BITS[self.numbers])

    @property
    def by_channel(self) -> bool:
        """Whether keys come in blocks."""
        return self.keys == "channel"

    def __str__(self) -> str:
        """The text `parse_cache` reads."""
        return f"{self.numbers}/channel{self.block}" if self.by_channel else self.numbers


def parse_cache(text: str) -> CacheFormat:
    """Reads "float32", "bfloat16", "int8", "int4", and "int8/channel" or "int4/channel64": keys by channel, over blocks of so many tokens (default 32)."""
    match = re.fullmatch(r"(\w+?)(/channel(\d*))?", text)
    if match is None or match[1] not in BITS:
        raise ConfigError(
            f"cache: got '{text}', expected one of {', '.join(BITS)}, or int8/channel, int4/channel: keys with a scale for each channel"
        )
    if match[2] is None:
        return CacheFormat(numbers=match[1])
    return CacheFormat(numbers=match[1], keys="channel", block=int(match[3] or 32))


class Stack(NamedTuple):
    """The cache of layers that see equally far.

    k, v:    [L, B, K, S, C], floats or codes ([L, B, K, S, C/2] of "int4").
    k_scale: [L, B, K, S], or by channel [L, B, K, S / block, C]; v_scale: [L, B, K, S]. None of floats.
    tail:    [L, B, K, R, C]: the last R keys in floating point, a ring of its own; None but for keys by channel.
    """

    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None
    tail: Any = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("stacks", "length_B"), meta_fields=("format", "fresh")
)
@dataclass(frozen=True)
class Cache:
    """What a batch of rows has seen. Also a spec, when its leaves are `jax.ShapeDtypeStruct`s.

    stacks:   one for each of `groups(cfg)`.
    length_B: int32, tokens of each row.
    fresh:    nothing was written yet: the first tokens are a prompt, and see one another before they are rounded to the cache's numbers.
    """

    stacks: tuple[Stack, ...]
    length_B: Any
    format: CacheFormat
    fresh: bool

    def taken_back(self, length_B: Any) -> "Cache":
        """The cache of rows that are shorter again, by less than the chunk that it was made for; their next tokens overwrite what was there."""
        return dataclasses.replace(self, length_B=jnp.asarray(length_B, jnp.int32))


class Group(NamedTuple):
    """Layers that see equally far: their window (None sees all) and their indices."""

    window: int | None
    layers: tuple[int, ...]


def groups(cfg: ModelConfig) -> tuple[Group, ...]:
    """The stacks of a model's cache, in order of their first layers."""
    seen = cfg.layer_windows
    return tuple(
        Group(window, tuple(layer for layer, own in enumerate(seen) if own == window)) for window in dict.fromkeys(seen)
    )


def cache_specs(cfg: ModelConfig, format: CacheFormat, *, rows: int, tokens: int, chunk: int = 1) -> Cache:
    """Shapes and dtypes of an empty cache, without a device.

    rows, tokens: for so many rows of at most so many tokens.
    chunk:        the most tokens that come at once after the prompt, of which all but one may be taken back: there is room for these besides.
    """
    if format.by_channel and chunk > format.block:
        raise ConfigError(
            f"cache: got chunks of {chunk} tokens, expected at most the block of {format.block} in '{format}'"
        )
    stacks = tuple(_stack(cfg, format, group, rows, tokens, chunk) for group in groups(cfg))
    return Cache(stacks, jax.ShapeDtypeStruct((rows,), jnp.int32), format, fresh=True)


def _stack(cfg: ModelConfig, format: CacheFormat, group: Group, rows: int, tokens: int, chunk: int) -> Stack:
    slots = (tokens if group.window is None else min(tokens, group.window)) + chunk - 1
    residual = -(-(format.block + chunk - 1) // format.block) * format.block
    if format.by_channel:
        slots = -(-slots // residual) * residual
    each, width = (len(group.layers), rows, cfg.kv_heads), cfg.head_size

    def spec(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*each, *dims), dtype)

    if format.numbers in FLOATS:
        return Stack(*(spec(FLOATS[format.numbers], slots, width) for _ in "kv"))
    codes = spec(jnp.int8, slots, width // 2 if format.numbers == "int4" else width)
    if not format.by_channel:
        return Stack(codes, codes, spec(jnp.float32, slots), spec(jnp.float32, slots))
    by_channel = spec(jnp.float32, slots // format.block, width)
    tail = spec(FLOATS[format.residual], residual, width)
    return Stack(codes, codes, by_channel, spec(jnp.float32, slots), tail)


def empty_cache(specs: Cache) -> Cache:
    """Nothing seen."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), specs)


def cache_bytes(specs: Cache) -> int:
    """Bytes of keys, values and scales; not of the rows' lengths."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(specs.stacks))


STACK_LETTERS = Stack("LBKSC", "LBKSC", "LBKS", "LBKS", "LBKSC")


def stack_letters(stack: Stack) -> Stack:
    """The letters of each leaf, None where there is none."""
    letters = [None if x is None else own for x, own in zip(stack, STACK_LETTERS, strict=True)]
    by_channel = stack.tail is not None
    return Stack(*letters)._replace(k_scale="LBKSC" if by_channel else letters[2])


def cache_letters(cache: Cache) -> Cache:
    """The letters of each leaf of a cache or of its specs: B is cut as the rows of activations are, K as their heads."""
    return Cache(tuple(stack_letters(stack) for stack in cache.stacks), "B", cache.format, cache.fresh)


def held(slots: int, length_B: jax.Array) -> jax.Array:
    """The position [B, S] that each slot of a ring holds: the last one before the row's end that falls on it; negative where there is none."""
    s = jnp.arange(slots)
    return s + slots * ((length_B[:, None] - 1 - s) // slots)
