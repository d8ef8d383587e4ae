"""Zero-bubble schedules: W waits for ticks in which its stage would else be idle (Qi et al. 2023, https://arxiv.org/abs/2401.10241).

In one step that begins and ends together on all stages, 3m + p - 1 ticks is the least there can be: the last stage cannot begin before p - 1.
H1 reaches it within the memory of 1F1B. H2 takes as many ticks, with up to 2p - 1 microbatches in flight; what it gains is that no stage is idle between
its first and its last operation, so steps that do not wait for each other can follow without a gap.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from lmeff.parallel.tables import REST, B, F, Op, Schedule, W, arrange, needs, slice_of

# What a stage would do, best first: (stage, operations done by (kind, chunk), last operation) -> (kind, chunk).
Policy = Callable[[int, Counter[tuple[int, int]], Op], Iterable[tuple[int, int]]]


def zb_h1(name: str, p: int, m: int, v: int) -> Schedule:
    """At most p - stage microbatches between F and B, as in 1F1B, and at most p between F and W."""
    return _greedy(name, p, m, v, _forward_first(lambda s: p - s, p))


def zb_h2(name: str, p: int, m: int, v: int) -> Schedule:
    """Fills the ramp with forwards: at most 2 (p - stage) - 1 microbatches between F and B and 2p - 1 between F and W. Needs m >= 2p - 1 for that."""
    return _greedy(name, p, m, v, _forward_first(lambda s: 2 * (p - s) - 1, 2 * p - 1))


def zbv(name: str, p: int, m: int, v: int) -> Schedule:
    """Two chunks a stage, placed as a V (Qi et al. 2024, https://arxiv.org/abs/2405.15362): at most 2p slices, p stages' worth, between F and W.

    With 2p - 1 microbatches or more, no stage is idle between its first and its last operation. With fewer the ramp is not filled, and
    turns over the chunks take its place.
    """
    if m >= 2 * p - 1:
        return arrange(name, [_v_order(s, p, m) for s in range(p)], m, v, placement="v")
    return _greedy(name, p, m, v, _take_turns(2 * p), "v")


def _forward_first(until_b: Callable[[int], int], until_w: int) -> Policy:
    """F while so many microbatches may be between F and B, and between F and W; else B; else W."""

    def policy(stage: int, done: Counter[tuple[int, int]], last: Op) -> Iterable[tuple[int, int]]:
        ahead = done[F, 0] - done[B, 0] < until_b(stage) and done[F, 0] - done[W, 0] < until_w
        return ((F, 0), (B, 0), (W, 0)) if ahead else ((B, 0), (W, 0))

    return policy


def _take_turns(until_w: int) -> Policy:
    """F before B and the first chunk before the second, but what was done last comes last; W where nothing else can go on."""
    turns = ((F, 0), (F, 1), (B, 0), (B, 1))

    def policy(stage: int, done: Counter[tuple[int, int]], last: Op) -> Iterable[tuple[int, int]]:
        flying = sum(done[F, c] - done[W, c] for c in (0, 1))
        room = {
            (F, 0): flying < until_w - 1,
            (F, 1): flying < until_w,
        }  # the second chunk keeps a place, or nothing goes on
        order = sorted(turns, key=lambda turn: turn == (last.kind, last.chunk))
        return (*(turn for turn in order if room.get(turn, True)), (W, 1), (W, 0))

    return policy


def _greedy(name: str, p: int, m: int, v: int, policy: Policy, placement: Literal["loop", "v"] = "loop") -> Schedule:
    """Each tick, each stage does the first that its policy names and that can go on; microbatches in their order."""
    table: list[tuple[Op, ...]] = []
    finished: set[tuple[int, int, int]] = set()
    done = [Counter[tuple[int, int]]() for _ in range(p)]
    last = [REST] * p
    while len(finished) < 3 * m * v * p:
        row = []
        for s in range(p):
            ready = (Op(k, done[s][k, c], c) for k, c in policy(s, done[s], last[s]) if done[s][k, c] < m)
            row.append(
                next((op for op in ready if _possible(op, slice_of(placement, p, s, op.chunk), p * v, finished)), REST)
            )
        assert any(op is not REST for op in row), f"{name} p={p} m={m}: all stages wait at tick {len(table)}"
        for s, op in enumerate(row):
            if op is not REST:
                finished.add((op.kind, op.microbatch, slice_of(placement, p, s, op.chunk)))
                done[s][op.kind, op.chunk] += 1
                last[s] = op
        table.append(tuple(row))
    return Schedule(name=name, stages=p, microbatches=m, chunks=v, table=tuple(table), placement=placement)


def _possible(op: Op, index: int, slices: int, finished: set[tuple[int, int, int]]) -> bool:
    return all(need in finished for need in needs(op.kind, op.microbatch, index, slices - 1))


def _v_order(stage: int, p: int, m: int) -> list[Op]:
    """Forwards of the first chunk until its first gradient can be there, then all six operations in turn, then what is left."""
    backward_1, backward_0 = [(B, 1), (W, 1)], [(B, 0), (W, 0)]
    turn = [(F, 0), *backward_0, (F, 1), *backward_1]
    ramp = [(F, 0)] * (2 * (p - stage) - 1) + [(F, 1), (F, 0)] * stage + [(F, 1), *backward_1] * (p - stage)
    drain = [(B, 0), (B, 1)] * stage + backward_0 * (p - stage) + [(W, 1)] * stage + [(W, 0)] * stage
    forwards = 2 * (p - stage) - 1 + stage
    steady = turn * (m - forwards) + [step for step in turn if step != (F, 0)] * (forwards - p)
    count = Counter[tuple[int, int]]()
    order = []
    for kind, chunk in ramp + steady + drain:
        order.append(Op(kind, count[kind, chunk], chunk))
        count[kind, chunk] += 1
    return order
