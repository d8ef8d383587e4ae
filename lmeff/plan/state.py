"""Bytes on one device of all that a train step is given, by category: exactly, from the functions that make and place the state of a run.

The shapes of the whole state are traced once for a model and its optimizer; a mesh then only divides them, so that a search can ask for hundreds.
"""

import dataclasses
import functools
import math
from typing import Any

import jax

from lmeff.core.errors import ConfigError
from lmeff.core.numerics import parse_format
from lmeff.core.precision import DTYPES, parse
from lmeff.core.specs import abstract
from lmeff.models.config import ModelConfig
from lmeff.models.remat import HOST
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout
from lmeff.plan.job import Job, Shape
from lmeff.plan.program import runtime
from lmeff.plan.storage import stored_bytes
from lmeff.recipe.runtime import abstract_frozen
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.state import TrainState, abstract_batch, build_state
from lmeff.train.step import abstract_begin

CACHE = {"f32": "float32", "bf16": "bfloat16"}


def state_bytes(job: Job, stage: int = 0) -> dict[str, int]:
    """Bytes on one device of everything that the step is given, by category; categories with nothing in them are left out.

    "parameters", "optimizer" (its arrays), "average" (of parameters), "masks", "scales" (all other state of the compression), "reducer", "outer" (what
    workers with updates of their own share), "teacher", "ranges" (of activations), "batch", and "counters". On TPUs with what fills up their tiles.
    stage: of the pipeline. All stages hold as much: stacks of layers are cut into equal runs, or lie whole on every stage where their number does
    not divide, and so does what only the first or the last uses.
    """
    stages = job.degrees["pipe"]
    if not 0 <= stage < stages:
        raise ConfigError(f"state_bytes: got stage {stage}, expected 0 to {stages - 1}: mesh.pipe is {stages}")
    batch, _ = _sums({"batch": abstract_batch(job.rows, job.tokens, job.layout)}, job.platform)
    kept, _ = _kept(_counted(job))
    return {category: size for category in CATEGORIES if (size := kept[category] + batch[category])}


def host_bytes(job: Job) -> int:
    """Bytes in the host's memory, for each device: the optimizer's arrays where they are offloaded."""
    return _kept(_counted(job))[1]


def _counted(job: Job) -> Job:
    """The job without what no byte of its state depends on, so that jobs alike in the rest are counted once."""
    mesh = dataclasses.replace(job.mesh, schedule="1f1b", chunks=None, stash="input")
    return job.changed(name="", steps=1, rows=1, tokens=1, remat="none", accumulate=1, mesh=mesh)


@functools.lru_cache(maxsize=8192)
def _kept(job: Job) -> tuple[dict[str, int], int]:
    """(bytes on the device by category, bytes on the host) of all but the batch, on the job's own layout without devices."""
    layout = job.layout
    state = abstract_begin(runtime(job, layout), _fresh(job.student, job.optim, job.precision))
    frozen = abstract_frozen(job.student, job.teacher, layout, job.policy)
    return _sums({"state": state, "frozen": frozen}, job.platform)


def _sums(given: dict[str, Any], platform: str) -> tuple[dict[str, int], int]:
    """The same of arguments by name, as shapes with shardings."""
    found: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    host = 0
    for root, tree in given.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            shape = x.sharding.shard_shape(x.shape)
            size = stored_bytes(shape, x.dtype, platform)
            if x.sharding.memory_kind == HOST:
                host += size
            else:
                name = root + jax.tree_util.keystr(path)
                found[category_of(name, x.dtype == bool, math.prod(shape) == 1)] += size
    return found, host


@functools.lru_cache(maxsize=64)
def _fresh(student: Shape, optim: OptimConfig, precision: str) -> TrainState:
    """The state that training begins with, as shapes, on no mesh."""
    specs, policy, compression = param_specs(student.cfg), parse(precision), student.recipe.compression
    tx = make_optimizer(optim, 1, policy=policy, specs=specs)
    return jax.eval_shape(
        lambda p: build_state(p, specs, compression, tx, ema=optim.ema is not None), abstract(specs, policy.params)
    )


def category_of(name: str, boolean: bool, single: bool) -> str:
    """The category of an argument by its path, such as "state.opt[0].count", its dtype, and whether a device has one element of it."""
    found = next((category for prefix, category in PREFIXES.items() if name.startswith(prefix)), OTHER)
    if found == "optimizer" and single:
        return "counters"
    return "masks" if found == "scales" and boolean else found


def cache_bytes(cfg: ModelConfig, rows: int, tokens: int, format: str, layout: Layout) -> int:
    """Bytes on one device of the keys and values of so many rows that are `tokens` long, of all its layers; a window keeps no more than itself.

    format: "bf16", "f32", or one of integers, as `parse_format` reads it: "int8" and "int4" have a float32 scale for each token and head,
    "int4/g32" one for each 32 numbers of a head, "int8/tensor" one a layer; affine ones an int32 zero point for each scale.
    Heads that tensor parallelism does not divide lie whole on each of its devices. What fills up the tiles of a TPU is not counted.

    Llama-3-8B: 2 x 32 layers x 8 heads x 128 numbers x 2 bytes are 128 KiB a token; int8 with scales is (128 + 4) / 256 of that.

    >>> from lmeff.models.config import preset
    >>> from lmeff.parallel.mesh import MeshPlan, plan_layout
    >>> llama, one = preset("llama3_8b"), plan_layout(MeshPlan(), 1, "tpu")
    >>> cache_bytes(llama, 1, 8192, "bf16", one) // 2**20, cache_bytes(llama, 1, 8192, "int8", one) // 2**20
    (1024, 528)
    >>> cache_bytes(llama, 4, 8192, "bf16", plan_layout(MeshPlan(data=2, tensor=8), 16, "tpu")) // 2**20
    256
    """
    kept = tokens if cfg.window is None else min(tokens, cfg.window)
    arrays = _cache_arrays((cfg.layers, rows, kept, cfg.kv_heads, cfg.head_size), format)
    shards = ((layout.sharding("LBSKC", shape).shard_shape(shape), dtype) for shape, dtype in arrays)
    return 2 * sum(stored_bytes(shape, dtype, "cpu") for shape, dtype in shards)


def _cache_arrays(shape: tuple[int, ...], format: str) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of what stores the keys [L, B, S, K, C]; values take the same."""
    dtype = CACHE.get(format, format)
    if dtype in DTYPES:
        return [(shape, dtype)]
    found = parse_format(format)
    groups = {"channel": 1, "group": -(-shape[-1] // (found.group or 1))}
    scale = (shape[0], 1, 1, 1, 1) if found.granularity == "tensor" else (*shape[:-1], groups[found.granularity])
    zero = [] if found.symmetric else [(scale, "int32")]
    return [(shape, "int4" if found.bits <= 4 else "int8"), (scale, "float32"), *zero]


PREFIXES = {
    "state.trainable.params": "parameters",
    "state.opt": "optimizer",
    "state.ema": "average",
    "state.trainable.compression": "scales",
    "state.auxiliary": "scales",
    "state.reduction": "reducer",
    "state.outer": "outer",
    "frozen.teacher_ranges": "ranges",
    "frozen.teacher": "teacher",
    "frozen.ranges": "ranges",
    "batch": "batch",
    "state.step": "counters",
}
OTHER = "other"  # what XLA has no name for
CATEGORIES = (
    "parameters",
    "optimizer",
    "average",
    "masks",
    "scales",
    "reducer",
    "outer",
    "teacher",
    "ranges",
    "batch",
    "counters",
)
