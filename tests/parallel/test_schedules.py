"""The tables: closed forms of ticks, idle share and what is in flight; the check; the CSV form."""

import dataclasses
import re

import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.parallel.program import when
from lmeff.parallel.schedule_csv import from_csv, to_csv
from lmeff.parallel.schedules import SCHEDULES, build
from lmeff.parallel.simulate import simulate
from lmeff.parallel.tables import REST, B, F, Op, W, arrange, check

SIZES = [(p, rounds * p) for p in (2, 4, 8) for rounds in (1, 2, 4, 8)]
CHUNKS = (1, 2, 4)
CLASSIC = ("gpipe", "1f1b", "interleaved", "circular")


def chunks_of(name):
    fixed = SCHEDULES[name].chunks
    return CHUNKS if fixed is None else (fixed,)


def cases(*names):
    return [(name, p, m, v) for name in names for p, m in SIZES for v in chunks_of(name)]


def stages(p):
    return np.arange(p)


@pytest.mark.parametrize("case", cases(*CLASSIC), ids=str)
def test_a_backward_in_one_piece_idles_for_its_ramp(case):
    """(p - 1) (F + B + W) of a chunk's size, so (p - 1) / (v m + p - 1) of the step: Narayanan et al. 2021, section 2.2."""
    name, p, m, v = case
    schedule = build(*case)
    check(schedule)
    counts = simulate(schedule)
    assert counts.ticks == 3 * v * m + 3 * (p - 1)
    assert (counts.idle == 3 * (p - 1)).all()
    assert counts.idle_share == pytest.approx((p - 1) / (v * m + p - 1))
    ramp = {"1f1b": p - 1 - stages(p), "interleaved": 2 * (p - 1 - stages(p)) + (v - 1) * p}.get(name, v * m)
    expected = np.broadcast_to(np.minimum(v * m, ramp + 1), p)
    np.testing.assert_array_equal(counts.in_flight, expected)
    np.testing.assert_array_equal(counts.awaiting_b, expected)
    assert (counts.pending == 1).all()


@pytest.mark.parametrize("case", cases("zb-h1", "zb-h2", "zbv"), ids=str)
def test_zero_bubble_reaches_the_least_number_of_ticks(case):
    """p - 1 ticks until the last stage has something to do, and then work without a pause."""
    _, p, m, v = case
    schedule = build(*case)
    check(schedule)
    counts = simulate(schedule)
    assert counts.ticks == 3 * v * m + p - 1
    assert (counts.idle == p - 1).all()
    assert counts.idle_share == pytest.approx((p - 1) / (3 * v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zb_h1_has_no_more_in_flight_than_1f1b_at_its_first_stage(p, m):
    counts, classic = simulate(build("zb-h1", p, m)), simulate(build("1f1b", p, m))
    np.testing.assert_array_equal(counts.awaiting_b, classic.awaiting_b)
    assert (counts.in_flight <= classic.in_flight.max()).all()
    assert counts.in_flight[0] == p


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= 2 * p - 1] + [(4, 7), (8, 15)])
def test_zb_h2_and_zbv_never_idle_between_first_and_last_operation(p, m):
    wide, v = simulate(build("zb-h2", p, m)), simulate(build("zbv", p, m))
    assert (wide.idle_inside == 0).all()
    assert (v.idle_inside == 0).all()
    assert (wide.in_flight == 2 * p - 1).all()
    np.testing.assert_array_equal(wide.awaiting_b, 2 * (p - stages(p)) - 1)
    assert (v.in_flight == 2 * p).all()  # of half a stage each: what 1F1B has at its first stage
    assert simulate(build("zb-h1", p, m)).idle_inside.max() == p - 1


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zbv_never_has_more_than_1f1b_in_flight(p, m):
    assert simulate(build("zbv", p, m)).in_flight.max() <= 2 * p


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (3, 3), (4, 1), (4, 3), (5, 4), (5, 13), (6, 7), (7, 20)])
def test_any_numbers_give_a_whole_table(name, p, m):
    if SCHEDULES[name].whole_rounds and m % p:
        with pytest.raises(ConfigError, match=f"microbatches = {m}, expected a multiple of stages = {p}"):
            build(name, p, m)
        return
    schedule = build(name, p, m)
    check(schedule)
    v = schedule.chunks
    fused = name in CLASSIC
    assert schedule.ticks >= max(3 * v * m + p - 1, (3 if fused else 2) * p * v + (0 if fused else 1))
    if m >= p:
        assert schedule.ticks == 3 * v * m + (3 if fused else 1) * (p - 1)


def test_few_microbatches_take_the_longest_path():
    """One microbatch goes through all slices and back; only W has no place on the way."""
    assert build("gpipe", 4, 1).ticks == build("circular", 2, 1, 2).ticks == 12
    assert [build(name, 4, 1).ticks for name in ("zb-h1", "zb-h2", "zbv")] == [9, 9, 17]


