"""Schedules as comma-separated tables, as PyTorch and TorchTitan write them: a row for each stage, a column for each tick.

A cell is `0F3`: slice 0, forward, microbatch 3; an empty cell is an idle tick. The first number is PyTorch's global stage, which is the slice of
the model; the rank, here the stage, is the row. Letters: F forward; I gradient of the input; W gradient of the weights; B is PyTorch's full
backward, I and W in one. Files written here say B for the input's gradient. So B means that where its W is in the table and no cell says I,
and else a full backward.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.parallel.tables import IDLE, LETTERS, REST, B, F, Op, Schedule, W, arrange, check, home

CELL = re.compile(r"(\d+)([FIBW])(\d+)")


class Cell(NamedTuple):
    """A cell that is not empty."""

    index: int
    letter: str
    microbatch: int


def to_csv(schedule: Schedule) -> str:
    """The table as text, with a line for each stage."""
    rows = []
    for s in range(schedule.stages):
        ops = [row[s] for row in schedule.table]
        cells = [
            f"{schedule.slice_of(s, op.chunk)}{LETTERS[op.kind]}{op.microbatch}" if op.kind != IDLE else ""
            for op in ops
        ]
        rows.append(",".join(cells))
    return "\n".join(rows) + "\n"


def from_csv(source: str | Path, name: str = "csv") -> Schedule:
    """Reads a table: a `Path` is a file, a `str` the text itself.

    Columns are ticks. Where there are full backwards, which take two ticks here, only the order of a row counts: each becomes B and then W, its
    gradient leaves after B, and everything is timed as early as can be. Raises `ConfigError` where a cell cannot be read or the table
    does not hold together.
    """
    rows = _read(source, name)
    placement, chunks = _placement(rows, name)
    cells = [cell for row in rows for cell in row if cell]
    microbatches = max(cell.microbatch for cell in cells) + 1
    full = _full_backwards(cells)
    ops = [[_ops(cell, len(rows), full) for cell in row] for row in rows]
    if full:
        orders = [[op for group in row for op in group if op.kind != IDLE] for row in ops]
        schedule = arrange(name, orders, microbatches, chunks, placement=placement)
    else:
        ticks = max(len(row) for row in ops)
        padded = [[group[0] for group in row] + [REST] * (ticks - len(row)) for row in ops]
        table = tuple(zip(*padded))
        schedule = Schedule(
            name=name, stages=len(rows), microbatches=microbatches, chunks=chunks, table=table, placement=placement
        )
    check(schedule)
    return schedule


def _read(source: str | Path, name: str) -> list[list[Cell | None]]:
    if isinstance(source, Path):
        try:
            source = source.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"schedule {name}: cannot read {source}: {error}") from error
    lines = source.rstrip("\n").split("\n")
    rows = [
        [_cell(text, name, tick, stage) for tick, text in enumerate(line.split(","))]
        for stage, line in enumerate(lines)
    ]
    if not any(cell for row in rows for cell in row):
        raise ConfigError(f"schedule {name}: got no operation, expected a line for each stage, such as 0F0,0F1,0B0,0W0")
    return rows


def _cell(text: str, name: str, tick: int, stage: int) -> Cell | None:
    text = text.strip()
    if not text:
        return None
    found = CELL.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"schedule {name}, column {tick}, row {stage}: got {text!r}, expected slice, one of F I B W, microbatch, such as 0F3; "
            "sends, gathers and overlapped operations are not for this table, so export the one with computations only"
        )
    return Cell(int(found[1]), found[2], int(found[3]))


def _placement(rows: list[list[Cell | None]], name: str) -> tuple[Literal["loop", "v"], int]:
    """The placement under which every slice is on its row, and the chunks."""
    p = len(rows)
    homes = {(cell.index, stage) for stage, row in enumerate(rows) for cell in row if cell}
    chunks = max(index for index, _ in homes) // p + 1
    for placement in ("loop", "v"):
        if all(home(placement, p, index)[0] == stage for index, stage in homes):
            return placement, chunks
    index, stage = min((index, stage) for index, stage in homes if home("loop", p, index)[0] != stage)
    raise ConfigError(
        f"schedule {name}, row {stage}: got slice {index}, expected slices {stage}, {stage + p}, ... or as a V {stage} and {2 * p - 1 - stage}"
    )


def _full_backwards(cells: list[Cell]) -> set[tuple[int, int]]:
    """(slice, microbatch) of each B that is a full backward."""
    count = Counter((cell.letter, cell.index, cell.microbatch) for cell in cells)
    split = any(cell.letter == "I" for cell in cells)
    backwards = {(index, microbatch) for letter, index, microbatch in count if letter == "B"}
    return {key for key in backwards if split or ("W", *key) not in count}


def _ops(cell: Cell | None, stages: int, full: set[tuple[int, int]]) -> tuple[Op, ...]:
    if cell is None:
        return (REST,)
    chunk = cell.index // stages
    kind = {"F": F, "I": B, "B": B, "W": W}[cell.letter]
    op = Op(kind, cell.microbatch, chunk)
    if cell.letter == "B" and (cell.index, cell.microbatch) in full:
        return op, op._replace(kind=W)
    return (op,)
