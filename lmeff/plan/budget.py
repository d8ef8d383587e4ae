"""What there is room for: the largest batch and context of a training job, and the gentlest compression that meets a target of bytes or decoding time."""

import math
from collections.abc import Callable
from typing import NamedTuple

from lmeff.config import Stage
from lmeff.core.errors import ConfigError
from lmeff.core.specs import count
from lmeff.distill.objectives import Distill
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import BATCH_AXES
from lmeff.parallel.order import CHUNKS
from lmeff.plan.compressions import CACHES, EXPECTED, Candidate, code, decode_ms, recipes, stored_bytes
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.legal import check
from lmeff.plan.predict import fullest


class Fit(NamedTuple):
    """What a job has room for, all else as it is.

    rows, tokens: the largest global batch at the job's context, and the largest context at the job's batch; 0 where not even the smallest fits.
    row_step, token_step: they are multiples of.
    rows_bytes, tokens_bytes: on the fullest device then. more_rows_bytes, more_tokens_bytes: with one step more, which is above the capacity; 0 where a
        budget of `train.remat` is what refuses it.
    """

    rows: int
    tokens: int
    row_step: int
    token_step: int
    rows_bytes: int
    tokens_bytes: int
    more_rows_bytes: int
    more_tokens_bytes: int
    capacity: int


def fit(job: Job, chip: Chip, *, most: int = 2**20) -> Fit:
    """The largest batch and context that fit, by bisection. Memory grows with both.

    most: multiples of a step that are tried at most. Raises `ConfigError` for a job that cannot train.
    """
    row_step, token_step = steps(job)
    capacity = chip.room(job.devices)
    check(job.changed(rows=row_step))
    check(job.changed(tokens=token_step))
    rows = _largest(lambda n: job.changed(rows=n * row_step), capacity, most)
    tokens = _largest(lambda n: job.changed(tokens=n * token_step), capacity, most)
    return Fit(
        rows=rows.count * row_step,
        tokens=tokens.count * token_step,
        row_step=row_step,
        token_step=token_step,
        rows_bytes=rows.bytes,
        tokens_bytes=tokens.bytes,
        more_rows_bytes=rows.more,
        more_tokens_bytes=tokens.more,
        capacity=capacity,
    )


def steps(job: Job) -> tuple[int, int]:
    """What the batch and the context must be multiples of: what the mesh cuts, and of tokens the 128 that a TPU's tiles have."""
    degrees = job.degrees
    parts = CHUNKS[job.mesh.sequence] * degrees["context"] if degrees["context"] > 1 else 1
    rows = math.prod(degrees[axis] for axis in BATCH_AXES) * job.accumulate
    return rows, math.lcm(parts, degrees["context"] * degrees["tensor"], TILE if job.platform == "tpu" else 1)


TILE = 128


class _Most(NamedTuple):
    """The largest count that fits, its bytes, and those of one more."""

    count: int
    bytes: int
    more: int


def _largest(make: Callable[[int], Job], capacity: int, most: int) -> _Most:
    """Doubles until it does not fit, then halves what is between."""
    seen: dict[int, float] = {0: 0}

    def size(count: int) -> float:
        if count not in seen:
            seen[count] = _bytes_of(make(count))
        return seen[count]

    high = 1
    while high < most and size(high) <= capacity:
        high *= 2
    low = 0 if high == 1 else high // 2
    if size(high) <= capacity:
        return _Most(high, int(size(high)), int(size(high)))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= capacity else (low, middle)
    more = size(low + 1)
    return _Most(low, int(size(low)), 0 if math.isinf(more) else int(more))


def _bytes_of(job: Job) -> float:
    """On the fullest device; infinite where a budget of activations does not even keep the inputs of layers."""
    try:
        return fullest(job)
    except ConfigError:
        if job.remat.startswith("budget:"):
            return math.inf
        raise


class Option(NamedTuple):
    """A way to compress a model.

    rank:   1 for what is expected to harm least. nats: what that order is by (`EXPECTED`): expected, not measured. because: its parts.
    stage:  the config that does it; `code` is the same as Python. cache: the format of keys and values that `decode_ms` counts with.
    cfg:    the sizes after cutting. stored_bytes: of the packed artifact (`lmeff.compress.storage.CONVENTION`). bits: these for each parameter of the original.
    decode_ms: between two tokens at full rates (`lmeff.plan.serving`). Pruned weights count as dense there: no hardware here skips them.
    """

    rank: int
    nats: float
    because: str
    stage: Stage
    code: str
    cache: str
    cfg: ModelConfig
    stored_bytes: float
    bits: float
    decode_ms: float


def budget(
    cfg: ModelConfig,
    chip: Chip,
    *,
    bytes: float | None = None,
    latency_ms: float | None = None,
    teacher: str = "teacher",
    dtype: str = "bfloat16",
    devices: int = 1,
    batch: int = 1,
    context: int = 4096,
    keep: int = 5,
) -> list[Option]:
    """The recipes that meet a target and are expected to harm least, in this order; none where no recipe here meets it.

    bytes, latency_ms: at most, of the stored artifact and between two decoded tokens; give one or both.
    teacher:   the artifact that is compressed. dtype: of what is not quantized, as `precision.params` has it.
    devices, batch, context: of decoding. keep: how many.
    Raises `ConfigError` without a target.
    """
    if bytes is None and latency_ms is None:
        raise ConfigError("budget: got no target, expected bytes or latency_ms, or both")
    found: list[Option] = []
    caches = CACHES if latency_ms is not None else CACHES[:1]  # no artifact stores keys and values
    for recipe in sorted(recipes(cfg, caches), key=lambda recipe: recipe.nats):
        if len(found) == keep:
            break
        size, time = stored_bytes(recipe, dtype), decode_ms(recipe, chip, devices, batch, context)
        if (bytes is None or size <= bytes) and (latency_ms is None or time <= latency_ms):
            found.append(_option(recipe, cfg, size, time, len(found) + 1, teacher))
    return found


def _option(recipe: Candidate, cfg: ModelConfig, size: float, time: float, rank: int, teacher: str) -> Option:
    stage = Stage(
        name="compressed",
        start=teacher,
        shrink=recipe.shrink,
        compress=recipe.transforms,
        distill=Distill(teacher=teacher),
        export=True,
    )
    parts = [f"{name} +{EXPECTED[name].nats:g} nats ({EXPECTED[name].source})" for name in recipe.names]
    because = "expected, not measured: " + ("; ".join(parts) or "nothing is changed")
    bits = 8 * size / count(param_specs(cfg))
    return Option(rank, recipe.nats, because, stage, code(stage), recipe.cache, recipe.cfg, size, bits, time)
