"""Decoding and prefill, timed: formats take turns in one process, so that noise on the machine falls on all alike.

Beside its tokens a second each format says how much of the memory's bandwidth it reached: what a pass must read, over its time, over what a loop through a
large array reads on the same device in the same minutes. Compiling is timed apart. Medians and quartiles are over turns.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.bench.stream import Rate, make_stream
from lmeff.bench.traffic import Traffic, decode_traffic, prefill_flops, prefill_traffic
from lmeff.bench.variants import Variant
from lmeff.core.errors import UsageError
from lmeff.infer.engine import Engine, make_engine
from lmeff.plan.hardware import CHIPS, Chip

KINDS = ("decode", "prefill")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is run. batch: rows. context: tokens of each prompt. tokens: that a turn decodes after it, one at a time. turns: of each format."""

    batch: int = 1
    context: int = 128
    tokens: int = 32
    turns: int = 7

    def __post_init__(self) -> None:
        """Refuses what cannot be timed."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UsageError(f"{field.name}: got {getattr(self, field.name)}, expected at least 1")


class Quartiles(NamedTuple):
    """Over turns."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One format's numbers. Bytes and rates are those of one device.

    tokens_per_second: of all rows, by the median. ms: a token of every row (decode), or a token of the prompts (prefill).
    stored, read, cache: bytes of weights as they lie, of those a pass reads, of keys and values that it reads or writes.
    bytes_per_second: read and cache over the median. bandwidth_share: of the measured bandwidth. table_share: of the chip's in `lmeff.plan.chips`, where it is
    known. flops_per_second, peak_share: of prefill, the latter where the chip is known. ratio: times as fast as the first format, by the medians.
    compile_seconds: of the programs and their first run.
    """

    name: str
    tokens_per_second: float
    ms: Quartiles
    stored: float
    read: float
    cache: float
    bytes_per_second: float
    bandwidth_share: float
    table_share: float | None
    flops_per_second: float | None
    peak_share: float | None
    ratio: float
    compile_seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """runs: in order, the first is what others are compared with. bandwidth: bytes/s measured in turn with them. chip: its name, where it is known."""

    kind: str
    shape: Shape
    device: str
    mesh: str
    runs: tuple[Run, ...]
    bandwidth: Quartiles
    chip: str | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object."""
        told = dataclasses.asdict(self)
        told["bandwidth"] = self.bandwidth._asdict()
        told["runs"] = [{**run, "ms": own.ms._asdict()} for run, own in zip(told["runs"], self.runs, strict=True)]
        return told


class Contestant(NamedTuple):
    """A compiled format: `turn` gives the seconds of a pass."""

    turn: Callable[[], float]
    traffic: Traffic
    compile_seconds: float


def bench(
    kind: str, variants: Mapping[str, Variant], shape: Shape = Shape(), *, stream_size: int | None = None
) -> Result:
    """Times every variant: "decode", tokens after a prompt, one at a time, each the likeliest after the one before; or "prefill", the prompts themselves.

    stream_size: bytes of the array that measures the bandwidth; None takes one many times as large as caches.
    Raises `UsageError` for another kind or no variant, and whatever `make_engine` refuses, before anything is timed.
    """
    if kind not in KINDS:
        raise UsageError(f"bench: got '{kind}', expected one of {', '.join(KINDS)}")
    if not variants:
        raise UsageError("bench: got no format, expected at least one")
    length = shape.context + shape.tokens  # of both kinds, so that they share programs
    engines = {
        name: make_engine(own.served, batch=shape.batch, length=length, cache=own.cache)
        for name, own in variants.items()
    }
    layout = next(iter(variants.values())).served.layout
    device = layout.mesh.devices.flat[0]
    stream = make_stream(device, stream_size)
    prepare = _decoding if kind == "decode" else _prefilling
    contestants = {name: prepare(engine, shape) for name, engine in engines.items()}
    rates: list[Rate] = []
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(shape.turns):
        rates.append(stream())
        for name, one in contestants.items():
            seconds[name].append(one.turn())
    bandwidth = quartiles([rate.best for rate in rates])
    chip = chip_of(device)
    first = float(np.median(seconds[next(iter(seconds))]))
    runs = [
        _run(kind, name, variants[name], shape, one, seconds[name], first, bandwidth.median, chip)
        for name, one in contestants.items()
    ]
    return Result(
        kind=kind,
        shape=shape,
        device=device.device_kind,
        mesh=layout.describe(),
        runs=tuple(runs),
        bandwidth=bandwidth,
        chip=None if chip is None else chip.name,
    )


