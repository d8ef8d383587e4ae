"""Held-out loss against what a model costs: which artifacts no other beats on both."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.extras import require
from lmeff.report import words
from lmeff.report.figures import Plot, add_axes, line_between, make_plot, short, write
from lmeff.report.labels import Box, place, segment
from lmeff.report.schema import ArtifactRow, Report
from lmeff.report.statistics import pareto
from lmeff.report.svg import COLORS, mark, text_size
from lmeff.report.words import Axis

HEIGHT = 372.0
RADIUS = 4.6  # of a mark, in pixels
FAR = 4.0  # a loss further above the best than this many times the median's distance does not set the scale


class Frontier(NamedTuple):
    """The artifacts that have a finite loss and cost on an axis, which of them no other dominates, and those left out."""

    rows: list[ArtifactRow]
    best: np.ndarray
    missing: list[str]


def frontier(report: Report, axis: Axis) -> Frontier:
    """Splits the artifacts by the frontier of held-out loss against a cost."""
    rows = [row for row in report.artifacts if math.isfinite(row.loss) and _cost(row, axis) > 0]
    flags = pareto([(_cost(row, axis), row.loss) for row in rows])
    missing = [row.name for row in report.artifacts if row not in rows]
    return Frontier(rows, flags, missing)


def _cost(row: ArtifactRow, axis: Axis) -> float:
    value = axis.value(row)
    return math.nan if value is None or not math.isfinite(value) else float(value)


def frontier_plot(report: Report, axis: Axis) -> Plot | None:
    """Held-out loss against a cost, or None where no artifact has both."""
    found = frontier(report, axis)
    if not found.rows:
        return None
    title = f"Held-out loss against {axis.title}"
    top = scale_top([row.loss for row in found.rows])
    caption = _frontier_caption(report, axis, found, top)
    titles = {row.name: _tooltip(row, axis) for row in found.rows}

    return make_plot(
        axis.key, title, caption, HEIGHT, titles, lambda figure: _draw_frontier(figure, report, axis, found, top)
    )


def scale_top(losses: Sequence[float]) -> float:
    """The largest loss that sets the scale: what lies far above the rest is shown at the upper edge instead."""
    best, median = min(losses), float(np.median(losses))
    near = [loss for loss in losses if loss - best <= FAR * (median - best)]
    return max(near) if len(losses) > 2 and median > best else max(losses)


def _tooltip(row: ArtifactRow, axis: Axis) -> str:
    low, high = row.loss_interval
    shown = f" [{words.loss(low)}, {words.loss(high)}]" if math.isfinite(low + high) else ""
    return f"{row.name}: {words.loss(row.loss)}{shown} nats/token, {axis.show(_cost(row, axis))} {axis.unit}"


def _frontier_caption(report: Report, axis: Axis, found: Frontier, top: float) -> str:
    on = [row.name for row, best in zip(found.rows, found.best) if best]
    off = [row.name for row, best in zip(found.rows, found.best) if not best]
    parts = [f"On the frontier: {', '.join(on)}."]
    if off:
        parts.append(f"Dominated: {', '.join(off)}.")
    if above := [f"{row.name} ({words.loss(row.loss)})" for row in found.rows if row.loss > top]:
        parts.append(f"Above the scale: {', '.join(above)}.")
    if found.missing:
        parts.append(f"Without a finite number here: {', '.join(found.missing)}.")
    return " ".join(parts)


def _draw_frontier(figure: Any, report: Report, axis: Axis, found: Frontier, top: float) -> None:
    axes = add_axes(figure, "nats/token")
    costs = np.array([_cost(row, axis) for row in found.rows])
    axes.set_xscale("log")
    _limit_costs(axes, costs, found, axis)
    ceiling = _limit_losses(axes, found.rows, top)
    axes.set_xlabel(f"{axis.unit}, log scale" + ("; level bars are quartiles" if axis.key == "ms" else ""))
    shown = np.array([min(row.loss, ceiling) for row in found.rows])
    _draw_staircase(axes, costs[found.best], shown[found.best])
    for row, cost, y, best in zip(found.rows, costs, shown, found.best):
        _draw_point(axes, row, axis, cost, y, bool(best), row.name == report.base.name)
    _label_points(figure, axes, found, axis, costs, shown)


def _limit_costs(axes: Any, costs: np.ndarray, found: Frontier, axis: Axis) -> None:
    ends = [end for row in found.rows for end in axis.interval(row) or () if end > 0 and math.isfinite(end)]
    low, high = min([*costs, *ends]), max([*costs, *ends])
    margin = max((high / low) ** 0.12, 1.12)
    axes.set_xlim(low / margin, high * margin)
    ticks = log_ticks(low / margin, high * margin, 2 if axis.key == "bytes" else 10)
    axes.set_xticks(ticks, [_tick(axis, tick) for tick in ticks])
    axes.minorticks_off()


def _tick(axis: Axis, value: float) -> str:
    return f"{value:g}" if axis.key == "ms" else short_number(axis.show(value))


def short_number(text: str) -> str:
    """`10.0 M` as `10 M`, for ticks that are round numbers anyway."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".strip()


MULTIPLES = ((1.0, 2.0, 5.0), (1.0, 2.0, 3.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))


