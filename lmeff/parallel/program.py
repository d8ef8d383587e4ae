"""A schedule compiled for one SPMD program: for every tick and stage what to do, which buffer rows to use, and where results go.

The executor is a scan over ticks; a stage (its index along the pipe axis) takes its own column of each array. In every tick, in this order:

1. The stage does `op` on its `chunk` (parameters) and `microbatch` (tokens on the first slice, labels on the last one). Where it reads and writes:

   | op | reads | writes |
   |---|---|---|
   | F | activation buffer at `activation`; the embedded tokens where `is_first` | stash at `stash`: what B (and W) need of this forward |
   | B | stash at `stash`; gradient buffer at `gradient`; the loss where `is_last` | pending at `pending`: what W needs of this backward |
   | W | pending at `pending`; stash at `stash` where stashes are kept until W | the accumulated weight gradient |

   F yields an activation (on the last slice: the loss, which nobody receives), B the gradient of its input (on the first slice: of the
   embedded tokens, which nobody receives). Both have one shape, so an op yields at most one such tensor, the *payload*.
2. Two collective permutes, one along the forward ring (stage s to s + 1 mod p) and one along the backward ring (s to s - 1 mod p).
   `send` says which of them carries the payload; the other one carries nothing that is read, so giving the payload to both is right too.
3. The stage stores what arrives: from stage s - 1 (`left_buffer`, `left_slot`), from stage s + 1 (`right_buffer`, `right_slot`) and from its
   own step 1 (`local_buffer`, `local_slot`; the fold of a V, or one stage). `*_buffer` is NOTHING, ACTIVATION or GRADIENT. These rows
   always differ. A row that step 1 read may be written in step 3 of the same tick.

A slot of -1 means none. Buffers with one row more than `SlotCounts` says may take -1 as it is: it is then the last, spare row.
Buffers serve all chunks of a stage, and have the same rows on all stages: the most that any stage needs.
"""

import heapq
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from lmeff.parallel.tables import B, F, Schedule, W, check

NOTHING, ACTIVATION, GRADIENT = range(3)  # what arrives, and so the buffer it goes to
NOWHERE, FORWARD, BACKWARD, LOCAL = range(4)  # where a payload goes


class Ticks(NamedTuple):
    """int32 arrays [ticks, stages], to be scanned over their first dim. See the module for what they mean.

    op: IDLE, F, B or W of `lmeff.parallel.tables`, 0 to 3. The two indices that follow are 0 where a stage is idle.
    is_first, is_last: 1 where the chunk is the first or the last slice of the model, else 0. Both where there is one slice.
    activation, stash, gradient, pending: rows that the op reads or writes; -1 where it does not.
    send: NOWHERE, FORWARD (ring), BACKWARD (ring) or LOCAL.
    """

    op: np.ndarray
    microbatch: np.ndarray
    chunk: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    activation: np.ndarray
    stash: np.ndarray
    gradient: np.ndarray
    pending: np.ndarray
    send: np.ndarray
    left_buffer: np.ndarray
    left_slot: np.ndarray
    right_buffer: np.ndarray
    right_slot: np.ndarray
    local_buffer: np.ndarray
    local_slot: np.ndarray


class SlotCounts(NamedTuple):
    """Rows of each buffer, the same on all stages; 0 where no stage needs any."""

    activation: int
    stash: int
    gradient: int
    pending: int


class Program(NamedTuple):
    """What the executor runs: `ticks` in a scan, with buffers of `slots` rows."""

    ticks: Ticks
    slots: SlotCounts
    stages: int
    microbatches: int
    chunks: int


class Slots(NamedTuple):
    """Rows by buffer, int32 arrays [ticks, stages] with -1 for none, and the number of rows of each.

    activation: what F reads. stash: what F writes and B (or W) reads. gradient: what B reads. pending: what B writes and W reads.
    """

    activation: np.ndarray
    stash: np.ndarray
    gradient: np.ndarray
    pending: np.ndarray
    counts: SlotCounts


class Interval(NamedTuple):
    """A tensor in a buffer of a stage: written in tick `start`, read for the last time in tick `end`."""

    start: int
    end: int
    microbatch: int
    index: int


def when(schedule: Schedule) -> np.ndarray:
    """The tick of every operation: int32 [4 kinds, microbatches, slices], -1 where it is not in the table."""
    ticks = np.full((4, schedule.microbatches, schedule.slices), -1, np.int32)
    for t, row in enumerate(schedule.table):
        for s, op in enumerate(row):
            if op.kind:
                ticks[op.kind, op.microbatch, schedule.slice_of(s, op.chunk)] = t
    return ticks