def _run(
    kind: str,
    name: str,
    variant: Variant,
    shape: Shape,
    one: Contestant,
    seconds: list[float],
    first: float,
    bandwidth: float,
    chip: Chip | None,
) -> Run:
    steps = shape.tokens if kind == "decode" else 1
    each = shape.tokens if kind == "decode" else shape.batch * shape.context  # what a millisecond is told for
    tokens = shape.batch * (shape.tokens if kind == "decode" else shape.context)
    took = quartiles(seconds)
    rate = one.traffic.total * steps / took.median
    served = variant.served
    flops = None
    if kind == "prefill":
        flops = prefill_flops(served.cfg, shape.batch, shape.context) / took.median / served.layout.mesh.size
    peak = None
    if chip is not None and flops is not None:
        peak = flops / (chip.rate(jnp.dtype(served.policy.compute).name) / chip.cores)
    return Run(
        name=name,
        tokens_per_second=tokens / took.median,
        ms=Quartiles(*(1e3 * t / each for t in took)),
        stored=one.traffic.stored,
        read=one.traffic.weights,
        cache=one.traffic.cache,
        bytes_per_second=rate,
        bandwidth_share=rate / bandwidth,
        table_share=None if chip is None else rate / (chip.bandwidth / chip.cores),
        flops_per_second=flops,
        peak_share=peak,
        ratio=first / took.median,
        compile_seconds=one.compile_seconds,
    )


def _prompts(engine: Engine, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, engine.served.cfg.vocab, (shape.batch, shape.context), dtype=np.int32)
    return tokens, np.full(shape.batch, shape.context, np.int32)


def _prefilling(engine: Engine, shape: Shape) -> Contestant:
    prompts = _prompts(engine, shape)

    def turn() -> float:
        start = time.perf_counter()
        jax.block_until_ready(engine.prefill(*prompts))
        return time.perf_counter() - start

    compiling = turn()
    _, cache = engine.prefill(*prompts)
    return Contestant(turn, prefill_traffic(engine.served, cache, shape.batch, shape.context), compiling)


def _decoding(engine: Engine, shape: Shape) -> Contestant:
    start = time.perf_counter()
    logits_BV, cache = jax.block_until_ready(engine.prefill(*_prompts(engine, shape)))
    begun = likeliest(logits_BV)
    where = cache.length_B.sharding

    def decode(count: int) -> None:
        nonlocal cache
        # The rows' lengths say what slots hold: setting them takes back the tokens of the turn before.
        lengths = jax.device_put(np.full(shape.batch, shape.context, np.int32), where)
        cache, tokens_B = dataclasses.replace(cache, length_B=lengths), begun
        for _ in range(count):
            logits_BV, cache = engine.decode(cache, tokens_B)
            tokens_B = likeliest(logits_BV)
        tokens_B.block_until_ready()

    def turn() -> float:
        start = time.perf_counter()
        decode(shape.tokens)
        return time.perf_counter() - start

    decode(2)  # the second step's cache is the first one's result
    compiling = time.perf_counter() - start
    seen = shape.context + (shape.tokens + 1) / 2
    return Contestant(turn, decode_traffic(engine.served, cache, shape.batch, seen), compiling)


@jax.jit
def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B]."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def quartiles(values: list[float]) -> Quartiles:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return Quartiles(float(median), float(low), float(high))


def chip_of(device: Any) -> Chip | None:
    """The chip of `lmeff.plan.chips` that JAX names so; None where the name says another form of it, whose memory is slower."""
    return CHIPS.get(KIND_OF_CHIP.get(device.device_kind, ""))


# `device_kind` as libtpu and CUDA give it. Cards on PCIe and cut-down forms have names of their own and are left out.
KIND_OF_CHIP: dict[str, str] = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
