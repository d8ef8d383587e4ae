"""The report on the terminal: readable at 80 columns, more columns where they fit, plain ASCII rules where nobody watches."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmeff.report import words
from lmeff.report.schema import ArtifactRow, Report, RuleRow

WIDE = 126  # columns from which every number fits
PLAIN = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


class Column(NamedTuple):
    """A column of the table of artifacts: its head, whether it needs a wide terminal, and its text of `(row, baseline)`."""

    head: str
    wide: bool
    text: Callable[[ArtifactRow, ArtifactRow], str]


COLUMNS = (
    Column("kind", True, lambda row, base: row.kind),
    Column("loss", False, lambda row, base: f"{words.loss(row.loss)} ±{words.half_width(row.loss_interval)}"),
    Column("vs base", False, lambda row, base: "base" if row is base else words.percent(words.excess(row, base), 1)),
    Column("bits/byte", True, lambda row, base: words.number(row.bits_per_byte)),
    Column("params", True, lambda row, base: words.count(row.parameters)),
    Column("stored", False, lambda row, base: words.size(row.stored_bytes)),
    Column("size", False, lambda row, base: words.ratio(row.stored_bytes, base.stored_bytes)),
    Column("bits", True, lambda row, base: words.number(row.effective_bits)),
    Column("FLOPs/token", True, lambda row, base: words.count(row.flops_per_token)),
    Column("ms/token", False, lambda row, base: words.number(row.ms_per_token)),
    Column("time", False, lambda row, base: words.ratio(row.ms_per_token, base.ms_per_token)),
)


def print_artifacts(report: Report, console: Console) -> None:
    """Every artifact with its loss and interval, size and time, each also as a ratio to the baseline; then the result in sentences."""
    columns = [column for column in COLUMNS if console.width >= WIDE or not column.wide]
    table = make_table(console, "artifact", *(column.head for column in columns), text_columns=("artifact", "kind"))
    for row in report.artifacts:
        style = "bold" if row.name == report.base.name else ""
        cells = [column.text(row, report.base) for column in columns]
        table.add_row(*(make_cell(console, cell, style) for cell in (row.name, *cells)))
    console.print(table)
    told = f"held-out loss in nats/token over {words.plural(report.held_out_documents, 'document')}"
    console.print(make_cell(console, f"{told}; ratios to {report.base.name}"), soft_wrap=not console.is_terminal)
    print_points(console, words.headlines(report))


def print_rules(rows: Iterable[RuleRow], console: Console) -> None:
    """What the rules resolved to, leaf by leaf."""
    table = make_table(console, "parameter", "letters", "shape", "rule", text_columns=("parameter", "letters", "rule"))
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        table.add_row(*(make_cell(console, cell) for cell in (row.path, row.letters, shape, row.rule)))
    console.print(table)


def print_comparisons(report: Report, console: Console) -> None:
    """Paired differences on the same documents, each with what it says."""
    if not report.comparisons:
        return
    table = make_table(console, "a - b", "nats/token", "interval", text_columns=("a - b",))
    for c in report.comparisons:
        interval = f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]"
        cells = (f"{c.a} - {c.b}", f"{c.difference:+.4f}", interval)
        table.add_row(*(make_cell(console, cell) for cell in cells))
    console.print(table)
    print_points(console, (words.comparison_text(c) for c in report.comparisons))


def make_table(console: Console, *heads: str, text_columns: tuple[str, ...]) -> Table:
    """A table with heads; `text_columns` are flush left and may take several lines, the others are numbers."""
    style = box.SIMPLE_HEAD if console.is_terminal and not console.options.ascii_only else PLAIN
    table = Table(box=style, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    for head in heads:
        is_text = head in text_columns
        table.add_column(head, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def print_points(console: Console, sentences: Iterable[str]) -> None:
    """Sentences as a list; whole lines where nobody watches."""
    grid = Table.grid(padding=(0, 1))
    for sentence in sentences:
        if console.is_terminal:
            grid.add_row("-", make_cell(console, sentence))
        else:
            console.print(make_cell(console, f"- {sentence}"), soft_wrap=True)
    if grid.row_count:
        console.print(grid)


def make_cell(console: Console, text: str, style: str = "") -> Text:
    """Plain text: what looks like markup in a name stays what it is, and a terminal without Unicode gets ASCII."""
    shown = words.printable(text)
    if console.options.ascii_only:
        for character, plain in {"±": "+-", "×": "x", "–": "-", "µ": "u", "█": "#", "░": "."}.items():
            shown = shown.replace(character, plain)
        shown = shown.encode("ascii", "replace").decode("ascii")
    return Text(shown, style=style)
