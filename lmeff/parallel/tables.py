"""A pipeline schedule as a plain table: which stage does what at which tick.

The model is cut into `stages x chunks` slices, numbered from its input. A tick is the unit of time: a stage does at most one operation a tick,
and what it makes is there for its neighbour at the next tick. Operations: F (forward), B (gradient of the input, dX), W (gradient of the
weights, dW). A full backward is B and then W.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmeff.core.errors import ConfigError

IDLE, F, B, W = range(4)
LETTERS = ".FBW"


class Op(NamedTuple):
    """What a stage does in one tick: the kind, the microbatch, and which of the stage's chunks."""

    kind: int
    microbatch: int
    chunk: int


REST = Op(IDLE, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A table of operations, `table[tick][stage]`.

    placement: where slices live. "loop": chunk c of stage s is slice c * stages + s. "v": two chunks, s and 2 * stages - 1 - s, so that the
        first and the last slice share a stage.
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    table: tuple[tuple[Op, ...], ...]
    placement: Literal["loop", "v"] = "loop"

    @property
    def ticks(self) -> int:
        """How many ticks a step takes."""
        return len(self.table)

    @property
    def slices(self) -> int:
        """How many slices the model is cut into."""
        return self.stages * self.chunks

    def slice_of(self, stage: int, chunk: int) -> int:
        """The slice of the model that a stage holds as its chunk."""
        return slice_of(self.placement, self.stages, stage, chunk)

    def home(self, index: int) -> tuple[int, int]:
        """The stage and chunk of a slice."""
        return home(self.placement, self.stages, index)


def slice_of(placement: str, stages: int, stage: int, chunk: int) -> int:
    """The slice of the model that a stage holds as its chunk."""
    if placement == "v" and chunk == 1:
        return 2 * stages - 1 - stage
    return chunk * stages + stage


def home(placement: str, stages: int, index: int) -> tuple[int, int]:
    """The stage and chunk of a slice."""
    chunk, offset = divmod(index, stages)
    return (stages - 1 - offset if placement == "v" and chunk == 1 else offset), chunk


def arrange(
    name: str,
    orders: Sequence[Sequence[Op]],
    microbatches: int,
    chunks: int,
    *,
    placement: Literal["loop", "v"] = "loop",
    fused: bool = False,
) -> Schedule:
    """Times each stage's operations, given in order, as early as they can be.

    fused: the backward is one piece, so a gradient leaves only after the W that follows its B. That is classic 1F1B; else it leaves after B.
    Raises `ConfigError` where the orders wait for each other.
    """
    stages = len(orders)
    last = stages * chunks - 1
    done: set[tuple[int, int, int]] = set()
    at = [0] * stages
    table: list[tuple[Op, ...]] = []
    while any(at[s] < len(orders[s]) for s in range(stages)):
        row = [REST] * stages
        for s in range(stages):
            if at[s] < len(orders[s]):
                op = orders[s][at[s]]
                index = slice_of(placement, stages, s, op.chunk)
                if all(need in done for need in needs(op.kind, op.microbatch, index, last, fused)):
                    row[s] = op
        if all(op is REST for op in row):
            raise ConfigError(f"schedule {name}: at tick {len(table)} every stage waits; {_waiting(orders, at)}")
        for s, op in enumerate(row):
            if op is not REST:
                done.add((op.kind, op.microbatch, slice_of(placement, stages, s, op.chunk)))
                at[s] += 1
        table.append(tuple(row))
    return Schedule(
        name=name,
        stages=stages,
        microbatches=microbatches,
        chunks=chunks,
        table=tuple(table),
        placement=placement,
    )


def needs(kind: int, microbatch: int, index: int, last: int, fused: bool = False) -> list[tuple[int, int, int]]:
    """What must be done at an earlier tick: (kind, microbatch, slice) each."""
    if kind == F:
        return [(F, microbatch, index - 1)] if index else []
    if kind == W:
        return [(B, microbatch, index)]
    own = [(F, microbatch, index)]
    return own if index == last else [*own, (W if fused else B, microbatch, index + 1)]


def _waiting(orders: Sequence[Sequence[Op]], at: Sequence[int]) -> str:
    heads = [
        f"stage {s} before {LETTERS[ops[i].kind]}{ops[i].microbatch} of chunk {ops[i].chunk}"
        for s, (ops, i) in enumerate(zip(orders, at))
        if i < len(ops)
    ]
    return "; ".join(heads) + ". Expected orders in which some operation can always go on"


def check(schedule: Schedule) -> None:
    """Raises `ConfigError`, which names the cell, unless every operation is there once and comes after all that it needs."""
    _check_shape(schedule)
    last = schedule.slices - 1
    at: dict[tuple[int, int, int], int] = {}
    for t, row in enumerate(schedule.table):
        for s, op in enumerate(row):
            if op.kind != IDLE:
                _check_op(schedule, t, s, op)
                key = op.kind, op.microbatch, schedule.slice_of(s, op.chunk)
                if key in at:
                    raise ConfigError(f"{_cell(schedule, t, s)} is there already at tick {at[key]}; expected once")
                at[key] = t
    for index in range(schedule.slices):
        for i in range(schedule.microbatches):
            for kind in (F, B, W):
                if (kind, i, index) not in at:
                    raise ConfigError(f"schedule {schedule.name}: {_words(kind, i, index)} is missing; expected once")
    for (kind, i, index), t in at.items():
        for need in needs(kind, i, index, last):
            if at[need] >= t:
                raise ConfigError(
                    f"{_cell(schedule, t, schedule.home(index)[0])} needs {_words(*need)}, which is at tick {at[need]}; expected before {t}"
                )


def _check_shape(schedule: Schedule) -> None:
    where = f"schedule {schedule.name}"
    for what in ("stages", "microbatches", "chunks"):
        if getattr(schedule, what) < 1:
            raise ConfigError(f"{where}: got {what} = {getattr(schedule, what)}, expected at least 1")
    if schedule.placement not in ("loop", "v") or (schedule.placement == "v" and schedule.chunks != 2):
        raise ConfigError(
            f"{where}: got placement {schedule.placement!r} with chunks = {schedule.chunks}, expected loop, or v with 2 chunks"
        )
    for t, row in enumerate(schedule.table):
        if len(row) != schedule.stages:
            raise ConfigError(f"{where}, tick {t}: got {len(row)} stages, expected {schedule.stages}")


def _check_op(schedule: Schedule, tick: int, stage: int, op: Op) -> None:
    limits = {
        "kind": (op.kind, 4),
        "microbatch": (op.microbatch, schedule.microbatches),
        "chunk": (op.chunk, schedule.chunks),
    }
    for what, (got, limit) in limits.items():
        if not 0 <= got < limit:
            raise ConfigError(
                f"schedule {schedule.name}, tick {tick}, stage {stage}: got {what} {got}, expected 0 to {limit - 1}"
            )


def _cell(schedule: Schedule, tick: int, stage: int) -> str:
    op = schedule.table[tick][stage]
    words = _words(op.kind, op.microbatch, schedule.slice_of(stage, op.chunk))
    return f"schedule {schedule.name}, tick {tick}, stage {stage}: {words}"


def _words(kind: int, microbatch: int, index: int) -> str:
    return f"{LETTERS[kind]} of microbatch {microbatch} on slice {index}"
