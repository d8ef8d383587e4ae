"""Programs: an interpreter with symbols in place of tensors follows the arrays alone and must find, at every read, exactly what the op needs."""

import dataclasses

import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.parallel.program import (
    ACTIVATION,
    BACKWARD,
    FORWARD,
    GRADIENT,
    LOCAL,
    NOTHING,
    NOWHERE,
    SlotCounts,
    compile_schedule,
    slots,
    when,
)
from lmeff.parallel.schedule_csv import from_csv
from lmeff.parallel.schedules import SCHEDULES, build
from lmeff.parallel.tables import IDLE, B, F, W

CASES = [
    (name, p, m, v)
    for name, kind in SCHEDULES.items()
    for p, m in [(1, 1), (1, 4), (2, 2), (2, 6), (3, 3), (4, 1), (4, 8), (5, 7), (8, 8), (8, 32)]
    for v in ((1, 2, 4) if kind.chunks is None else (kind.chunks,))
    if not (kind.whole_rounds and m % p)
]
PAIRS = "0F0,3F0,3I0,3W0,0F1,(3F1;0B0)OVERLAP_F_B,3I1,3W1,0I1,0W1\n1F0,2F0,1F1,2B0,2F1,1B0,2B1,1B1\n"
GARBAGE = ("garbage",)


class Stage:
    """A stage's buffers, with one spare row each, and what it has computed."""

    def __init__(self, counts):
        self.rows = {name: [GARBAGE] * (n + 1) for name, n in counts._asdict().items()}
        self.trained = []

    def run(self, row, place, until):
        """One op: reads, writes, and gives its payload. `place` is (stage, chunk) of the slice; payloads say the way that they have come."""
        m, rows, first, last = row["microbatch"], self.rows, row["is_first"], row["is_last"]
        if row["op"] == F:
            x = ("y", m, ()) if first else rows["activation"][row["activation"]]
            rows["stash"][row["stash"]] = (x, place)
            assert (x[0], x[1], x[2] == ()) == ("y", m, first)
            return ("y", m, (*x[2], place))
        if row["op"] == B:
            x, same = rows["stash"][row["stash"]]
            dy = ("dy", m, ()) if last else rows["gradient"][row["gradient"]]
            assert (x[0], x[1], x[2] == (), same) == ("y", m, first, place)
            assert (dy[0], dy[1], dy[2] == ()) == ("dy", m, last)
            rows["pending"][row["pending"]] = (x, dy, place)
            return ("dy", m, (*dy[2], place))
        if row["op"] == W:
            x, dy, same = rows["pending"][row["pending"]]
            assert (x[1], x[2] == (), dy[1], dy[2] == (), same) == (m, first, m, last, place)
            assert until == "B" or rows["stash"][row["stash"]] == (x, place)
            self.trained.append((m, *place, x[2], dy[2]))
        return GARBAGE


def replay(program, until="B"):
    """Every (microbatch, stage, chunk, way of its input, way of its gradient) for which a weight gradient was made."""
    p = program.stages
    stages = [Stage(program.slots) for _ in range(p)]
    for t in range(len(program.ticks.op)):
        rows = [{name: int(array[t, s]) for name, array in program.ticks._asdict().items()} for s in range(p)]
        payloads = [stages[s].run(rows[s], (s, rows[s]["chunk"]), until) for s in range(p)]
        rings = {
            way: [x if rows[s]["send"] == way else GARBAGE for s, x in enumerate(payloads)]
            for way in (FORWARD, BACKWARD, LOCAL)
        }
        for s in range(p):
            left, right = rings[FORWARD][(s - 1) % p], rings[BACKWARD][(s + 1) % p]
            for side, arrived in (("left", left), ("right", right), ("local", rings[LOCAL][s])):
                kind, slot = rows[s][f"{side}_buffer"], rows[s][f"{side}_slot"]
                assert (arrived is GARBAGE) == (kind == NOTHING) == (slot == -1)
                if kind != NOTHING:
                    stages[s].rows[{ACTIVATION: "activation", GRADIENT: "gradient"}[kind]][slot] = arrived
    return [item for stage in stages for item in stage.trained]


def expected(schedule):
    """Each weight gradient once, its input having come through all slices before it, its gradient through all after it."""
    homes = [schedule.home(index) for index in range(schedule.slices)]
    return [
        (m, *homes[index], tuple(homes[:index]), tuple(reversed(homes[index + 1 :])))
        for m in range(schedule.microbatches)
        for index in range(schedule.slices)
    ]


