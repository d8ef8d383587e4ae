"""Numbers as people read them, and results as sentences. Every sentence is computed from the report, also when a claim failed."""

import math
import unicodedata
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from lmeff.report.schema import ArtifactRow, Comparison, Interval, Report

LEADING = 2  # comparisons that are told among the headlines
CLOSE = 0.01  # a loss within 1% of the baseline's counts as close to it
DASH = "–"


def count(value: float) -> str:
    """`1234567` as `1.23 M`."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"))


def size(value: float) -> str:
    """Bytes as `1.18 MiB`."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def seconds(value: float) -> str:
    """`4210` as `1 h 10 min`, and `200_000` as `2 d 8 h`."""
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24:,} d {hours % 24} h"


def brief(value: float) -> str:
    """Seconds with the unit that suits them: `0.0123` as `12.3 ms`."""
    for unit, scale in (("µs", 1e-6), ("ms", 1e-3)):
        if value and value < 999.5 * scale:
            return f"{number(value / scale)} {unit}"
    return seconds(value)


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent where it reads well; a dash where there is no number."""
    if value is None or math.isnan(value):
        return DASH
    if value == 0 or not math.isfinite(value) or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    power = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 0.9996 is 1.00, not 1.000
    return f"{value:.{max(digits - 1 - power, 0)}f}"


def amount(value: float) -> str:
    """`1190000` as `1.19 M`, small ones in three digits."""
    return count(value) if value >= 1000 else number(value)


def loss(value: float) -> str:
    """Nats per token, to 4 digits after the point; says so where a run diverged."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def half_width(interval: Interval) -> str:
    """Half of an interval's width, for `loss ± half`."""
    half = (interval[1] - interval[0]) / 2
    return f"{half:.4f}" if math.isfinite(half) else DASH


def percent(value: float, digits: int = 2) -> str:
    """A signed share: `0.0123` as `+1.23%`."""
    return f"{100 * value:+.{digits}f}%" if math.isfinite(value) else DASH


def ratio(value: float | None, base: float | None) -> str:
    """`value / base` as `×0.25`."""
    if value is None or not base or not math.isfinite(value / base):
        return DASH
    return f"×{number(value / base, 2)}"


def printable(text: str) -> str:
    """Without control characters and lone surrogates, which XML refuses and terminals obey."""
    return "".join("?" if unicodedata.category(character) in ("Cc", "Cs") else character for character in text)


def moment(text: str) -> str:
    """An ISO 8601 time as `2026-03-04 05:06 UTC`; what is none stays as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def plural(how_many: int, noun: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{how_many:,} {noun}{'' if how_many == 1 else 's'}"


def excess(row: ArtifactRow, base: ArtifactRow) -> float:
    """How much more loss than the baseline, as a share of the baseline's."""
    return row.loss / base.loss - 1 if base.loss else math.nan


class Axis(NamedTuple):
    """A cost that the frontier is drawn against; lower is better."""

    key: str
    title: str
    unit: str
    value: Callable[[ArtifactRow], float | None]
    interval: Callable[[ArtifactRow], Interval | None]
    show: Callable[[float], str]


AXES = (
    Axis("bytes", "stored bytes", "bytes", lambda row: row.stored_bytes, lambda row: None, size),
    Axis("flops", "FLOPs per token", "FLOPs/token", lambda row: row.flops_per_token, lambda row: None, count),
    Axis(
        "ms", "measured time per token", "ms/token", lambda row: row.ms_per_token, lambda row: row.ms_interval, number
    ),
)


def comparison_sentence(c: Comparison) -> str:
    """What a paired difference says, and whether its interval leaves a doubt."""
    low, high = c.interval
    if not math.isfinite(c.difference):
        return f"{c.a} and {c.b} cannot be compared: a loss is not finite."
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{c.a} differs from {c.b} by {c.difference:+.4f} nats/token; too few documents for an interval."
    shown = f"[{low:+.4f}, {high:+.4f}]"
    if low <= 0 <= high:
        return f"{c.a} and {c.b} cannot be told apart: {c.difference:+.4f} nats/token, interval {shown} holds 0."
    word = "lower" if c.difference < 0 else "higher"
    return f"{c.a} has a {word} loss than {c.b} by {abs(c.difference):.4f} nats/token, interval {shown}."


