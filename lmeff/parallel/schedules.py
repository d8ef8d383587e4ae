"""Pipeline schedules by name: `build("1f1b", stages=4, microbatches=8)`, or from a file: `resolve("table.csv", ...)`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.parallel.schedule_csv import from_csv
from lmeff.parallel.tables import B, F, Op, Schedule, W, arrange
from lmeff.parallel.zero_bubble import zb_h1, zb_h2, zbv


class Size(NamedTuple):
    """How a schedule cuts a model."""

    name: str
    stages: int
    chunks: int

    @property
    def slices(self) -> int:
        """Into how many slices."""
        return self.stages * self.chunks


def is_file(name: str) -> bool:
    """Whether a schedule's name is that of a file with a table."""
    return name.endswith(".csv")


def resolve(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The table that a plan names: `build` by name, or read from a .csv file, which has its own numbers.

    Raises `ConfigError` where the numbers do not suit the schedule, or are not those of the file.
    """
    if not is_file(name):
        return build(name, stages, microbatches, chunks)
    schedule = from_csv(Path(name), Path(name).stem)
    wanted = {"stages": stages, "microbatches": microbatches} | ({} if chunks is None else {"chunks": chunks})
    found = {what: getattr(schedule, what) for what in wanted}
    if found != wanted:
        got, expected = (", ".join(f"{what} = {n}" for what, n in numbers.items()) for numbers in (found, wanted))
        raise ConfigError(f"schedule {name}: the table has {got}; expected {expected}")
    return schedule


@functools.lru_cache(maxsize=256)
def build(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The table of a schedule.

    chunks: slices of the model a stage; None takes 2 where the schedule is about several chunks, else 1.
    Raises `ConfigError` where the numbers do not suit the schedule.
    """
    size = _checked(name, stages, microbatches, chunks)
    return SCHEDULES[name].make(name, stages, microbatches, size.chunks)


def size_of(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Size:
    """What `resolve` comes to; raises the same errors, and builds no table of a named schedule, which may have thousands of ticks."""
    if not is_file(name):
        return _checked(name, stages, microbatches, chunks)
    schedule = resolve(name, stages, microbatches, chunks)
    return Size(schedule.name, schedule.stages, schedule.chunks)


def _checked(name: str, stages: int, microbatches: int, chunks: int | None) -> Size:
    if name not in SCHEDULES:
        raise ConfigError(f"schedule: got {name!r}, expected one of {', '.join(SCHEDULES)}, or a .csv file")
    kind = SCHEDULES[name]
    chunks = (kind.chunks or 2) if chunks is None else chunks
    for what, number in {"stages": stages, "microbatches": microbatches, "chunks": chunks}.items():
        if number < 1:
            raise ConfigError(f"schedule {name}: got {what} = {number}, expected at least 1")
    if kind.chunks not in (None, chunks):
        several = ", ".join(other for other, row in SCHEDULES.items() if row.chunks is None)
        raise ConfigError(
            f"schedule {name}: got chunks = {chunks}, expected {kind.chunks}; any number goes with {several}"
        )
    if kind.whole_rounds and microbatches % stages:
        raise ConfigError(
            f"schedule {name}: got microbatches = {microbatches}, expected a multiple of stages = {stages}; circular takes any number"
        )
    return Size(name, stages, chunks)


def _gpipe(name: str, p: int, m: int, v: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, https://arxiv.org/abs/1811.06965)."""
    order = [Op(F, i, 0) for i in range(m)] + [op for i in range(m) for op in _backward(i, 0)]
    return arrange(name, [order] * p, m, v, fused=True)


def _one_f_one_b(name: str, p: int, m: int, v: int) -> Schedule:
    """One forward, one backward, after a ramp of `p - stage - 1` forwards (Narayanan et al. 2019, https://arxiv.org/abs/1806.03377)."""
    forwards = [Op(F, i, 0) for i in range(m)]
    backwards = [_backward(i, 0) for i in range(m)]
    return arrange(name, [_alternate(forwards, backwards, p - 1 - s) for s in range(p)], m, v, fused=True)


def _interleaved(name: str, p: int, m: int, v: int) -> Schedule:
    """1F1B over p * v slices: p microbatches through each chunk in turn (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473)."""
    forwards = [Op(F, start + i, c) for start in range(0, m, p) for c in range(v) for i in range(p)]
    backwards = [_backward(start + i, c) for start in range(0, m, p) for c in reversed(range(v)) for i in range(p)]
    ramps = [2 * (p - s - 1) + (v - 1) * p for s in range(p)]
    return arrange(name, [_alternate(forwards, backwards, ramp) for ramp in ramps], m, v, fused=True)


def _circular(name: str, p: int, m: int, v: int) -> Schedule:
    """GPipe that goes around v times, breadth first: a chunk takes all microbatches before the next one (Lamy-Poirier 2022, https://arxiv.org/abs/2211.05953)."""
    order = [Op(F, i, c) for c in range(v) for i in range(m)]
    order += [op for c in reversed(range(v)) for i in range(m) for op in _backward(i, c)]
    return arrange(name, [order] * p, m, v, fused=True)


def _backward(microbatch: int, chunk: int) -> tuple[Op, Op]:
    return Op(B, microbatch, chunk), Op(W, microbatch, chunk)


def _alternate(forwards: list[Op], backwards: list[tuple[Op, Op]], ramp: int) -> list[Op]:
    """`ramp` forwards, then a forward and a backward in turn, then the other backwards."""
    ramp = min(ramp, len(forwards))
    order = forwards[:ramp]
    for step, backward in enumerate(backwards):
        order += forwards[ramp + step : ramp + step + 1]
        order += backward
    return order


class ScheduleKind(NamedTuple):
    """How to build a schedule: `make(name, stages, microbatches, chunks)`, and what it takes.

    chunks: the one number of chunks that it takes; None takes any.
    whole_rounds: microbatches must be a multiple of stages.
    """

    make: Callable[[str, int, int, int], Schedule]
    chunks: int | None = 1
    whole_rounds: bool = False


SCHEDULES: dict[str, ScheduleKind] = {
    "gpipe": ScheduleKind(_gpipe),
    "1f1b": ScheduleKind(_one_f_one_b),
    "interleaved": ScheduleKind(_interleaved, chunks=None, whole_rounds=True),
    "circular": ScheduleKind(_circular, chunks=None),
    "zb-h1": ScheduleKind(zb_h1),
    "zb-h2": ScheduleKind(zb_h2),
    "zbv": ScheduleKind(zbv, chunks=2),
}
