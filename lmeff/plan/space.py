"""Which plans are tried: every mesh of so many devices that can train, times the other choices of a plan, as columns of numbers.

A row of the table is a plan. Formulas run on whole columns, for there are a hundred thousand plans of a large model on a pod; a `Job` is made of the few
rows that are looked at closely.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.errors import ConfigError
from lmeff.parallel.mesh import AXES, BATCH_AXES, MeshPlan
from lmeff.plan.job import Job
from lmeff.plan.legal import check_mesh, check_pipeline, illegal


class Pipelined(NamedTuple):
    """A pipeline's schedule, its chunks, and what a stage keeps."""

    schedule: str = "1f1b"
    chunks: int | None = None
    stash: str = "input"


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is varied; every choice is tried with every other.

    zero:      stages of ZeRO, where fsdp cuts anything. Stage 0 is the same as data parallelism.
    pipelines: with a pipeline. GPipe keeps most, but its stages run the same pass at a time, so that none waits for a longer one.
    pipe:      the most stages; 1 does not pipeline. rounds: the most microbatches, in times of the stages.
    remat:     policies, from least to most recomputation: what keeps more than a plan that does not fit is not tried.
    sequence:  forms of context parallelism. context: the most parts of a sequence.
    precision: policies of precision; none takes the job's own.
    """

    zero: tuple[int, ...] = (1, 2, 3)
    pipelines: tuple[Pipelined, ...] = tuple(
        Pipelined(schedule, chunks, stash)
        for schedule, chunks in (
            ("1f1b", None),
            ("interleaved", 2),
            ("interleaved", 4),
            ("zb-h1", None),
            ("gpipe", None),
        )
        for stash in ("input", "residuals")
    )
    pipe: int = 64
    rounds: int = 16
    remat: tuple[str, ...] = ("none", "dots", "names", "full")
    sequence: tuple[str, ...] = ("ring", "gather", "ulysses")
    context: int = 64
    precision: tuple[str, ...] = ()


class Refused(NamedTuple):
    """How many plans cannot train for a reason, and the reason of one of them."""

    count: int
    example: str


@dataclass(frozen=True, kw_only=True)
class Plans:
    """The plans of a job that can train, one a row.

    columns: the position of the mesh; of each axis its degree; of `zero`, `accumulate` and `chunks` the number; of `sequence`, `pipeline`, `remat` and
             `precision` the position in the space (of a pipeline -1 where there is none).
    looked:  how many plans there were, with those that cannot train. refused: those, by the kind of reason.
    """

    job: Job
    space: Space
    columns: dict[str, np.ndarray]
    looked: int
    refused: dict[str, Refused]

    def __len__(self) -> int:
        """How many."""
        return len(self.columns["zero"])

    def at(self, row: int) -> Job:
        """The job of a row."""
        value = {name: int(column[row]) for name, column in self.columns.items()}
        degrees = {axis: value[axis] for axis in AXES}
        outer = value["sequence"], value["pipeline"], value["accumulate"], value["precision"]
        job = _job(self.job, degrees, *outer, self.space)
        mesh = dataclasses.replace(job.mesh, zero=value["zero"])
        return job.changed(mesh=mesh, remat=self.space.remat[value["remat"]])

    def only(self, rows: np.ndarray) -> "Plans":
        """Some of the rows."""
        return dataclasses.replace(self, columns={name: column[rows] for name, column in self.columns.items()})


def precisions(job: Job, space: Space) -> tuple[str, ...]:
    """Those that are tried."""
    return space.precision or (job.precision,)


def plans(job: Job, devices: int, space: Space) -> Plans:
    """All plans of a job on so many devices that can train. Slices stay as many as `job.mesh.dcn` says."""
    job = job.changed(devices=devices, remat=space.remat[-1])
    looked, refused, found = 0, dict[str, Refused](), list[tuple[int, ...]]()
    for at, degrees in enumerate(meshes(devices, job.mesh.dcn, space, has_experts=job.cfg.moe is not None)):
        zeros = space.zero if degrees["fsdp"] > 1 else space.zero[-1:]
        inner = list(itertools.product(zeros, range(len(space.remat))))
        counts = microbatches(job.rows, degrees, space.rounds)
        # Of the mesh. Neither the pipeline changes them nor the counts, which divide the rows or are 1.
        reasons: dict[tuple[int, int], str | None] = {}
        for sequence, pipeline, count, precision in _outer(degrees, counts, job, space):
            looked += len(inner)
            tried, key = _job(job, degrees, sequence, pipeline, count, precision, space), (sequence, precision)
            if key not in reasons:
                reasons[key] = illegal(tried, check_mesh)
            reason = reasons[key] or illegal(tried, check_pipeline)
            if reason is None:
                chunks = 1 if tried.pipeline is None else tried.pipeline.chunks
                head = (at, *degrees.values(), sequence, pipeline, count, precision, chunks)
                found += [(*head, *rest) for rest in inner]
            else:
                before = refused.get(kind(reason), Refused(0, reason))
                refused[kind(reason)] = before._replace(count=before.count + len(inner))
    names = ("mesh", *AXES, "sequence", "pipeline", "accumulate", "precision", "chunks", "zero", "remat")
    table = np.array(found, np.int64).reshape(len(found), len(names))
    columns: dict[str, np.ndarray] = dict(zip(names, table.T, strict=True))
    return Plans(job=job, space=space, columns=columns, looked=looked, refused=refused)


def meshes(devices: int, dcn: int, space: Space, *, has_experts: bool) -> Iterator[dict[str, int]]:
    """Degrees whose product is the number of devices, in the order of `AXES`."""
    if devices % dcn:
        raise ConfigError(f"mesh.dcn: got {dcn} slices, expected a divisor of {devices} devices")
    inner = AXES[1:]
    most = {"pipe": space.pipe, "context": space.context} | ({} if has_experts else {"expert": 1})
    for sizes in factorizations(devices // dcn, len(inner)):
        if all(size <= most.get(axis, devices) for axis, size in zip(inner, sizes, strict=True)):
            yield {"dcn": dcn, **dict(zip(inner, sizes, strict=True))}


def factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered products of so many factors."""
    if parts == 1:
        yield (n,)
        return
    for first in divisors(n):
        for rest in factorizations(n // first, parts - 1):
            yield (first, *rest)


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def microbatches(rows: int, degrees: dict[str, int], rounds: int) -> list[int]:
    """Numbers of microbatches, each at least twice the one before; of a pipeline at least as many as stages, where there are rows enough.

    One where devices cannot take equally many rows: then no number is right.
    """
    ways = math.prod(degrees[axis] for axis in BATCH_AXES)
    found = [1]
    for count in divisors(rows // ways) if rows % ways == 0 else []:
        if count >= 2 * found[-1]:
            found.append(count)
    most = rounds * degrees["pipe"] if degrees["pipe"] > 1 else found[-1]
    return [count for count in found if min(degrees["pipe"], found[-1]) <= count <= max(most, found[0])]


def _sequences(degrees: dict[str, int], space: Space) -> list[int]:
    """Forms of context parallelism that make a difference; keys go round in no pipeline."""
    if degrees["context"] == 1:
        return [0]
    return [at for at, name in enumerate(space.sequence) if name != "ring" or degrees["pipe"] == 1]


def _outer(degrees: dict[str, int], counts: list[int], job: Job, space: Space) -> Iterator[tuple[int, int, int, int]]:
    """(sequence, pipeline, accumulate, precision) of one mesh."""
    pipelines = [-1] if degrees["pipe"] == 1 else range(len(space.pipelines))
    for sequence in _sequences(degrees, space):
        yield from itertools.product([sequence], pipelines, counts, range(len(precisions(job, space))))


def _job(
    job: Job, degrees: dict[str, int], sequence: int, pipeline: int, count: int, precision: int, space: Space
) -> Job:
    options: dict[str, Any] = {} if pipeline < 0 else space.pipelines[pipeline]._asdict()
    mesh = MeshPlan(**degrees, sequence=space.sequence[sequence], **options)
    return job.changed(mesh=mesh, accumulate=count, precision=precisions(job, space)[precision])


def kind(reason: str) -> str:
    """What reasons of a kind have in common: the words before the first number."""
    return re.split(r"\d", reason)[0].rstrip(" =").removesuffix(" got").rstrip(":")
