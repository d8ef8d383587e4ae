"""What all pictures of a report share: two sizes, margins, text."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lmeff.core.extras import require
from lmeff.report.svg import COLORS, FONT, make_figure, style, to_inline
from lmeff.report.words import printable

WIDTHS = {"wide": 560.0, "narrow": 384.0}
LONGEST = 25  # characters of a name inside a picture; the tooltip has it whole


class Plot(NamedTuple):
    """A picture in its two sizes, and what it shows in words."""

    key: str
    title: str
    caption: str
    wide: str
    narrow: str


def make_plot(
    key: str, title: str, caption: str, height: float, titles: dict[str, str], draw: Callable[[Any], None]
) -> Plot:
    """Calls `draw(figure)` once for wide and once for narrow screens. `titles` are the tooltips of the marks."""
    made = {}
    for size, width in WIDTHS.items():
        name = f"{key}-{size}"
        with style(name):
            figure = make_figure(width, height)
            draw(figure)
            made[size] = to_inline(figure, name, f"{title}. {caption}", titles)
    return Plot(key, title, caption, made["wide"], made["narrow"])


def short(name: str) -> str:
    """A name that fits into a picture: its beginning and its end, where names of one family differ."""
    name = printable(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 11]}…{name[-10:]}"


def add_axes(
    figure: Any, unit: str, *, left: float = 46, right: float = 16, bottom: float = 52, top: float = 30
) -> Any:
    """Axes with fixed margins in pixels. The unit stands level above the upright axis, where it is read without turning the head."""
    width, height = figure.get_size_inches() * 72
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes(box)
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)
    write(axes, 2, height - top + 10, unit, COLORS["muted"])
    return axes


def write(axes: Any, x: float, y: float, text: str, color: str) -> None:
    """Text whose lower left corner is at a pixel of the figure."""
    identity = require("matplotlib.transforms", extra="report").IdentityTransform()
    axes.text(
        x, y, text, transform=identity, color=color, va="bottom", ha="left", fontsize=FONT, parse_math=False, zorder=6
    )


def line_between(axes: Any, start: Any, end: Any, **look: Any) -> None:
    """A thin line between two pixels of the figure."""
    (x0, y0), (x1, y1) = axes.transData.inverted().transform([start, end])
    axes.plot([x0, x1], [y0, y1], color=COLORS["muted"], linewidth=0.7, alpha=0.7, clip_on=False, **look)
