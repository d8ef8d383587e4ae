"""Pipeline schedules by name: `build("1f1b", stages=4, microbatches=8)`."""

from collections.abc import Callable
from typing import NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.parallel.tables import B, F, Op, Schedule, W, arrange


def build(name: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The table of a schedule; raises `ConfigError` where the numbers do not suit it."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule: got {name!r}, expected one of {', '.join(SCHEDULES)}")
    for what, number in {"stages": stages, "microbatches": microbatches, "chunks": chunks}.items():
        if number < 1:
            raise ConfigError(f"schedule {name}: got {what} = {number}, expected at least 1")
    kind = SCHEDULES[name]
    if kind.refuse is not None and (reason := kind.refuse(stages, microbatches, chunks)):
        raise ConfigError(f"schedule {name}: {reason}")
    return kind.make(name, stages, microbatches, chunks)


def _gpipe(name: str, p: int, m: int, v: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019, https://arxiv.org/abs/1811.06965)."""
    order = [Op(F, i, 0) for i in range(m)] + [op for i in range(m) for op in _backward(i, 0)]
    return arrange(name, [order] * p, m, v, fused=True)


def _one_f_one_b(name: str, p: int, m: int, v: int) -> Schedule:
    """One forward, one backward, after a ramp of `p - stage - 1` forwards (Narayanan et al. 2019, https://arxiv.org/abs/1806.03377)."""
    forwards = [Op(F, i, 0) for i in range(m)]
    backwards = [_backward(i, 0) for i in range(m)]
    return arrange(name, [_alternate(forwards, backwards, p - 1 - s) for s in range(p)], m, v, fused=True)


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
    """How to build a schedule, and why not: `refuse(stages, microbatches, chunks)` gives the reason or None."""

    make: Callable[[str, int, int, int], Schedule]
    refuse: Callable[[int, int, int], str | None] | None = None


def _one_chunk(p: int, m: int, v: int) -> str | None:
    return None if v == 1 else f"got chunks = {v}, expected 1; several chunks a stage need interleaved, circular or zbv"


SCHEDULES: dict[str, ScheduleKind] = {
    "gpipe": ScheduleKind(_gpipe, _one_chunk),
    "1f1b": ScheduleKind(_one_f_one_b, _one_chunk),
}
