"""Training curves, each with its name at its end."""

import math
from typing import Any, NamedTuple

import numpy as np

from lmeff.report import words
from lmeff.report.figures import Plot, add_axes, line_between, make_plot, short, write
from lmeff.report.frontier import log_ticks, short_number
from lmeff.report.schema import ArtifactRow, Report
from lmeff.report.svg import COLORS, SERIES, mark, text_size

HEIGHT = 372.0
BUCKETS = 80  # points of a curve
SHORTEST = 0.004  # the picture begins at this share of the longest run's tokens
SETTLED = 0.08  # the share of a run after which its losses set the scale


class Curve(NamedTuple):
    """An artifact's curve: tokens and mean loss of each bucket."""

    row: ArtifactRow
    tokens: np.ndarray
    losses: np.ndarray


def curves_plot(report: Report) -> Plot | None:
    """Training objective against tokens, or None where nothing was trained."""
    curves = [curve for curve in map(_curve, report.artifacts) if len(curve.tokens) > 1]
    if not curves:
        return None
    top = max(float(c.losses[c.tokens >= SETTLED * c.tokens[-1]].max()) for c in curves)
    cut = any((c.losses > top).any() for c in curves)
    caption = (
        "Each line is the training objective of its own stage: cross entropy, or with a teacher its mix with the teacher's term. "
        "Compare levels only between stages with the same objective."
    )
    caption += " The first steps lie above the scale." if cut else ""
    titles = {
        c.row.name: f"{c.row.name}: {words.loss(c.losses[-1])} after {words.count(c.tokens[-1])} tokens" for c in curves
    }
    title = "Training loss against training tokens"
    return make_plot("curves", title, caption, HEIGHT, titles, lambda figure: _draw(figure, curves, top))


def _curve(row: ArtifactRow) -> Curve:
    """Means over buckets that are equally wide on a logarithmic axis."""
    points = np.array([(tokens, loss) for _, tokens, loss in row.curve if tokens > 0 and math.isfinite(loss)]).reshape(
        -1, 2
    )
    if len(points) <= BUCKETS:
        return Curve(row, points[:, 0], points[:, 1])
    logs = np.log(points[:, 0])
    bucket = np.digitize(logs, np.linspace(logs[0], logs[-1], BUCKETS)[1:-1])
    means = np.array([points[bucket == b].mean(axis=0) for b in np.unique(bucket)])
    return Curve(row, means[:, 0], means[:, 1])


def _draw(figure: Any, curves: list[Curve], top: float) -> None:
    names = [short(c.row.name) for c in curves]
    sizes = [text_size(figure, name) for name in names]
    axes = add_axes(figure, "nats/token", right=max(width for width, _ in sizes) + 18)
    axes.set_xscale("log")
    last = max(float(c.tokens[-1]) for c in curves)
    first = max(min(float(c.tokens[0]) for c in curves), SHORTEST * last)
    axes.set_xlim(first, last)
    low = min(float(c.losses.min()) for c in curves)
    span = top - low or 0.1 * abs(low) or 0.1
    axes.set_ylim(low - 0.06 * span, top + 0.04 * span)
    ticks = log_ticks(first, last, 10)
    axes.set_xticks(ticks, [short_number(words.count(tick)) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training tokens, log scale")
    for position, curve in enumerate(curves):
        axes.plot(
            curve.tokens, curve.losses, color=_color(position), linewidth=1.6, linestyle=("-", "--", ":")[position // SERIES % 3],
            gid=mark(curve.row.name), zorder=3,
        )  # fmt: skip
    _label_ends(axes, curves, names, max(height for _, height in sizes) + 1)


def _color(position: int) -> str:
    return COLORS[f"series-{position % SERIES}"]


def _label_ends(axes: Any, curves: list[Curve], names: list[str], height: float) -> None:
    ends = np.array([axes.transData.transform((c.tokens[-1], c.losses[-1])) for c in curves])
    edge = axes.get_window_extent()
    heights = spread(ends[:, 1], height, edge.y0, edge.y1)
    for position, ((x, y), at, name) in enumerate(zip(ends, heights, names)):
        line_between(axes, (x + 3, y), (edge.x1 + 10, at), linestyle=":")
        write(axes, edge.x1 + 13, at - height / 2, name, _color(position))


def spread(wanted: np.ndarray, height: float, low: float, high: float) -> np.ndarray:
    """Heights as near as may be to `wanted`, in the same order, at least `height` apart and within `low..high` as far as there is room."""
    order = np.argsort(wanted, kind="stable")
    placed = np.maximum(wanted[order], low)
    for _ in range(200):
        gaps = height - np.diff(placed)
        if (gaps <= 1e-6).all() and placed[-1] <= high + 1e-6:
            break
        push = np.maximum(gaps, 0) / 2
        placed[:-1] -= push
        placed[1:] += push
        placed = np.clip(placed, low, high)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + height)
    result = np.empty_like(placed)
    result[order] = placed
    return result
