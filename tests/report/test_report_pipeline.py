"""Drawings of schedules: the text of the terminal, the picture of the report, the command that makes both."""

import io
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lmeff.parallel.drawing import draw
from lmeff.parallel.schedule_csv import from_csv
from lmeff.parallel.schedules import SCHEDULES, build
from lmeff.parallel.tables import IDLE
from lmeff.report.pipeline import schedule_file, schedule_svg
from tests.runs import lmeff, lmeff_json

SVG = "{http://www.w3.org/2000/svg}"


def test_text_of_1f1b():
    assert draw(build("1f1b", 2, 2)).plain.splitlines() == [
        "tick    0              5",
        "stage 0 F0 F1 .  .  B0 W0 .  B1 W1",
        "stage 1 .  F0 B0 W0 F1 B1 W1 .  . ",
    ]


def test_text_of_chunks_in_blocks():
    lines = draw(build("zbv", 2, 2), width=40).plain.splitlines()
    assert lines[1].split() == ["stage", "0", "F0a", "F1a", ".", "F0b", "B0b", "F1b", "B1b", "B0a"]
    assert max(map(len, lines)) <= 40
    assert lines[3] == ""
    assert sum(line.startswith("tick") for line in lines) == 2
    for m in (1, 10, 11, 101):  # columns stay columns whatever the digits
        rows = draw(build("gpipe", 2, m), width=10**6).plain.splitlines()
        assert len(rows[1]) == len(rows[2]) == 8 + (len(str(m - 1)) + 2) * build("gpipe", 2, m).ticks - 1


def test_colours_only_where_there_is_a_terminal():
    text = draw(build("1f1b", 2, 2))
    plain, colored = io.StringIO(), io.StringIO()
    Console(file=plain).print(text)
    Console(file=colored, force_terminal=True, color_system="standard").print(text)
    assert "\x1b" not in plain.getvalue()
    assert "\x1b[36mF0" in colored.getvalue()


@pytest.mark.parametrize("name", SCHEDULES)
def test_picture_has_every_cell(name):
    schedule = build(name, 4, 4)
    root = ElementTree.fromstring(schedule_svg(schedule))
    boxes = list(root.iter("rect"))
    assert len(boxes) == 4 * schedule.ticks + 3  # and three of the legend
    titles = sorted(title.text for title in root.iter("title"))
    work = [(t, s, op) for t, row in enumerate(schedule.table) for s, op in enumerate(row) if op.kind != IDLE]
    kinds = ("", "forward", "gradient of the input", "gradient of the weights")
    assert titles == sorted(
        f"{kinds[op.kind]}, microbatch {op.microbatch}, slice {schedule.slice_of(s, op.chunk)}; tick {t}, stage {s}"
        for t, s, op in work
    )
    texts = {text.text for text in root.iter("text")}
    assert texts >= {"F0a", "B3b", "W2a"} if schedule.chunks > 1 else texts >= {"F0", "B3", "W2"}
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for box in boxes:
        assert 0 <= float(box.attrib["x"]) <= width - float(box.attrib["width"])
        assert 0 <= float(box.attrib["y"]) <= height - float(box.attrib["height"])


def test_picture_takes_its_colours_from_the_page():
    for svg in (schedule_svg(build("interleaved", 2, 4, 3)), schedule_svg(build("1f1b", 4, 64))):
        assert not re.search(r"#[0-9a-fA-F]{3}|rgb|<style", svg)
        assert set(re.findall(r"var\(--([a-z0-9-]+)\)", svg)) <= {
            "series-0",
            "series-1",
            "series-2",
            "grid",
            "muted",
            "page",
            "ink",
        }
    assert "var(--page)" not in schedule_svg(build("1f1b", 4, 64))  # too many ticks for text in cells


def test_a_picture_of_its_own_has_both_colour_schemes():
    text = schedule_file(build("zbv", 2, 4))
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    sheet = root.find(f"{SVG}style").text
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert len(re.findall(r"--page:", sheet)) == 2
    assert "prefers-color-scheme: dark" in sheet
    assert all(len(re.findall(f"{name}:", sheet)) == 2 for name in used)


def test_command_draws_counts_and_writes(tmp_path):
    csv, svg = tmp_path / "made" / "table.csv", tmp_path / "table.svg"
    answer = lmeff_json("schedule", "zbv", "--stages", "2", "--microbatches", "4", "--csv", str(csv), "--svg", str(svg))
    assert (answer["ticks"], answer["idle"], answer["in_flight"]) == (25, [1, 1], [4, 4])
    assert answer["slots"]["stash"] == 4
    schedule = build("zbv", 2, 4)
    assert from_csv(csv, "zbv") == schedule
    assert svg.read_text() == schedule_file(schedule)
    assert answer["table"] == json.loads(json.dumps(schedule.table))
    assert lmeff_json("schedule", str(csv)) == answer | {"name": "table"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["1f1b", "--chunks", "2"], 3, ["chunks = 2", "expected 1"]),
        (["2f2b"], 3, ["'2f2b'", "1f1b"]),
        (["nowhere.csv"], 3, ["cannot read nowhere.csv"]),
        (["1f1b", "--svg", "/proc/none/a.svg"], 1, ["--svg", "/proc/none/a.svg"]),
        (["1f1b", "--stages", "four"], 2, ["--stages"]),
        (["1f1b", "--stage", "4"], 2, ["--stage"]),
    ],
)
def test_command_refuses(arguments, code, words):
    result = lmeff("schedule", *arguments)
    assert result[0] == code
    assert all(word in str(result) for word in words), result