def log_ticks(low: float, high: float, base: int) -> list[float]:
    """About three to five round numbers for a logarithmic axis: powers of 2 (`base` 2), or few multiples of powers of 10."""
    steps = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
    powers = [float(base) ** step for step in steps]
    finer = [[p * m for p in powers for m in multiples] for multiples in MULTIPLES] if base == 10 else []
    for choice in [powers, *finer, *(powers[::stride] for stride in (2, 3, 4, 6, 8, 10))]:
        inside = [tick for tick in choice if low <= tick <= high]
        if 3 <= len(inside) <= 5:
            return inside
    ticker = require("matplotlib.ticker", extra="report")
    return [float(tick) for tick in ticker.MaxNLocator(3).tick_values(low, high) if low <= tick <= high]


def _limit_losses(axes: Any, rows: Sequence[ArtifactRow], top: float) -> float:
    """Sets the scale and returns where a loss beyond it is shown."""
    inside = [row for row in rows if row.loss <= top]
    ends = [end for row in inside for end in (row.loss, *row.loss_interval) if math.isfinite(end)]
    low, high = min(ends), max(ends)
    span = high - low or max(abs(high) * 0.1, 0.1)
    beyond = len(inside) < len(rows)
    axes.set_ylim(low - 0.12 * span, high + (0.3 if beyond else 0.16) * span)
    return high + 0.18 * span


def _draw_staircase(axes: Any, costs: np.ndarray, losses: np.ndarray) -> None:
    """Steps, not slopes: nothing between two artifacts has been reached."""
    order = np.lexsort((losses, costs))
    x, y = costs[order], losses[order]
    x = np.concatenate([x[:1], x, [axes.get_xlim()[1]]])
    y = np.concatenate([[axes.get_ylim()[1]], y, y[-1:]])
    axes.plot(x, y, drawstyle="steps-post", color=COLORS["accent"], linewidth=1.4, alpha=0.55, zorder=2)


def _draw_point(axes: Any, row: ArtifactRow, axis: Axis, cost: float, y: float, best: bool, is_base: bool) -> None:
    color = COLORS["accent"] if best else COLORS["muted"]
    inside = y == row.loss
    bar = {"color": color, "linewidth": 1.1, "alpha": 0.75, "zorder": 3}
    if inside and math.isfinite(sum(row.loss_interval)):
        axes.plot([cost, cost], row.loss_interval, **bar)
    quartiles = axis.interval(row)
    if quartiles is not None and math.isfinite(sum(quartiles)):
        axes.plot(quartiles, [y, y], **bar)
    marker = ("s" if is_base else "o") if inside else "^"
    look: dict[str, Any] = {"markerfacecolor": color if best else COLORS["page"], "markeredgewidth": 0 if best else 1.5}
    # A dot is smaller than a ring and above it: two artifacts in one place stay two.
    diameter = 2 * RADIUS - (0.4 if best else 0) - (1.0 if is_base and best else 0)
    axes.plot(
        [cost], [y], marker, markersize=diameter, color=color, zorder=6 if best else 5, gid=mark(row.name), **look
    )


def _label_points(figure: Any, axes: Any, found: Frontier, axis: Axis, costs: np.ndarray, shown: np.ndarray) -> None:
    pixel = axes.transData.transform(np.stack([costs, shown], axis=1))
    order = sorted(range(len(found.rows)), key=lambda i: (not found.best[i], shown[i]))
    names = [_label(found.rows[i], shown[i]) for i in order]
    sizes = [(width + 2, height) for width, height in (text_size(figure, name) for name in names)]
    half = RADIUS + 2.5
    hard = [(x - half, y - half, x + half, y + half) for x, y in pixel]
    soft = [*_bars(axes, found.rows, axis, costs, shown), *_stairs(axes, pixel[found.best])]
    inside = axes.get_window_extent()
    within = (inside.x0 + 3, inside.y0 + 3, inside.x1 + 14, inside.y1 + 10)
    places = place([tuple(pixel[i]) for i in order], sizes, within, hard, soft)
    for i, name, spot in zip(order, names, places):
        if spot is None:
            continue
        x, y = spot.box[0] + 1, spot.box[1]
        best = bool(found.best[i])
        if spot.leader is not None:
            start, end = pixel[i], np.array(spot.leader)
            start = start + (end - start) * min(1, half / math.dist(start, end))
            line_between(axes, start, end, zorder=1)
        write(axes, x, y, name, COLORS["ink"] if best else COLORS["muted"])


def _label(row: ArtifactRow, y: float) -> str:
    return short(row.name) if y == row.loss else f"{short(row.name)} {row.loss:.2f}"


def _bars(axes: Any, rows: Sequence[ArtifactRow], axis: Axis, costs: np.ndarray, shown: np.ndarray) -> list[Box]:
    boxes = []
    for row, cost, y in zip(rows, costs, shown):
        if y == row.loss and math.isfinite(sum(row.loss_interval)):
            ends = axes.transData.transform([(cost, row.loss_interval[0]), (cost, row.loss_interval[1])])
            boxes.append(segment(*ends[0], *ends[1]))
        quartiles = axis.interval(row)
        if quartiles is not None and math.isfinite(sum(quartiles)):
            ends = axes.transData.transform([(quartiles[0], y), (quartiles[1], y)])
            boxes.append(segment(*ends[0], *ends[1]))
    return boxes


def _stairs(axes: Any, pixel: np.ndarray) -> list[Box]:
    points = [(float(x), float(y)) for x, y in sorted(map(tuple, pixel))]
    edge, (first, last) = axes.get_window_extent(), (points[0], points[-1])
    boxes = [segment(first[0], first[1], first[0], edge.y1), segment(last[0], last[1], edge.x1, last[1])]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        boxes += [segment(x0, y0, x1, y0), segment(x1, y0, x1, y1)]
    return boxes
