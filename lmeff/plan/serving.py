"""What serving a model takes: time of a prompt and of a token, from what is multiplied, read and sent; at full rates, so that no program is faster.

A step of decoding reads all weights once for the whole batch, and every row's keys and values. Attention's bytes grow with the batch, the weights' do not: a
larger batch helps until it has `critical_batch` tokens, and less where contexts are long.
"""

import itertools
import math
from typing import NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.core.numerics import QFormat, parse_format
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import flatten
from lmeff.models.cache import cache_bytes as array_bytes
from lmeff.models.cache import cache_specs, parse_cache
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import AXES
from lmeff.plan import limits
from lmeff.plan.hardware import Chip
from lmeff.plan.slices import ways

SCALE_BITS = 32


class Phase(NamedTuple):
    """Seconds of one forward pass: arithmetic and memory overlap, collectives over tensor wait for both. bytes: that a device reads and writes."""

    compute: float
    memory: float
    network: float
    bytes: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return max(self.compute, self.memory) + self.network

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(parts, key=parts.__getitem__)


class Serving(NamedTuple):
    """A model on so many devices (one replica, cut over tensor).

    weights, cache, arithmetic: formats. prefill: of all rows' contexts at once. decode: of one token a row, after `context` tokens.
    weight_bytes, cache_bytes: on a device. fits: whether they have room there.
    bytes_per_token: that all devices read and write for a decoded token. tokens_per_second: decoded, of one chip. critical_batch: `lmeff.plan.limits`.
    """

    weights: str
    cache: str
    arithmetic: str
    devices: int
    batch: int
    context: int
    weight_bytes: float
    cache_bytes: float
    fits: bool
    prefill: Phase
    decode: Phase
    bytes_per_token: float
    tokens_per_second: float
    critical_batch: float

    @property
    def prefill_ms(self) -> float:
        """Milliseconds a token of a prompt."""
        return 1e3 * self.prefill.seconds / (self.batch * self.context)

    @property
    def decode_ms(self) -> float:
        """Milliseconds between two tokens of a row."""
        return 1e3 * self.decode.seconds


def serving(
    cfg: ModelConfig,
    chip: Chip,
    *,
    devices: int = 1,
    weights: str = "bfloat16",
    cache: str = "bfloat16",
    arithmetic: str = "bfloat16",
    batch: int = 1,
    context: int = 1024,
) -> Serving:
    """Of a batch of rows with `context` tokens each.

    weights: of products in the blocks, "float32", "bfloat16", or a quantized format such as "fp8" or "int4/g32"; embedding, head and norms are bfloat16,
        or float32 with weights of float32. cache: the same for keys and values (`cache_bytes`). arithmetic: of these products.
    Raises `ConfigError` where heads do not divide over the devices.
    """
    if cfg.heads % devices or cfg.ffn % devices:
        raise ConfigError(
            f"serving: got {devices} devices, expected a number that divides {cfg.heads} heads and an ffn of {cfg.ffn}"
        )
    held = weight_bytes(cfg, weights) / devices
    kept = cache_bytes(cfg, cache, batch, context) / min(devices, cfg.kv_heads)
    read = weight_bytes(cfg, weights, tokens=batch, reads=True) / devices
    prompt_read = weight_bytes(cfg, weights, tokens=batch * context, reads=True) / devices
    decode = _phase(cfg, chip, devices, arithmetic, batch, 1, context, read + kept)
    prefill = _phase(cfg, chip, devices, arithmetic, batch, context, context, prompt_read + kept)
    return Serving(
        weights=weights,
        cache=cache,
        arithmetic=arithmetic,
        devices=devices,
        batch=batch,
        context=context,
        weight_bytes=held,
        cache_bytes=kept,
        fits=held + kept <= chip.room(devices),
        prefill=prefill,
        decode=decode,
        bytes_per_token=decode.bytes * devices / batch,
        tokens_per_second=batch / decode.seconds / chip.chips(devices),
        critical_batch=limits.critical_batch(chip, weights=bits(weights), arithmetic=arithmetic),
    )


def table(cfg: ModelConfig, chip: Chip, *, devices: int = 1, batch: int = 1, context: int = 1024) -> list[Serving]:
    """The same for every pair of formats; codes times bfloat16 where only weights are quantized, codes times codes as "int8" or "fp8"."""
    return [
        serving(cfg, chip, devices=devices, weights=w, cache=c, arithmetic=arithmetic, batch=batch, context=context)
        for (w, arithmetic), c in itertools.product(WEIGHTS, CACHES)
    ]