def comparison_text(c: Comparison) -> str:
    """The sentence a comparison came with, else the one its numbers make."""
    return c.sentence or comparison_sentence(c)


def headlines(report: Report) -> list[str]:
    """The result in sentences: the smallest artifact that is close to the baseline, the fastest, claims, comparisons, what diverged."""
    found = [
        _smallest(report),
        _fastest(report),
        _claims(report),
        *map(comparison_text, report.comparisons[:LEADING]),
        _diverged(report),
    ]
    return [sentence for sentence in found if sentence]


def _smallest(report: Report) -> str:
    base = report.base
    if not math.isfinite(base.loss):
        return f"The baseline {base.name} has no finite held-out loss, so nothing can be measured against it."
    others = [row for row in report.artifacts if row.name != base.name and math.isfinite(row.loss)]
    smaller = [row for row in others if row.stored_bytes < base.stored_bytes]
    if not smaller:
        return f"No artifact is smaller than {base.name} ({size(base.stored_bytes)}, {loss(base.loss)} nats/token)."
    close = [row for row in smaller if excess(row, base) <= CLOSE]
    if not close:
        best = min(smaller, key=lambda row: row.loss)
        return (
            f"No smaller artifact comes within {CLOSE:.0%} of the loss of {base.name}; the nearest is {best.name}, {_shrink(best, base)} "
            f"at {percent(excess(best, base))} loss ({loss(base.loss)} to {loss(best.loss)} nats/token)."
        )
    best = min(close, key=lambda row: (row.stored_bytes, row.loss))
    return (
        f"{best.name} is {_shrink(best, base)} than {base.name} at {percent(excess(best, base))} loss "
        f"({loss(base.loss)} to {loss(best.loss)} nats/token)."
    )


def _shrink(row: ArtifactRow, base: ArtifactRow) -> str:
    return f"{number(base.stored_bytes / row.stored_bytes, 3)} times smaller"


def _fastest(report: Report) -> str:
    base = report.base
    timed = [row for row in report.artifacts if row.ms_per_token and row.name != base.name]
    if not timed or not base.ms_per_token:
        return ""
    best = min(timed, key=lambda row: row.ms_per_token or math.inf)
    assert best.ms_per_token is not None
    apart = best.ms_interval is None or base.ms_interval is None or best.ms_interval[1] < base.ms_interval[0]
    if best.ms_per_token >= base.ms_per_token or not apart:
        return f"Nothing ran measurably faster than {base.name} ({number(base.ms_per_token)} ms/token) on this machine."
    return (
        f"The fastest is {best.name}: {number(best.ms_per_token)} ms/token, {number(base.ms_per_token / best.ms_per_token)} times as fast as {base.name} "
        f"on this machine, at {percent(excess(best, base))} loss."
    )


def _claims(report: Report) -> str:
    if not report.verdicts:
        return ""
    failed = [verdict.claim.rstrip(".") for verdict in report.verdicts if not verdict.passed]
    held = len(report.verdicts) - len(failed)
    if not failed:
        return f"All {plural(held, 'claim')} checked held." if held > 1 else "The one claim checked held."
    return f"{held} of {plural(len(report.verdicts), 'claim')} held. Failed: {'; '.join(failed)}."


def _diverged(report: Report) -> str:
    names = [row.name for row in report.artifacts if not math.isfinite(row.loss)]
    return f"No finite held-out loss: {', '.join(names)}." if names else ""


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while power < len(units) - 1 and abs(value) >= base * 0.9995:
        value, power = value / base, power + 1
    return f"{number(value, 3) if power else f'{value:g}'} {units[power]}".strip()
