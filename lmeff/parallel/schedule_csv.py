"""Schedules as comma-separated tables, as PyTorch and TorchTitan write them: a row for each stage, a column for each tick.

A cell is `0F3`: slice 0, forward, microbatch 3; an empty cell is an idle tick. The first number is PyTorch's global stage, which is the slice of
the model; the rank, here the stage, is the row. Letters: F forward; I gradient of the input; W gradient of the weights; B is PyTorch's full
backward, I and W in one. Files written here say B for the input's gradient. So B means that where its W is in the table and no cell says I,
and else a full backward.

Many of these files are orders, not times. Only the order of a row counts, and everything is timed as early as can be, where a table has no empty
cells within its rows (a pipeline cannot be without idle ticks), has full backwards (two ticks here: B and then W, the gradient leaves after B), pairs of
operations such as `(0F7;7B3)OVERLAP_F_B` (one after the other here), or sends, receives and gathers (left out: they follow from the table).
"""

import re
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.parallel.tables import IDLE, LETTERS, REST, B, F, Op, Schedule, W, arrange, check, home

CELL = re.compile(r"(\d+)([FIBW])(\d+)")
PAIR = re.compile(r"\(([^;]*);([^)]*)\)OVERLAP_F_B")
TRANSFER = re.compile(r"\d+(?:(?:SEND|RECV)_[FB]\d+|UNSHARD|RESHARD|REDUCE_GRAD)")


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
    """Reads a table: a `Path` is a file, a `str` the text itself. Raises `ConfigError` where it cannot be read or does not hold together."""
    text = _text(source, name)
    rows = [_row(line, name, stage) for stage, line in enumerate(text.rstrip("\n").split("\n"))]
    cells = [cell for row in rows for cell in row if cell]
    if not cells:
        raise ConfigError(f"schedule {name}: got no operation, expected a line for each stage, such as 0F0,0F1,0B0,0W0")
    placement, chunks = _placement(rows, name)
    microbatches = max(cell.microbatch for cell in cells) + 1
    full = _full_backwards(cells)
    orders = [[op for cell in row if cell for op in _ops(cell, len(rows), full)] for row in rows]
    if full or TRANSFER.search(text) or PAIR.search(text) or not any(None in row for row in rows):
        schedule = arrange(name, orders, microbatches, chunks, placement=placement)
    else:
        schedule = Schedule(
            name=name,
            stages=len(rows),
            microbatches=microbatches,
            chunks=chunks,
            table=_by_tick(rows),
            placement=placement,
        )
    check(schedule)
    return schedule


def _text(source: str | Path, name: str) -> str:
    if isinstance(source, str):
        return source
    try:
        return source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"schedule {name}: cannot read {source}: {error}") from error


def _row(line: str, name: str, stage: int) -> list[Cell | None]:
    cells = [text.strip() for text in PAIR.sub(r"\1,\2", line.rstrip(", \r")).split(",")]
    return [_cell(text, name, tick, stage) for tick, text in enumerate(cells) if not TRANSFER.fullmatch(text)]


def _cell(text: str, name: str, tick: int, stage: int) -> Cell | None:
    if not text:
        return None
    found = CELL.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"schedule {name}, row {stage}, column {tick}: got {text!r}, expected slice, one of F I B W, and microbatch, such as 0F3"
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


def _ops(cell: Cell, stages: int, full: set[tuple[int, int]]) -> list[Op]:
    chunk = cell.index // stages
    op = Op({"F": F, "I": B, "B": B, "W": W}[cell.letter], cell.microbatch, chunk)
    if cell.letter == "B" and (cell.index, cell.microbatch) in full:
        return [op, op._replace(kind=W)]
    return [op]


def _by_tick(rows: list[list[Cell | None]]) -> tuple[tuple[Op, ...], ...]:
    ticks = max(len(row) for row in rows)
    ops = [[_ops(cell, len(rows), set())[0] if cell else REST for cell in row] for row in rows]
    return tuple(zip(*(row + [REST] * (ticks - len(row)) for row in ops)))