def test_sends_are_counted_where_they_leave_a_stage():
    assert simulate(build("1f1b", 4, 8), 10).activations_sent == 3 * 8
    interleaved = simulate(build("interleaved", 4, 8, 2), 10)
    assert (interleaved.activations_sent, interleaved.gradients_sent, interleaved.sent_bytes) == (56, 56, 1120)
    assert interleaved.permuted_bytes == 2 * 57 * 4 * 10
    fold = simulate(build("zbv", 4, 8), 10)  # slices 3 and 4 share a stage
    assert (fold.activations_sent, fold.gradients_sent) == (48, 48)
    alone = simulate(build("interleaved", 1, 4, 2), 10)
    assert (alone.activations_sent, alone.sent_bytes, alone.permuted_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1f2b", 2, 2), ["'1f2b'", "1f1b", "zbv"]),
        (("1f1b", 0, 2), ["stages = 0", "at least 1"]),
        (("1f1b", 2, 0), ["microbatches = 0", "at least 1"]),
        (("circular", 2, 2, 0), ["chunks = 0", "at least 1"]),
        (("1f1b", 2, 2, 2), ["1f1b", "chunks = 2", "expected 1", "interleaved"]),
        (("zb-h1", 2, 2, 2), ["zb-h1", "chunks = 2", "expected 1"]),
        (("zbv", 2, 2, 1), ["zbv", "chunks = 1", "expected 2"]),
        (("interleaved", 4, 6, 2), ["microbatches = 6", "multiple of stages = 4", "circular"]),
    ],
)
def test_what_does_not_suit_a_schedule_is_refused(arguments, words):
    with pytest.raises(ConfigError) as error:
        build(*arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def replaced(schedule, tick, stage, op):
    rows = [list(row) for row in schedule.table]
    rows[tick][stage] = op
    return dataclasses.replace(schedule, table=tuple(map(tuple, rows)))


def swapped(schedule, stage, first, second):
    one, two = schedule.table[first][stage], schedule.table[second][stage]
    return replaced(replaced(schedule, first, stage, two), second, stage, one)


# 1F1B on 2 stages with 4 microbatches: stage 0 is F0 F1 . . B0 W0 F2 ..., stage 1 is . F0 B0 W0 F1 B1 ...
DAMAGE = {
    "missing": (lambda s: replaced(s, 0, 0, REST), "F of microbatch 0 on slice 0 is missing"),
    "twice": (
        lambda s: replaced(s, 2, 0, Op(F, 0, 0)),
        "tick 2, stage 0: F of microbatch 0 on slice 0 is there already at tick 0",
    ),
    "input not there yet": (
        lambda s: swapped(s, 1, 0, 1),
        "tick 0, stage 1: F of microbatch 0 on slice 1 needs F of microbatch 0 on slice 0, which is at tick 0",
    ),
    "backward before its forward": (
        lambda s: swapped(s, 1, 1, 2),
        "tick 1, stage 1: B of microbatch 0 on slice 1 needs F of microbatch 0 on slice 1, which is at tick 2",
    ),
    "gradient not there yet": (
        lambda s: swapped(s, 0, 2, 4),
        "tick 2, stage 0: B of microbatch 0 on slice 0 needs B of microbatch 0 on slice 1, which is at tick 2",
    ),
    "W before B": (
        lambda s: swapped(s, 1, 2, 3),
        "tick 2, stage 1: W of microbatch 0 on slice 1 needs B of microbatch 0 on slice 1, which is at tick 3",
    ),
    "microbatch": (lambda s: replaced(s, 0, 0, Op(F, 4, 0)), "tick 0, stage 0: got microbatch 4, expected 0 to 3"),
    "negative microbatch": (lambda s: replaced(s, 0, 0, Op(F, -1, 0)), "stage 0: got microbatch -1, expected 0 to 3"),
    "chunk": (lambda s: replaced(s, 1, 0, Op(F, 1, 1)), "tick 1, stage 0: got chunk 1, expected 0 to 0"),
    "kind": (lambda s: replaced(s, 1, 1, Op(4, 0, 0)), "tick 1, stage 1: got kind 4, expected 0 to 3"),
    "row": (
        lambda s: dataclasses.replace(s, table=(*s.table[:3], s.table[3][:1], *s.table[4:])),
        "tick 3: got 1 stages, expected 2",
    ),
    "cut short": (lambda s: dataclasses.replace(s, table=s.table[:-1]), "W of microbatch 3 on slice 0 is missing"),
    "placement": (lambda s: dataclasses.replace(s, placement="v"), "got placement 'v' with chunks = 1"),
    "number of microbatches": (lambda s: dataclasses.replace(s, microbatches=0), "got microbatches = 0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(damage):
    spoil, words = DAMAGE[damage]
    sound = build("1f1b", 2, 4)
    check(sound)
    with pytest.raises(ConfigError, match=re.escape(words)):
        check(spoil(sound))


def holds(schedule):
    """The rules again, from the ticks of all operations."""
    at, last = when(schedule), schedule.slices - 1
    forward, backward, weights = at[F], at[B], at[W]
    return bool(
        (forward[:, :-1] < forward[:, 1:]).all()
        and (forward < backward).all()
        and (backward[:, 1:] < backward[:, :-1]).all()
        and (backward < weights).all()
        and last + 1 == forward.shape[1]
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_check_accepts_exactly_what_holds(name):
    """Two cells of a stage are swapped, 150 times anew: some swaps are harmless, most are not."""
    schedule = build(name, 3, 6)
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(150):
        first, second = rng.integers(0, schedule.ticks, 2)
        changed = swapped(schedule, int(rng.integers(3)), int(first), int(second))
        verdicts.append(holds(changed))
        if verdicts[-1]:
            check(changed)
        else:
            with pytest.raises(ConfigError, match=r"tick \d+, stage [012]: [FBW] of microbatch"):
                check(changed)
    assert 3 < sum(verdicts) < 147


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 4), (4, 12)])
def test_csv_round_trip(name, p, m, tmp_path):
    schedule = build(name, p, m)
    assert from_csv(to_csv(schedule), name) == schedule
    path = tmp_path / "table.csv"
    path.write_text(to_csv(schedule))
    assert from_csv(path, name) == schedule


def test_csv_cells_say_slice_letter_microbatch():
    lines = to_csv(build("zbv", 2, 3)).splitlines()
    assert lines[0].startswith("0F0,0F1,0F2,3F0,3B0,3W0")
    assert lines[1].startswith(",1F0,2F0,1F1,2F1,")


def test_csv_with_i_is_the_same_as_with_b():
    schedule = build("zb-h1", 4, 8)
    assert from_csv(to_csv(schedule).replace("B", "I"), "zb-h1") == schedule


def test_csv_with_full_backwards_is_timed_anew():
    """PyTorch's 1F1B of 2 ranks; a gradient may leave before its W, so one p - 1 less than with backwards in one piece."""
    schedule = from_csv("0F0,0F1,,0B0,0F2,0B1,,0B2\n,1F0,1B0,1F1,1B1,1F2,1B2\n", "torch")
    assert schedule.ticks == 3 * 3 + 2
    row = [schedule.table[t][1] for t in range(schedule.ticks)]
    assert row[:4] == [REST, Op(F, 0, 0), Op(B, 0, 0), Op(W, 0, 0)]
    assert from_csv("0F0,0B0\n", "one").table == ((Op(F, 0, 0),), (Op(B, 0, 0),), (Op(W, 0, 0),))
    mixed = from_csv("0F0,0F1,0I0,0W0,0B1\n,1F0,1B0,1F1,1B1\n", "mixed")  # with an I, B is a full backward everywhere
    assert [schedule.kind for schedule in (op for row in mixed.table for op in row)].count(W) == 4


def test_csv_without_idle_ticks_is_an_order():
    schedule = from_csv("0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1\n")
    assert [schedule.table[t][1].kind for t in range(3)] == [0, F, B]
    check(schedule)


def test_csv_pairs_and_transfers():
    """A pair is one operation after the other; sends, receives and gathers follow from the table."""
    pairs = from_csv("0F0,3F0,3I0,3W0,0F1,(3F1;0B0)OVERLAP_F_B,3I1,3W1,0I1,0W1\n1F0,2F0,1F1,2B0,2F1,1B0,2B1,1B1\n")
    assert (pairs.placement, pairs.chunks, pairs.microbatches) == ("v", 2, 2)
    sends = from_csv("0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0RESHARD\n1RECV_F0,1F0,1B0,1SEND_B0,,\n")
    assert sends == from_csv("0F0,0B0\n1F0,1B0\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0X0\n", ["row 0, column 1", "'0X0'", "0F3"]),
        ("0F0\nF0\n", ["row 1, column 0", "'F0'"]),
        ("\n", ["no operation"]),
        (",,\n,\n", ["no operation"]),
        ("1F0\n0F0\n", ["row 1", "slice 0", "1, 3, ... or as a V 1 and 2"]),
        ("0F0,,0B0,0W0\n,1F0,1B0,1W0\n", ["tick 2, stage 0: B", "slice 1, which is at tick 2"]),
        ("0F0,,,0B0,0W0\n,1F0,1B0\n,\n", ["every stage waits", "stage 1 before B0"]),
        ("0F0,,0I0\n", ["W of microbatch 0 on slice 0 is missing"]),
        ("0F0,0F0,0B0\n", ["is there already at tick 0"]),
        ("0B0,0F0\n", ["every stage waits", "stage 0 before B0"]),
        ("0F0,0F2,0B0,0B2\n", ["F of microbatch 1 on slice 0 is missing"]),
    ],
)
def test_a_csv_that_does_not_hold_together_is_refused(text, words):
    with pytest.raises(ConfigError) as error:
        from_csv(text)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_csv_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.csv"):
        from_csv(tmp_path / "none.csv")


def test_orders_that_wait_for_each_other_are_refused():
    orders = [[Op(F, 0, 0), Op(B, 0, 0), Op(W, 0, 0)], [Op(B, 0, 0), Op(F, 0, 0), Op(W, 0, 0)]]
    with pytest.raises(
        ConfigError, match="at tick 1 every stage waits; stage 0 before B0 of chunk 0; stage 1 before B0"
    ):
        arrange("stuck", orders, 1, 1)
