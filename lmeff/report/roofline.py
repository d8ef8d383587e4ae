"""The roofline of a train step: every site of work at its FLOPs a byte, under what the chip computes and what its memory feeds it.

Williams, Waterman and Patterson 2009 (https://doi.org/10.1145/1498765.1498785). Sites lie on the roof: they are bounds, not measurements.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmeff.report import words
from lmeff.report.figures import Plot, add_axes, line_between, make_plot, short, write
from lmeff.report.frontier import short_number
from lmeff.report.labels import place, segment
from lmeff.report.svg import COLORS, mark, text_size

HEIGHT = 380.0
LARGEST, SMALLEST = 15.0, 5.0  # pixels across a mark: its area is the site's time


class Point(NamedTuple):
    """A site: FLOPs a byte, FLOPs a second at the roof, seconds."""

    name: str
    intensity: float
    rate: float
    seconds: float
    bound: str


def points(sites: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The sites that compute and move something."""
    found = [(site, max(site["compute"], site["memory"])) for site in sites]
    return [
        Point(site["name"], site["flops"] / site["bytes"], site["flops"] / seconds, seconds, site["bound"])
        for site, seconds in found
        if site["flops"] and site["bytes"] and seconds
    ]


def roofs(sites: Sequence[Mapping[str, Any]]) -> tuple[list[float], float]:
    """FLOPs a second of every format that is used, and bytes a second of the memory, as the sites' times have them."""
    rates = {float(f"{site['flops'] / site['compute']:.3g}") for site in sites if site["flops"] and site["compute"]}
    fed = [site["bytes"] / site["memory"] for site in sites if site["bytes"] and site["memory"]]
    return sorted(rates), max(fed, default=0.0)


def roofline_plot(sites: Sequence[Mapping[str, Any]]) -> Plot | None:
    """The picture; None where nothing computes."""
    found = points(sites)
    rates, memory = roofs(sites)
    if not found or not rates or not memory:
        return None
    bound = [point.name for point in found if point.bound == "memory"]
    told = f"Bound by memory: {', '.join(bound)}." if bound else "No site is bound by memory."
    caption = f"Per device: {words.size(memory)}/s of memory, {' and '.join(words.count(rate) for rate in rates)} FLOPs/s. {told} A mark's area is its time."
    titles = {point.name: _tooltip(point) for point in found}
    return make_plot(
        "roofline", "Roofline", caption, HEIGHT, titles, lambda figure: _draw(figure, found, rates, memory)
    )


def _tooltip(point: Point) -> str:
    return f"{point.name}: {words.number(point.intensity)} FLOPs/byte, {words.brief(point.seconds)} a step, bound by {point.bound}"


def _draw(figure: Any, found: list[Point], rates: list[float], memory: float) -> None:
    axes = add_axes(figure, "FLOPs/s of a device, log scale", left=62)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte, log scale")
    ridge = rates[-1] / memory
    low = min(*(p.intensity / 2.2 for p in found), ridge / 12)
    high = max([*(p.intensity for p in found), ridge]) * 2.2
    _limit(axes, low, high, low * memory, rates[-1] * 2.2)
    for rate in rates:
        axes.plot([rate / memory, high], [rate, rate], color=COLORS["accent"], linewidth=1.4, zorder=2)
    axes.plot([low, ridge], [low * memory, rates[-1]], color=COLORS["accent"], linewidth=1.4, zorder=2)
    longest = max(p.seconds for p in found)
    across = {p.name: max(LARGEST * math.sqrt(p.seconds / longest), SMALLEST) for p in found}
    for p in sorted(found, key=lambda p: -p.seconds):
        color = COLORS["series-1"] if p.bound == "memory" else COLORS["series-0"]
        look = {"markeredgecolor": COLORS["page"], "markeredgewidth": 1.0, "zorder": 5}
        axes.plot([p.intensity], [p.rate], "o", markersize=across[p.name], color=color, gid=mark(p.name), **look)
    _label(figure, axes, found, across)


def _limit(axes: Any, left: float, right: float, bottom: float, top: float) -> None:
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    across, up = decades(left, right), decades(bottom, top)
    axes.set_xticks(across, [short_number(words.count(tick)) for tick in across])
    axes.set_yticks(up, [short_number(words.count(tick)) for tick in up])
    axes.minorticks_off()


def decades(low: float, high: float) -> list[float]:
    """Powers of ten inside a range, every second one or fewer where they are many; 1, 2 and 5 of them where they are few."""
    steps = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [10.0**step for step in steps if low <= 10.0**step <= high]
    if len(inside) < 2:
        inside = [m * 10.0**step for step in steps for m in (1, 2, 5) if low <= m * 10.0**step <= high]
    return inside[:: -(-len(inside) // 6) or 1]


def _label(figure: Any, axes: Any, found: list[Point], across: Mapping[str, float]) -> None:
    """Names beside their marks, those that take longest first; what finds no room is in the table and the tooltips."""
    order = sorted(found, key=lambda p: -p.seconds)
    pixel = axes.transData.transform([(p.intensity, p.rate) for p in order])
    sizes = [(width + 2, height) for width, height in (text_size(figure, short(p.name)) for p in order)]
    hard = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(pixel, (across[p.name] / 2 + 2 for p in order))]
    roof = [segment(*a, *b) for line in axes.lines[: -len(found)] for a, b in _segments(axes, line)]
    inside = axes.get_window_extent()
    within = (inside.x0 + 3, inside.y0 + 3, inside.x1 + 12, inside.y1 + 6)
    places = place([tuple(xy) for xy in pixel], sizes, within, hard, roof)
    for p, (x, y), spot in zip(order, pixel, places):
        if spot is None:
            continue
        if spot.leader is not None:
            line_between(axes, np.array([x, y]), np.array(spot.leader), zorder=1)
        write(axes, spot.box[0] + 1, spot.box[1], short(p.name), COLORS["ink"])


def _segments(axes: Any, line: Any) -> list[tuple[Any, Any]]:
    """A line in short pieces of pixels: the box around a slope would take all the room under it."""
    start, end = axes.transData.transform(line.get_xydata())
    steps = np.linspace(0, 1, 13)[:, None]
    corners = start + (end - start) * steps
    return list(itertools.pairwise(corners))
