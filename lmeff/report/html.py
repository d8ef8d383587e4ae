"""The report as one HTML file that needs nothing else: no network, no script, light and dark, wide and narrow."""

import functools
import math
import re
from pathlib import Path
from typing import Any

from lmeff.core.extras import require
from lmeff.core.files import write_text
from lmeff.parallel.schedule_csv import from_csv
from lmeff.parallel.simulate import simulate
from lmeff.report import words
from lmeff.report.frontier import frontier
from lmeff.report.pipeline import schedule_svg
from lmeff.report.plots import make_plots
from lmeff.report.schema import ArtifactRow, Report, config_rows
from lmeff.report.words import AXES


def write_html(report: Report, path: Path) -> None:
    """Writes the page, complete or not at all. The same report gives the same bytes."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text."""
    first, *others = words.headlines(report)
    plots = make_plots(report)
    return template("report.html").render(
        report=report,
        lead=first,
        sentences=others,
        plots=[plots[key] for key in ("bytes", "flops", "ms", "curves") if key in plots],
        forest=plots.get("comparisons"),
        rows=[_row(report, row) for row in report.artifacts],
        comparisons=[words.comparison_text(c) for c in report.comparisons],
        verdicts=report.verdicts,
        settings=config_rows(report.config),
        environment=config_rows(report.environment),
        facts=_facts(report),
        pipeline=pipeline(report.schedule, report.schedule_table),
        made=words.moment(report.created),
        number=words.number,
        shape=lambda shape: " × ".join(map(str, shape)) or "scalar",
    )


def template(name: str) -> Any:
    """A page's template, in which what looks like markup in a text stays what it is."""
    return _environment(require("jinja2", extra="report")).get_template(name)


@functools.cache
def _environment(jinja2: Any) -> Any:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lmeff.report", "templates"),
        autoescape=True,
        finalize=lambda value: words.printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["minus"] = lambda text: re.sub(r"(?<![\w.-])-(?=\d)", "−", text)
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    return environment


def pipeline(name: str, table: str) -> dict[str, str] | None:
    """The picture of a schedule, given as CSV, and what it costs in words; None without a table."""
    if not table:
        return None
    schedule = from_csv(table, name)
    counts = simulate(schedule)
    picture = schedule_svg(schedule)
    size = re.search(r'viewBox="0 0 (\d+) ', picture)
    assert size is not None
    caption = (
        f"{name}: {words.plural(schedule.stages, 'stage')}, microbatches: {schedule.microbatches}, "
        f"{words.plural(schedule.ticks, 'tick')}, {counts.idle_share:.0%} of them idle; at most {int(counts.in_flight.max())} in flight on a stage."
    )
    return {"picture": picture, "width": size[1], "caption": caption}


def _facts(report: Report) -> list[tuple[str, str]]:
    found = [
        ("Artifacts", str(len(report.artifacts))),
        (
            "Held-out text",
            f"{words.plural(report.held_out_tokens, 'token')} in {words.plural(report.held_out_documents, 'document')}",
        ),
        ("Baseline", report.base.name),
        ("Data", report.data),
    ]
    return [(term, text) for term, text in found if text]


def _row(report: Report, row: ArtifactRow) -> dict[str, Any]:
    """The cells of an artifact's row, as text; `share` is what its bar shows of the largest."""
    base = report.base
    low, high = row.loss_interval
    quartiles = row.ms_interval
    return {
        "row": row,
        "is_base": row is base,
        "made_from": ", ".join(row.parents),
        "loss": words.loss(row.loss),
        "interval": f"{words.loss(low)} to {words.loss(high)}" if math.isfinite(low + high) else "no interval",
        "excess": "baseline" if row is base else words.percent(words.excess(row, base)),
        "bits_per_byte": f"{row.bits_per_byte:.3f}" if math.isfinite(row.bits_per_byte) else words.DASH,
        "parameters": words.count(row.parameters),
        "nonzero": f"{row.nonzero_parameters / row.parameters:.0%} not zero" if row.parameters else "",
        "bytes": words.size(row.stored_bytes),
        "bytes_ratio": words.ratio(row.stored_bytes, base.stored_bytes),
        "bits": words.number(row.effective_bits),
        "flops": words.count(row.flops_per_token),
        "flops_ratio": words.ratio(row.flops_per_token, base.flops_per_token),
        "ms": words.number(row.ms_per_token),
        "ms_ratio": words.ratio(row.ms_per_token, base.ms_per_token),
        "quartiles": "" if quartiles is None else f"{words.number(quartiles[0])} to {words.number(quartiles[1])}",
        "tokens": words.count(row.train_tokens) if row.train_tokens else "none",
        "seconds": words.seconds(row.train_seconds) if row.train_seconds else "",
        "best": _wins(report, row),
    }


def _wins(report: Report, row: ArtifactRow) -> set[str]:
    """The axes on whose frontier an artifact lies."""
    found = {axis.key: frontier(report, axis) for axis in AXES}
    return {key for key, f in found.items() for other, best in zip(f.rows, f.best) if best and other is row}
