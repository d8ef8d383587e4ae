"""The train step of a job as a program: what it is given, as shapes with shardings, and the compiled step for devices that need not be here."""

from typing import Any, NamedTuple

from lmeff.core.batch import Batch
from lmeff.parallel.mesh import Layout
from lmeff.plan.job import Job
from lmeff.recipe.runtime import abstract_frozen, make_runtime
from lmeff.train.loop import TrainConfig, compile_step
from lmeff.train.runtime import Frozen, Runtime
from lmeff.train.state import TrainState, abstract_batch
from lmeff.train.step import abstract_start


class Arguments(NamedTuple):
    """What a step is given, as `jax.ShapeDtypeStruct`s with shardings."""

    state: TrainState
    batch: Batch
    frozen: Frozen


def runtime(job: Job, layout: Layout) -> Runtime:
    """The very runtime that a recipe trains the job's stage with, on this layout."""
    train = TrainConfig(
        steps=job.steps,
        batch=job.rows,
        accumulate=job.accumulate,
        remat=job.remat,
        reduce=job.reduce,
        local=job.local,
    )
    return make_runtime(
        job.student,
        job.teacher,
        train=train,
        optim=job.optim,
        distill=job.distill,
        steps=job.steps,
        tokens=job.tokens,
        policy=job.policy,
        layout=layout,
    )


def arguments(job: Job, layout: Layout) -> Arguments:
    """What the job's step is given on this layout, abstract or not."""
    return Arguments(
        abstract_start(runtime(job, layout)),
        abstract_batch(job.rows, job.tokens, layout),
        abstract_frozen(job.student, job.teacher, layout, job.policy),
    )


def compiled(job: Job, layout: Layout) -> Any:
    """The compiled step, a `jax.stages.Compiled`; the layout's devices may be simulated, or of a topology that is only compiled for."""
    return compile_step(runtime(job, layout), *arguments(job, layout))
