"""Paired differences with their intervals, one row each."""

import math
from typing import Any

from lmeff.report import words
from lmeff.report.figures import Plot, add_axes, make_plot, short, write
from lmeff.report.schema import Comparison, Report
from lmeff.report.svg import COLORS, mark

ROW = 52.0


def comparisons_plot(report: Report) -> Plot | None:
    """Every comparison with a finite difference, or None without any."""
    shown = [c for c in report.comparisons if math.isfinite(c.difference)]
    if not shown:
        return None
    title = "Paired differences in held-out loss"
    caption = "Left of zero the first of the two has the lower loss; an interval that holds zero leaves it open."
    titles = {name(c): words.comparison_text(c) for c in shown}
    height = ROW * len(shown) + 62
    return make_plot("comparisons", title, caption, height, titles, lambda figure: _draw(figure, shown))


def name(c: Comparison) -> str:
    """What the row of a comparison is called."""
    return f"{c.a} − {c.b}"


def _draw(figure: Any, comparisons: list[Comparison]) -> None:
    axes = add_axes(figure, "", left=12, top=10)
    ends = [end for c in comparisons for end in (c.difference, *c.interval, 0.0) if math.isfinite(end)]
    span = max(ends) - min(ends) or 0.1
    axes.set_xlim(min(ends) - 0.08 * span, max(ends) + 0.08 * span)
    axes.set_ylim(-len(comparisons), 0)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("difference, nats/token")
    axes.axvline(0, color=COLORS["muted"], linewidth=1)
    edge = axes.get_window_extent()
    for position, c in enumerate(comparisons):
        y = -position - 0.7
        sure = not c.interval[0] <= 0 <= c.interval[1]
        color = COLORS["accent"] if sure else COLORS["muted"]
        if math.isfinite(sum(c.interval)):
            axes.plot(c.interval, [y, y], color=color, linewidth=2, alpha=0.75)
        axes.plot(
            [c.difference], [y], marker="o", markersize=9, color=color, markerfacecolor=color if sure else COLORS["page"],
            markeredgewidth=1.5, linestyle="none", gid=mark(name(c)), zorder=5,
        )  # fmt: skip
        write(
            axes,
            edge.x0,
            edge.y1 - ROW * (position + 0.48),
            f"{short(c.a)} − {short(c.b)}:  {c.difference:+.4f}".replace(" -", " −"),
            COLORS["ink"],
        )
