"""Matplotlib figures as inline SVG: colours are CSS variables, so that one picture suits light and dark; the same figure gives the same bytes."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from lmeff.core.extras import require
from lmeff.report.words import printable

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
MARK = "mark:"
SERIES = 8
# Matplotlib wants real colours: each stand-in becomes the CSS variable of its name.
ROLES = ("ink", "muted", "grid", "accent", "page", *(f"series-{i}" for i in range(SERIES)))
COLORS = {role: f"#0a0b{position:02x}" for position, role in enumerate(ROLES)}
FONT = 12.0  # CSS pixels: one unit of the picture is one pixel where it is shown at its own width
STYLE = {
    "svg.fonttype": "none",
    "font.size": FONT,
    "figure.dpi": 72,
    "text.parse_math": False,
    "text.color": COLORS["ink"],
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["muted"],
    "axes.labelsize": FONT,
    "axes.labelpad": 7,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "lines.solid_capstyle": "round",
}


@contextmanager
def style(salt: str) -> Iterator[None]:
    """The look of every plot, whatever the user's own matplotlibrc says; `salt` makes the identifiers of a picture its own."""
    sheets = require("matplotlib.style", extra="report")
    with warnings.catch_warnings(), sheets.context(["default", STYLE | {"svg.hashsalt": salt}]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the fonts, not Matplotlib
        yield


def mark(name: str) -> str:
    """The gid of the artist that stands for `name`."""
    return f"{MARK}{printable(name)}"


def make_figure(width: float, height: float) -> Any:
    """An empty figure of `width` x `height` CSS pixels, without any global state."""
    return require("matplotlib.figure", extra="report").Figure(figsize=(width / 72, height / 72), dpi=72)


def text_size(figure: Any, text: str, font: float = FONT) -> tuple[float, float]:
    """Width and height of a text in pixels, in Matplotlib's own font, which is wider than the system fonts a browser shows it in."""
    agg = require("matplotlib.backends.backend_agg", extra="report")
    probe = figure.text(0, 0, text, fontsize=font, parse_math=False)
    box = probe.get_window_extent(agg.FigureCanvasAgg(figure).get_renderer())
    probe.remove()
    return box.width, box.height


def to_inline(figure: Any, name: str, label: str, titles: dict[str, str]) -> str:
    """The figure as an `<svg>` element for an HTML page.

    name:   prefix of all identifiers, unique in the page, and part of the class name.
    label:  what the picture shows, for those who do not see it.
    titles: tooltip by mark; an artist whose gid is `mark(KEY)` becomes `data-mark="KEY"`.
    """
    raw = io.StringIO()
    figure.savefig(raw, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(raw.getvalue())
    _drop_sheets(root)
    tooltips = {printable(key): printable(text) for key, text in titles.items()}
    for element in list(root.iter()):
        _clean(element, name)
        if (text := tooltips.get(element.attrib.get("data-mark", ""))) is not None:
            tooltip = ElementTree.Element("title")
            tooltip.text = text
            element.insert(0, tooltip)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.clear()
    root.attrib.update(
        {"class": "drawing", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": printable(label)}
    )
    return ElementTree.tostring(root, encoding="unicode")


def _drop_sheets(root: ElementTree.Element) -> None:
    """A style sheet inside a picture would hold for the whole page; metadata is nobody's business here."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}style", f"{SVG}metadata"):
                parent.remove(child)


def _clean(element: ElementTree.Element, name: str) -> None:
    element.tag = element.tag.removeprefix(SVG)
    attributes = element.attrib
    identifier = attributes.pop("id", "")
    if identifier.startswith(MARK):
        attributes["data-mark"] = identifier.removeprefix(MARK)
    elif identifier and element.tag != "g":
        attributes["id"] = f"{name}-{identifier}"
    if HREF in attributes:
        attributes["href"] = f"#{name}-{attributes.pop(HREF).removeprefix('#')}"
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{name}-")
    if "style" in attributes:
        attributes["style"] = _restyle(attributes["style"])
    element.text, element.tail = _tight(element.text), _tight(element.tail)


def _restyle(text: str) -> str:
    text = re.sub(r"font-family: [^;]*;?\s*", "", text)
    return re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--{ROLES[int(found[1], 16)]})", text)


def _tight(text: str | None) -> str | None:
    return None if text is None or not text.strip() else text
