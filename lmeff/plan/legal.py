"""Whether a job could train at all: the checks that training makes, asked of a plan that nobody wrote."""

import functools
from collections.abc import Callable

from lmeff.config.validate import check_cuts, check_rows, check_schedule, check_slices, check_synchronization
from lmeff.core.errors import ConfigError
from lmeff.models.config import ModelConfig
from lmeff.models.remat import parse as parse_remat
from lmeff.models.transformer import sites
from lmeff.parallel.mesh import AXES
from lmeff.parallel.order import check_tokens
from lmeff.plan.job import Job
from lmeff.train.optim import check_state


def illegal(job: Job, *checks: Callable[[Job], None]) -> str | None:
    """Why a job cannot train, in one line; None where it can. Whether it fits in memory is another question. checks: some of them; none asks all."""
    try:
        for each in checks or (check,):
            each(job)
    except ConfigError as error:
        return str(error)
    return None


def check(job: Job) -> None:
    """Raises `ConfigError` for the first thing that cannot work."""
    check_mesh(job)
    check_pipeline(job)


def check_pipeline(job: Job) -> None:
    """What the schedule decides: it suits the stages and the microbatches, and the model has layers enough."""
    size = check_schedule(job.mesh, job.degrees["pipe"], job.accumulate)
    if size is not None:
        check_slices(size, job.cfg, f"stage '{job.name}'")


def check_mesh(job: Job) -> None:
    """All else."""
    degrees = job.degrees
    check_rows("train.batch", job.rows, degrees, job.accumulate)
    check_tokens("data.sequence", job.mesh.sequence, job.tokens, degrees["context"])
    _check_parts(job.tokens, degrees["context"], degrees["tensor"])
    for shape in (job.student, job.teacher):
        reason = shape and _uncut(job.mesh.sequence, shape.cfg, tuple(degrees[axis] for axis in AXES))
        if reason:
            raise ConfigError(reason)
    check_synchronization(job.reduce, job.local, job.precision, {"optim": job.optim}, degrees)
    check_state(job.optim, job.policy)
    parse_remat(job.remat, sites(job.cfg))


def _check_parts(tokens: int, context: int, tensor: int) -> None:
    """Training leaves tokens whole that tensor does not cut; there is no formula for what then moves."""
    if tokens % (context * tensor):
        raise ConfigError(
            f"data.sequence: got rows of {tokens} tokens, expected a multiple of mesh.context x mesh.tensor = {context} x {tensor} in a plan: "
            "between sublayers every device holds a part of them. Lower mesh.tensor."
        )


@functools.lru_cache(maxsize=4096)
def _uncut(sequence: str, cfg: ModelConfig, degrees: tuple[int, ...]) -> str | None:
    """Why a mesh cannot cut a model; asked once of all that is tried on a mesh."""
    try:
        check_cuts(sequence, cfg, dict(zip(AXES, degrees, strict=True)), "model")
    except ConfigError as error:
        return str(error)
    return None
