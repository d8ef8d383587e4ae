"""Bytes on one device of all that a train step is given, by category: exactly, from the functions that make and place the state of a run.

The shapes of the whole state are traced once for a model and its optimizer; a mesh then only divides them, so that a search can ask for hundreds.
"""

import dataclasses
import functools
import math
from typing import Any

import jax

from lmeff.core.errors import ConfigError
from lmeff.core.precision import parse
from lmeff.core.specs import abstract
from lmeff.models.remat import HOST
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, plan_layout
from lmeff.plan.job import Job, Shape
from lmeff.plan.program import runtime
from lmeff.plan.storage import stored_bytes
from lmeff.recipe.artifact import abstract_arrays
from lmeff.recipe.runtime import abstract_frozen
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.state import TrainState, abstract_batch, build_state
from lmeff.train.step import abstract_begin


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


def held_bytes(job: Job) -> dict[str, int]:
    """Bytes on one device of what lies there beside the step: "start", the models of `Job.held`; none where there are none."""
    size = _held(job.held, job.mesh, job.devices, job.platform, job.precision) if job.held else 0
    return {"start": size} if size else {}


@functools.lru_cache(maxsize=1024)
def _held(models: tuple[Shape, ...], mesh: MeshPlan, devices: int, platform: str, precision: str) -> int:
    layout, dtype = plan_layout(mesh, devices, platform), parse(precision).params
    found = jax.tree.leaves([abstract_arrays(model.cfg, model.recipe, layout, dtype) for model in models])
    return sum(stored_bytes(x.sharding.shard_shape(x.shape), x.dtype, platform) for x in found)


def optimizer_bytes(job: Job) -> int:
    """Bytes of the optimizer's arrays of one device, in its own memory or the host's."""
    kept, host = _kept(_counted(job))
    return kept["optimizer"] + host


def _counted(job: Job) -> Job:
    """The job without what no byte of its state depends on, so that jobs alike in the rest are counted once."""
    mesh = dataclasses.replace(job.mesh, schedule="1f1b", chunks=None, stash="input")
    return job.changed(name="", steps=1, rows=1, tokens=1, remat="none", accumulate=1, mesh=mesh, held=())


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
