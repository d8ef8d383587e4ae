"""The best plan of a job: all that can train are ranked roughly, the first of them predicted exactly, until no other can be better.

What is best is the least time of a step (`StepTime.middle`) that fits in memory. Plans with and without a pipeline are searched apart, so that there is an
answer to whether to pipeline at all.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lmeff.parallel.devices import Topology, parse_topology
from lmeff.plan import guess
from lmeff.plan.estimate import Estimate
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.legal import illegal
from lmeff.plan.predict import fullest, predict, seconds
from lmeff.plan.reasons import choices
from lmeff.plan.space import Plans, Refused, Space, plans


class Found(NamedTuple):
    """A plan that was looked at closely. bytes: on the fullest device; seconds: of a step, infinite where it does not fit."""

    job: Job
    bytes: float
    seconds: float


class Search(NamedTuple):
    """What a search found.

    best:    the fastest plans that fit, best first; empty where none does.
    plain:   the fastest without a pipeline, piped: with one; None where none fits.
    least:   of the plans that were looked at closely, the one that takes least memory.
    simple:  the plan with the fewest choices among those within `NEAR` of the best: predictions are no better than that.
    own:     the job's own plan, None where it cannot train.
    looked:  plans that were thought of. legal: those that can train; refused: the others, by reason. close: those that were predicted, fit: of those.
    reasons: in words.
    """

    best: tuple[Estimate, ...]
    plain: Estimate | None
    piped: Estimate | None
    least: Estimate | None
    simple: Estimate | None
    own: Estimate | None
    looked: int
    legal: int
    close: int
    fit: int
    refused: dict[str, Refused]
    reasons: tuple[str, ...]


class Costs(NamedTuple):
    """What a plan costs exactly: bytes on the fullest device and seconds of a step; and roughly, all at once."""

    bytes: Callable[[Job], float]
    seconds: Callable[[Job], float]
    rough_bytes: Callable[[Plans], np.ndarray]
    rough_seconds: Callable[[Plans], np.ndarray]


def costs(chip: Chip, topology: Topology | None = None) -> Costs:
    """On a chip."""
    return Costs(
        fullest,
        lambda job: seconds(job, chip, topology).middle,
        guess.bytes_of,
        lambda found: guess.seconds(found, chip, topology),
    )


def search(
    job: Job,
    chip: Chip,
    devices: int | None = None,
    *,
    space: Space = Space(),  # noqa: B008 -- frozen
    topology: Topology | str | None = None,
    limit: int = 120,
    keep: int = 5,
    own: bool = True,
) -> Search:
    """The best plans of a job on so many devices of a kind; rows, tokens, model and optimizer stay as they are.

    limit: plans that are predicted, of those with a pipeline and of those without. keep: of the best.
    own:   whether the job's mesh is the config's, told beside the best.
    Raises `ConfigError` where the devices are none that can be had.
    """
    topology = parse_topology(topology) if isinstance(topology, str) else topology
    devices = devices or (topology.devices if topology else job.devices)
    job = on(job, chip, devices, topology)
    tried = plans(job, devices, space)
    cost, capacity, groups, best = costs(chip, topology), chip.room(devices), list[list[Found]](), float("inf")
    for rows in by_pipeline(tried):
        groups.append(closely(tried, rows, cost, capacity, limit, other=best))
        best = min([best, *(found.seconds for found in groups[-1])])
    return _told(job, chip, topology, tried, groups, keep, own=own)


def on(job: Job, chip: Chip, devices: int, topology: Topology | None = None) -> Job:
    """The job on other devices."""
    slices = topology.slices if topology else job.mesh.dcn
    mesh = dataclasses.replace(job.mesh, dcn=slices)
    return job.changed(mesh=mesh, devices=devices, platform=chip.platform)


def by_pipeline(tried: Plans) -> tuple[np.ndarray, np.ndarray]:
    """The rows without a pipeline and those with one."""
    piped = tried.columns["pipe"] > 1
    return np.flatnonzero(~piped), np.flatnonzero(piped)


def closely(
    tried: Plans, rows: np.ndarray, cost: Costs, capacity: float, limit: int, *, other: float = float("inf")
) -> list[Found]:
    """The plans of these rows that were predicted: best first by the rough time, until the rough time of all others is beyond the best one found.

    A plan that does not fit takes those along that keep more for the backward pass and are otherwise the same.
    other: the best time of other rows; what cannot be faster than that is predicted until `FEW` plans fit.
    """
    if not len(rows):
        return []
    some = tried.only(rows)
    rough, size = cost.rough_seconds(some), cost.rough_bytes(some)
    found, full, best, fit = list[Found](), dict[Any, int](), float("inf"), 0
    for at in _in_order(rough, size, capacity):
        hopeless = rough[at] * TRUST > (other if fit >= FEW else float("inf"))
        if len(found) >= limit or rough[at] * TRUST > best or hopeless:
            break
        family, rank = _family(some, at)
        if rank < full.get(family, 0):
            continue
        job = some.at(at)
        size_of_job = cost.bytes(job)
        fits = size_of_job <= capacity
        time = cost.seconds(job) if fits else float("inf")
        if not fits:
            full[family] = max(full.get(family, 0), rank + 1)
        found.append(Found(job, size_of_job, time))
        best, fit = min(best, time), fit + fits
    return found


def _in_order(rough: np.ndarray, size: np.ndarray, capacity: float) -> Iterator[int]:
    """The fastest of what may fit, and where nothing may, a few that take least. Rough bytes leave out what is small, so that no other plan can fit."""
    likely = np.flatnonzero(size <= capacity * SLACK)
    if len(likely):
        yield from map(int, likely[np.argsort(rough[likely], kind="stable")])
    else:
        yield from map(int, np.argsort(size, kind="stable")[:LAST])


def _family(some: Plans, at: int) -> tuple[Any, int]:
    """A plan but for its remat policy, and how much that recomputes."""
    key = tuple(int(column[at]) for name, column in some.columns.items() if name not in ("remat", "mesh"))
    return key, int(some.columns["remat"][at])


TRUST = 0.85  # of a rough time: what it says may be so much above the exact one (tests/plan/test_search.py)
SLACK = 1.02  # of the capacity: rough bytes are at most so much above the exact ones
LAST, FEW = 10, 3


def ranked(found: list[Found]) -> list[Found]:
    """What fits, fastest first; of equals what takes less memory."""
    return sorted((f for f in found if np.isfinite(f.seconds)), key=lambda f: (f.seconds, f.bytes))


def simplest(found: list[Found]) -> Found | None:
    """Of the plans that are about as fast as the best, the one with the fewest choices; of equals what takes least memory."""
    best = ranked(found)
    near = [f for f in best if f.seconds <= (1 + NEAR) * best[0].seconds]
    return min(near, key=lambda f: (_choices(f.job), f.bytes), default=None)


def _choices(job: Job) -> int:
    """Axes that cut anything, and what else is not as simple as can be; a pipeline counts twice."""
    wide = sum(degree > 1 for degree in job.degrees.values())
    return wide + (job.accumulate > 1) + 2 * (job.degrees["pipe"] > 1)


NEAR = 0.05


def _spelled_out(job: Job) -> Job:
    """The job with the number of replicas that its mesh leaves open, as every plan of a search has it."""
    return job.changed(mesh=dataclasses.replace(job.mesh, data=job.degrees["data"]))


def _told(
    job: Job, chip: Chip, topology: Topology | None, tried: Plans, groups: list[list[Found]], keep: int, *, own: bool
) -> Search:
    """A search's result with the few plans that are shown predicted in full."""

    def estimate(found: Found | None) -> Estimate | None:
        return None if found is None else predict(found.job, chip, topology)

    every = [found for group in groups for found in group]
    plain, piped = (next(iter(ranked(group)), None) for group in groups)
    result = Search(
        best=tuple(predict(found.job, chip, topology) for found in ranked(every)[:keep]),
        plain=estimate(plain),
        piped=estimate(piped),
        least=estimate(min(every, key=lambda f: f.bytes, default=None)),
        simple=estimate(simplest(every)),
        own=predict(_spelled_out(job), chip, topology) if own and not illegal(job) else None,
        looked=tried.looked,
        legal=len(tried),
        close=len(every),
        fit=len(ranked(every)),
        refused=tried.refused,
        reasons=(),
    )
    return result._replace(reasons=choices(result))
