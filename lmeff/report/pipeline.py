"""A pipeline schedule as a picture: a row for each stage, a column for each tick."""

import re
from importlib import resources
from xml.etree.ElementTree import Element, SubElement, tostring

from lmeff.parallel.drawing import cell
from lmeff.parallel.tables import IDLE, B, F, Schedule, W
from lmeff.report.words import printable

COLORS = {F: "--series-0", B: "--series-1", W: "--series-2"}
NAMES = {F: "forward", B: "gradient of the input", W: "gradient of the weights"}
FONT = 12
ROW, GAP, LEFT, TOP, BOTTOM = 24, 2, 62, 22, 34
CHARACTER = 7.2  # pixels of a digit at this font
READABLE = 160  # ticks; a longer picture has no text in its cells
NARROW = 6  # pixels of a cell without text


def schedule_svg(schedule: Schedule) -> str:
    """The picture as an `<svg>` for a page that defines the report's colours; it suits light and dark with them.

    The first chunk has the full colour, later ones are paler. Each cell has a tooltip.
    """
    lettered = schedule.ticks <= READABLE
    longest = max(len(cell(schedule, t, s)) for t in range(schedule.ticks) for s in range(schedule.stages))
    step = round(longest * CHARACTER) + 8 if lettered else NARROW
    width = max(LEFT + schedule.ticks * step + 8, 470)
    height = TOP + schedule.stages * ROW + BOTTOM
    label = f"Schedule {schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches, {schedule.ticks} ticks"
    root = Element("svg", {
        "class": "drawing", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": printable(label), "font-size": str(FONT),
    })  # fmt: skip
    every = 5 if lettered else 20
    for t in range(0, schedule.ticks, every):
        _write(root, LEFT + t * step + (step - GAP) / 2, TOP - 8, str(t), "--muted", "middle")
    for s in range(schedule.stages):
        _write(root, 2, TOP + s * ROW + 15, f"stage {s}", "--muted")
        for t in range(schedule.ticks):
            _draw_cell(root, schedule, t, s, step, lettered)
    _legend(root, TOP + schedule.stages * ROW + 12)
    return tostring(root, encoding="unicode")


def schedule_file(schedule: Schedule) -> str:
    """The same picture as a file of its own, with the report's colours for light and dark inside."""
    css = resources.files("lmeff.report").joinpath("templates/report.css").read_text()
    colors = re.match(r":root \{.*?\n\}\n@media .*?\n\}\n", css, flags=re.DOTALL)
    assert colors is not None, "the report's style sheet opens with its colours"
    sheet = f"<style>{colors[0]}svg {{ background: var(--page); font-family: system-ui, sans-serif; }}</style>"
    opening, rest = schedule_svg(schedule).split(">", 1)
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', opening)
    assert size is not None
    return f'{opening} xmlns="http://www.w3.org/2000/svg" width="{size[1]}" height="{size[2]}">{sheet}{rest}\n'


def _draw_cell(root: Element, schedule: Schedule, tick: int, stage: int, step: int, lettered: bool) -> None:
    op = schedule.table[tick][stage]
    x, y = LEFT + tick * step, TOP + stage * ROW
    gap = GAP if lettered else 0.5
    if op.kind == IDLE:
        _box(root, x, y, step - gap, "--grid", 1.0)
        return
    fill = 1.0 if op.chunk == 0 else 0.45 - 0.3 * (op.chunk - 1) / max(schedule.chunks - 2, 1)
    box = _box(root, x, y, step - gap, COLORS[op.kind], fill)
    index = schedule.slice_of(stage, op.chunk)
    words = f"{NAMES[op.kind]}, microbatch {op.microbatch}, slice {index}; tick {tick}, stage {stage}"
    SubElement(box, "title").text = words
    if lettered:
        ink = "--page" if op.chunk == 0 else "--ink"
        _write(root, x + (step - gap) / 2, y + 15, cell(schedule, tick, stage), ink, "middle")


def _box(root: Element, x: float, y: float, width: float, color: str, opacity: float) -> Element:
    look = f"fill: var({color})" + (f"; fill-opacity: {opacity:.2f}" if opacity < 1 else "")
    size = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{ROW - GAP}", "rx": "2"}
    return SubElement(root, "rect", {**size, "style": look})


def _write(root: Element, x: float, y: float, text: str, color: str, anchor: str = "start") -> None:
    look = f"fill: var({color}); text-anchor: {anchor}; pointer-events: none"
    SubElement(root, "text", {"x": f"{x:g}", "y": f"{y:g}", "style": look}).text = text


def _legend(root: Element, y: float) -> None:
    x = LEFT
    for kind, name in NAMES.items():
        _box(root, x, y, 14, COLORS[kind], 1.0)
        _write(root, x + 20, y + 15, name, "--muted")
        x += 34 + round(len(name) * CHARACTER * 0.95)