def slots(schedule: Schedule, stash_until: Literal["B", "W"] = "B") -> Slots:
    """Assigns rows with as few as can be: intervals in order of their start, each in the lowest row that is free.

    stash_until: the op that reads a stash for the last time.
    """
    ticks = when(schedule)
    keep = {"B": B, "W": W}[stash_until]
    spans = {
        "activation": _colour(schedule, ticks[F, :, :-1], ticks[F, :, 1:], first=1),
        "stash": _colour(schedule, ticks[F], ticks[keep]),
        "gradient": _colour(schedule, ticks[B, :, 1:], ticks[B, :, :-1]),
        "pending": _colour(schedule, ticks[B], ticks[W]),
    }
    readers = {"activation": (F,), "stash": (F, B, W) if keep == W else (F, B), "gradient": (B,), "pending": (B, W)}
    arrays = {name: _spread(schedule, rows, readers[name]) for name, rows in spans.items()}
    counts = SlotCounts(**{name: int(rows.max(initial=-1)) + 1 for name, rows in spans.items()})
    return Slots(**arrays, counts=counts)


def _colour(schedule: Schedule, start: np.ndarray, end: np.ndarray, first: int = 0) -> np.ndarray:
    """The row of every (microbatch, slice), [microbatches, slices]; `start` and `end` [microbatches, some slices from `first` on]."""
    rows = np.full((schedule.microbatches, schedule.slices), -1, np.int32)
    by_stage: list[list[Interval]] = [[] for _ in range(schedule.stages)]
    for (microbatch, column), tick in np.ndenumerate(start):
        stage, _ = schedule.home(column + first)
        by_stage[stage].append(Interval(int(tick), int(end[microbatch, column]), microbatch, column + first))
    for intervals in by_stage:
        for interval, row in zip(sorted(intervals), lowest_rows(sorted(intervals))):
            rows[interval.microbatch, interval.index] = row
    return rows


def lowest_rows(intervals: Sequence[Interval]) -> list[int]:
    """The lowest free row for each of the intervals, given by their start. A row read in a tick is free for what is written at its end."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    rows: list[int] = []
    for interval in intervals:
        while busy and busy[0][0] <= interval.start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        row = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (interval.end, row))
        rows.append(row)
    return rows


def _spread(schedule: Schedule, rows: np.ndarray, kinds: tuple[int, ...]) -> np.ndarray:
    """From rows by (microbatch, slice) to rows by (tick, stage), for the ops of these kinds."""
    spread = np.full((schedule.ticks, schedule.stages), -1, np.int32)
    for t, row in enumerate(schedule.table):
        for s, op in enumerate(row):
            if op.kind in kinds:
                spread[t, s] = rows[op.microbatch, schedule.slice_of(s, op.chunk)]
    return spread


def compile_schedule(schedule: Schedule, stash_until: Literal["B", "W"] = "B") -> Program:
    """The program of a schedule; raises `ConfigError` where `check` refuses it.

    stash_until: the op that reads a stash for the last time.
    """
    check(schedule)
    shape = (schedule.ticks, schedule.stages)
    rows = slots(schedule, stash_until)
    ops = np.array(schedule.table, np.int32)
    arrays = {name: np.zeros(shape, np.int32) for name in ("is_first", "is_last", "send")}
    for side in ("left", "right", "local"):
        arrays |= {f"{side}_buffer": np.zeros(shape, np.int32), f"{side}_slot": np.full(shape, -1, np.int32)}
    ticks = Ticks(
        op=ops[..., 0],
        microbatch=ops[..., 1],
        chunk=ops[..., 2],
        activation=rows.activation,
        stash=rows.stash,
        gradient=rows.gradient,
        pending=rows.pending,
        **arrays,
    )
    _deliver(schedule, ticks, when(schedule))
    return Program(ticks, rows.counts, schedule.stages, schedule.microbatches, schedule.chunks)


def _deliver(schedule: Schedule, ticks: Ticks, at: np.ndarray) -> None:
    """Fills in, for every payload, where it goes and which row it arrives in: the row from which its reader takes it."""
    last = schedule.slices - 1
    sides = {
        FORWARD: (ticks.left_buffer, ticks.left_slot),
        BACKWARD: (ticks.right_buffer, ticks.right_slot),
        LOCAL: (ticks.local_buffer, ticks.local_slot),
    }
    for t, row in enumerate(schedule.table):
        for s, op in enumerate(row):
            if not op.kind:
                continue
            index = schedule.slice_of(s, op.chunk)
            ticks.is_first[t, s], ticks.is_last[t, s] = index == 0, index == last
            target = {F: index + 1, B: index - 1, W: -1}[op.kind]
            if not 0 <= target <= last:
                continue
            stage, _ = schedule.home(target)
            ticks.send[t, s] = way = _way(s, stage, schedule.stages, op.kind)
            buffer, slot = sides[way]
            read = ticks.activation if op.kind == F else ticks.gradient
            buffer[t, stage] = ACTIVATION if op.kind == F else GRADIENT
            slot[t, stage] = read[at[op.kind, op.microbatch, target], stage]


def _way(source: int, target: int, stages: int, kind: int) -> int:
    """The ring that leads from a stage to its neighbour. Two stages are neighbours on both rings: activations then go forward, gradients backward."""
    if source == target:
        return LOCAL
    if stages == 2:
        return FORWARD if kind == F else BACKWARD
    return FORWARD if target == (source + 1) % stages else BACKWARD