def cache_bytes(cfg: ModelConfig, cache: str, rows: int, tokens: int) -> float:
    """Bytes of the keys and values of so many rows, all layers; a layer with a window keeps no more than its own tokens.

    "fp8", "int8" and "int4" have a float32 scale for each token and head, "int4/g32" one for each 32 numbers of a head, "int8/tensor" one a layer; affine
    ones a zero point of 32 bits for each scale. "int4/channel" and the like are counted by the very arrays (`lmeff.models.cache.CacheFormat`).

    Llama-3-8B: 2 x 32 layers x 8 heads x 128 numbers x 2 bytes are 128 KiB a token; int8 with scales is (128 + 4) / 256 of that.

    >>> from lmeff.models.config import preset
    >>> [cache_bytes(preset("llama3_8b"), cache, 1, 8192) / 2**20 for cache in ("bfloat16", "int8")]
    [1024.0, 528.0]
    """
    if "/channel" in cache:
        return float(array_bytes(cache_specs(cfg, parse_cache(cache), rows=rows, tokens=tokens)))
    seen = sum(count * min(tokens, window or tokens) for window, count in cfg.windows)
    heads = 2 * cfg.kv_heads * seen * rows
    codes = heads * cfg.head_size * bits(cache) / 8
    if cache in FLOATS:
        return codes
    format = _quantized(cache)
    groups = {"channel": 1, "group": -(-cfg.head_size // (format.group or cfg.head_size))}
    scales = 2 * cfg.layers if format.granularity == "tensor" else heads * groups[format.granularity]
    return codes + _beside(format, scales)


def bits(name: str) -> float:
    """Of one number, without scales; raises `ConfigError` for what is no format."""
    if name in FLOATS:
        return FLOATS[name]
    return _quantized(name).width


def _quantized(name: str) -> QFormat:
    try:
        return parse_format(name)
    except ConfigError as error:
        raise ConfigError(f"{error}; or one of {', '.join(FLOATS)}") from error


def weight_bytes(cfg: ModelConfig, weights: str, *, tokens: float = math.inf, reads: bool = False) -> float:
    """All weights, or what a pass over so many tokens reads of them: not the embedding's table, and only experts that some token goes to."""
    wide = FLOATS["float32" if weights == "float32" else "bfloat16"]
    specs = flatten(param_specs(cfg))
    total = 0.0
    for path, spec in specs.items():
        if reads and path == "embed/table" and not cfg.tied:
            continue
        quantized = path.startswith("blocks/") and spec.is_matmul and not path.endswith("/router")
        size = _stored(spec, weights) if quantized else math.prod(spec.shape) * wide / 8
        total += size * (_liked(cfg, tokens) if reads and spec.is_expert else 1.0)
    return total


def _stored(spec: ParamSpec, weights: str) -> float:
    """Bytes of a weight with its scales."""
    numbers = math.prod(spec.shape)
    if weights in FLOATS:
        return numbers * FLOATS[weights] / 8
    format = _quantized(weights)
    contracted = math.prod(spec.shape[axis] for axis in spec.axes)
    shared = {"tensor": numbers, "channel": contracted, "group": format.group or contracted}[format.granularity]
    return numbers * bits(weights) / 8 + _beside(format, numbers / shared)


def _beside(format: QFormat, scales: float) -> float:
    """Bytes of so many scales, and of affine formats as many zero points."""
    return scales * SCALE_BITS / 8 * (1 if format.symmetric else 2)


def _liked(cfg: ModelConfig, tokens: float) -> float:
    """The share of experts that some of so many tokens goes to, where they are liked evenly."""
    assert cfg.moe is not None
    return 1 - (1 - cfg.moe.top_k / cfg.moe.experts) ** tokens


def _phase(
    cfg: ModelConfig,
    chip: Chip,
    devices: int,
    arithmetic: str,
    rows: int,
    tokens: int,
    context: int,
    moved: float,
) -> Phase:
    """Of a pass over `tokens` new tokens a row, the last of which sees `context`; the head sees one token a row."""
    share = devices / chip.chips(devices)
    pairs = sum(count * _visible(window, tokens, context) for window, count in cfg.windows)
    attention = 4.0 * cfg.heads * cfg.head_size * rows * pairs
    products = 2.0 * rows * tokens * _active(cfg)
    head = 2.0 * rows * cfg.width * cfg.vocab
    float_rate = chip.rate("float32" if arithmetic == "float32" else "bfloat16")
    compute = products / chip.rate(arithmetic) + (attention + head) / float_rate
    return Phase(
        compute * share / devices,
        moved * share / chip.bandwidth,
        _collectives(cfg, chip, devices, rows * tokens),
        moved,
    )


def _visible(window: int | None, tokens: int, context: int) -> float:
    """Pairs of a new token and one that it sees in a layer."""
    full = min(window or context, context)
    if tokens == 1:
        return full
    return full * (full + 1) / 2 + (context - full) * full


def _active(cfg: ModelConfig) -> float:
    """Weights of the blocks that a token meets."""
    found = 0.0
    for path, spec in flatten(param_specs(cfg)).items():
        if path.startswith("blocks/") and spec.is_matmul:
            part = cfg.moe.top_k / cfg.moe.experts if spec.is_expert and cfg.moe is not None else 1.0
            found += part * math.prod(spec.shape)
    return found


def _collectives(cfg: ModelConfig, chip: Chip, devices: int, tokens: float) -> float:
    """Two all-reduces of the stream in bfloat16 a layer."""
    if devices == 1:
        return 0.0
    degrees = dict.fromkeys(AXES, 1) | {"tensor": devices}
    way = ways(degrees, chip).along(("tensor",))
    return cfg.layers * 2 * 2 * way.gather(tokens * cfg.width * 2)


FLOATS = {"float32": 32.0, "bfloat16": 16.0}
CACHES = ("float32", "bfloat16", "fp8", "int8", "int4")
WEIGHTS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("fp8", "bfloat16"),
    ("fp8", "fp8"),
    ("int8", "bfloat16"),
    ("int8", "int8"),
    ("int4/g64", "bfloat16"),
)
