"""A benchmark's result as a table, and below it in words what might be passed over."""

from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console

from lmeff.bench.measure import Result, Run
from lmeff.bench.words import GB, words
from lmeff.report.tables import WIDE, make_cell, make_table, print_points

MB = 1e6


class Column(NamedTuple):
    """A column: its head, whether it needs a wide terminal, and the text of a run, None where it is not known."""

    head: str
    wide: bool
    text: Callable[[Run], str | None]


COLUMNS = (
    Column("tokens/s", False, lambda run: f"{run.tokens_per_second:,.1f}"),
    Column("ms/token", False, lambda run: f"{run.ms.median:.3g}"),
    Column("quartiles", True, lambda run: f"{run.ms.low:.3g} - {run.ms.high:.3g}"),
    Column("weights MB", True, lambda run: f"{run.stored / MB:,.1f}"),
    Column("moved MB", False, lambda run: f"{(run.read + run.cache) / MB:,.1f}"),
    Column(
        "TFLOP/s", False, lambda run: None if run.flops_per_second is None else f"{run.flops_per_second / 1e12:.3g}"
    ),
    Column("of peak", True, lambda run: _percent(run.peak_share)),
    Column("GB/s", False, lambda run: f"{run.bytes_per_second / GB:.1f}"),
    Column("of measured", False, lambda run: _percent(run.bandwidth_share)),
    Column("of sheet", True, lambda run: _percent(run.table_share)),
    Column("x first", False, lambda run: f"{run.ratio:.2f}"),
    Column("compile s", True, lambda run: f"{run.compile_seconds:.1f}"),
)


def print_result(result: Result, console: Console) -> None:
    """A row a format, then in words what might be passed over."""
    shape = result.shape
    what = f"{shape.tokens} tokens after " if result.kind == "decode" else ""
    told = (
        f"{result.kind}: batch {shape.batch}, {what}prompts of {shape.context} tokens, {result.device}, {result.mesh}"
    )
    console.print(told, highlight=False, soft_wrap=True)
    wide = console.width >= WIDE
    columns = [c for c in COLUMNS if (wide or not c.wide) and all(c.text(run) is not None for run in result.runs)]
    table = make_table(console, "format", *(column.head for column in columns), text_columns=("format",))
    for run in result.runs:
        table.add_row(
            *(make_cell(console, cell) for cell in (run.name, *(column.text(run) or "" for column in columns)))
        )
    console.print(table)
    print_points(console, words(result))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"