@pytest.mark.parametrize("until", ["B", "W"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_reads_exactly_what_it_needs(case, until):
    schedule = build(*case)
    program = compile_schedule(schedule, stash_until=until)
    assert sorted(replay(program, until)) == sorted(expected(schedule))


def test_a_table_from_a_file_runs_too():
    schedule = from_csv(PAIRS)
    assert sorted(replay(compile_schedule(schedule))) == sorted(expected(schedule))


def live(schedule, start, end, first=0):
    """The most tensors that lie in a buffer of a stage at once, by counting at the end of every tick."""
    counts = np.zeros((schedule.ticks, schedule.stages), int)
    for (m, column), begin in np.ndenumerate(start):
        counts[begin : end[m, column], schedule.home(column + first)[0]] += 1
    return int(counts.max(initial=0))


@pytest.mark.parametrize("case", [case for case in CASES if case[1] < 8], ids=str)
def test_buffers_have_no_row_too_many(case):
    schedule = build(*case)
    at = when(schedule)
    forward, backward, weights = at[F], at[B], at[W]
    kept = SlotCounts(
        activation=live(schedule, forward[:, :-1], forward[:, 1:], first=1),
        stash=live(schedule, forward, backward),
        gradient=live(schedule, backward[:, 1:], backward[:, :-1]),
        pending=live(schedule, backward, weights),
    )
    assert slots(schedule).counts == kept
    assert slots(schedule, "W").counts == kept._replace(stash=live(schedule, forward, weights))


@pytest.mark.parametrize("m", [8, 64])
def test_rows_of_known_schedules(m):
    """What grows with the number of microbatches, and what does not."""
    rows = {name: compile_schedule(build(name, 4, m)).slots for name in SCHEDULES}
    assert rows["gpipe"] == SlotCounts(activation=1, stash=m, gradient=1, pending=1)
    assert rows["1f1b"] == SlotCounts(activation=1, stash=4, gradient=1, pending=1)
    assert rows["zb-h1"] == SlotCounts(activation=1, stash=4, gradient=1, pending=4)
    assert rows["zb-h2"] == SlotCounts(activation=2, stash=7, gradient=1, pending=7)
    assert rows["zbv"] == SlotCounts(activation=2, stash=8, gradient=2, pending=7)
    assert rows["interleaved"].stash == 11
    assert rows["circular"] == SlotCounts(activation=m - 3, stash=2 * m, gradient=m - 3, pending=1)
    assert compile_schedule(build("zb-h1", 4, m), "W").slots.stash == 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_say_what_the_docstrings_say(case):
    schedule = build(*case)
    ticks = compile_schedule(schedule).ticks
    for name, array in ticks._asdict().items():
        assert (array.dtype, array.shape) == (np.int32, (schedule.ticks, schedule.stages)), name
    for name, kinds in {"activation": (F,), "stash": (F, B), "gradient": (B,), "pending": (B, W)}.items():
        rows = getattr(ticks, name)
        used = np.isin(ticks.op, kinds)
        used &= ~((name == "activation") & (ticks.is_first == 1)) & ~((name == "gradient") & (ticks.is_last == 1))
        np.testing.assert_array_equal(rows >= 0, used, err_msg=name)
    resting = ticks.op == IDLE
    assert not ticks.microbatch[resting].any()
    assert not ticks.chunk[resting].any()
    assert not (ticks.is_first | ticks.is_last)[resting].any()
    m = schedule.microbatches
    assert ticks.is_first.sum() == ticks.is_last.sum() == 3 * m
    sends = (ticks.send != NOWHERE).sum()
    arrivals = sum((getattr(ticks, f"{side}_buffer") != NOTHING).sum() for side in ("left", "right", "local"))
    assert sends == arrivals == 2 * m * (schedule.slices - 1)


def test_a_loop_sends_activations_forward_and_gradients_backward():
    ticks = compile_schedule(build("interleaved", 4, 8, 2)).ticks
    assert set(ticks.send[ticks.op == F]) == {NOWHERE, FORWARD}
    assert set(ticks.send[ticks.op == B]) == {NOWHERE, BACKWARD}
    assert not ticks.local_buffer.any()
    assert set(np.unique(ticks.left_buffer)) == {NOTHING, ACTIVATION}
    assert set(np.unique(ticks.right_buffer)) == {NOTHING, GRADIENT}


def test_a_v_sends_both_ways_and_folds_on_its_last_stage():
    ticks = compile_schedule(build("zbv", 4, 8)).ticks
    second = ticks.chunk == 1
    assert set(ticks.send[(ticks.op == F) & second]) == {NOWHERE, BACKWARD}
    assert set(ticks.send[(ticks.op == B) & second]) == {FORWARD, LOCAL}
    assert set(ticks.send[(ticks.op == F) & ~second]) == {FORWARD, LOCAL}
    assert set(np.argwhere(ticks.local_buffer != NOTHING)[:, 1]) == {3}
    for side in (ticks.left_buffer, ticks.right_buffer):
        assert set(np.unique(side)) == {NOTHING, ACTIVATION, GRADIENT}
    first, last = (set(np.argwhere(where)[:, 1]) for where in (ticks.is_first, ticks.is_last))
    assert first == last == {0}


def test_one_stage_hands_over_to_itself():
    ticks = compile_schedule(build("interleaved", 1, 2, 2)).ticks
    assert set(np.unique(ticks.send)) == {NOWHERE, LOCAL}


@pytest.mark.parametrize("until", ["B", "W"])
@pytest.mark.parametrize(
    "name",
    [
        "activation",
        "gradient",
        "stash",
        "pending",
        "left_slot",
        "right_slot",
        "local_slot",
        "left_buffer",
        "send",
        "chunk",
        "microbatch",
        "is_first",
    ],
)
def test_the_replay_notices_any_wrong_entry(name, until):
    """The interpreter itself is tested: one entry that matters, changed by one, at 20 places."""
    schedule = build("zbv", 3, 6)
    program = compile_schedule(schedule, until)
    places = np.argwhere((program.ticks.op > 0) & (getattr(program.ticks, name) > 0))
    if name.endswith(("slot", "buffer")):
        places = np.argwhere(getattr(program.ticks, name.replace("slot", "buffer")) > 0)
    if name == "stash" and until == "B":
        places = places[program.ticks.op[tuple(places.T)] < W]
    for t, s in places[:: max(1, len(places) // 20)]:
        array = getattr(program.ticks, name).copy()
        array[t, s] -= 1
        broken = program._replace(ticks=program.ticks._replace(**{name: array}))
        try:
            result = sorted(replay(broken, until))
        except (AssertionError, ValueError, IndexError, KeyError):
            continue
        assert result != sorted(expected(schedule)), (name, t, s)


def test_a_damaged_schedule_is_not_compiled():
    schedule = build("1f1b", 2, 4)
    with pytest.raises(ConfigError, match="W of microbatch 3 on slice 0 is missing"):
        compile_schedule(dataclasses.replace(schedule, table=schedule.table[:-1]))
