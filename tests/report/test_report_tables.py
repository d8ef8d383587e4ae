"""The terminal tables: what they say, at every width, with and without a terminal."""

import io
import math

import pytest
from rich.console import Console

from lmeff.report import words
from lmeff.report.schema import ArtifactRow, Comparison, Report, RuleRow, Verdict
from lmeff.report.tables import print_artifacts, print_comparisons, print_rules
from tests.report.report_sample import make_report


@pytest.fixture(scope="module")
def report():
    return make_report()


def printed(function, *args, width=80, terminal=False, encoding="utf-8"):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    function(*args, Console(file=file, width=width, force_terminal=terminal, no_color=True, legacy_windows=False))
    file.flush()
    return raw.getvalue().decode(encoding)


def plain(text):
    return text.replace("\x1b[1m", "").replace("\x1b[0m", "")


@pytest.mark.parametrize("width", [80, 126, 160])
@pytest.mark.parametrize("terminal", [True, False])
def test_every_artifact_is_told_within_the_width(report, width, terminal):
    text = plain(printed(print_artifacts, report, width=width, terminal=terminal))
    table = text.split("held-out loss")[0]
    assert all(len(line.rstrip()) <= width for line in table.splitlines())
    assert ("bits/byte" in table) == (width >= 126)
    for row in report.artifacts:
        line = next(line for line in table.splitlines() if line.startswith(row.name[:12]))
        assert f"{row.loss:.4f} ±{(row.loss_interval[1] - row.loss_interval[0]) / 2:.4f}" in line
        assert words.size(row.stored_bytes) in line
    assert "×0.25" in table


def test_plain_where_nobody_watches(report):
    text = printed(print_artifacts, report)
    assert "\x1b" not in text
    assert not set(text) & set("─│┃━")


def test_ascii_terminal_gets_ascii(report):
    for terminal in (True, False):
        text = printed(print_artifacts, report, terminal=terminal, encoding="ascii")
        assert "+-0.0" in text
        assert text.isascii()


def test_markup_and_control_characters_in_names_stay_text():
    row = make_report().artifacts[0]
    hostile = ArtifactRow(**{f: getattr(row, f) for f in row.__dataclass_fields__} | {"name": "[red]a[/] \x1b[31m\n"})
    text = printed(print_artifacts, Report(name="r", created="", artifacts=(hostile,)), width=160, terminal=True)
    assert "[red]a[/] ?[31m?" in text


def test_rules_and_comparisons(report):
    rows = (
        RuleRow(path="blocks/attn/wq", letters="LDHC", shape=(2, 32, 4, 8), rule="int8"),
        RuleRow(path="s", letters="", shape=(), rule="none"),
    )
    lines = printed(print_rules, rows).splitlines()
    assert any(line.split() == ["blocks/attn/wq", "LDHC", "2", "x", "32", "x", "4", "x", "8", "int8"] for line in lines)
    assert any(line.split() == ["s", "scalar", "none"] for line in lines)
    text = printed(print_comparisons, report)
    assert "student - control" in text
    assert report.comparisons[0].sentence in text
    assert printed(print_comparisons, make_report(comparisons=())) == ""


NUMBERS = [
    (words.count, 999, "999"), (words.count, 999_600, "1.00 M"), (words.count, 3_411_200, "3.41 M"), (words.count, 0, "0"),
    (words.size, 1023, "1023 B"), (words.size, 1023.9, "1.00 KiB"), (words.size, 512, "512 B"), (words.size, 13_650_944, "13.0 MiB"),
    (words.seconds, 4210, "1 h 10 min"), (words.seconds, 59.96, "60 s"), (words.seconds, 60, "1 min"), (words.seconds, 61, "1 min 1 s"),
    (words.number, 0.041234, "0.0412"), (words.number, 12345.6, "12346"), (words.number, None, "–"), (words.number, math.nan, "–"),
    (words.number, 1e-7, "1e-07"), (words.loss, math.nan, "not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("say", "value", "expected"), NUMBERS)
def test_numbers(say, value, expected):
    assert say(value) == expected


def row(name, loss, size=100, ms=None, quartiles=None):
    return ArtifactRow(
        name=name, kind="dense", loss=loss, loss_interval=(loss, loss), bits_per_byte=1.0, parameters=10, nonzero_parameters=10,
        stored_bytes=size, effective_bits=8.0, flops_per_token=1, ms_per_token=ms, ms_interval=quartiles,
    )  # fmt: skip


def headlines(*rows, **fields):
    return words.headlines(Report(name="r", created="", artifacts=rows, **fields))


def test_headlines_say_what_the_numbers_say():
    base = row("base", 2.0, 100, 1.0, (0.9, 1.1))
    assert headlines(base) == ["No artifact is smaller than base (100 B, 2.0000 nats/token)."]
    assert headlines(base, row("near", 2.01, 25), row("tiny", 2.5, 5))[0] == (
        "near is 4.00 times smaller than base at +0.50% loss (2.0000 to 2.0100 nats/token)."
    )
    assert (
        "No smaller artifact comes within 1% of the loss of base; the nearest is bad, 4.00 times smaller at +50.00%"
        in (headlines(base, row("bad", 3.0, 25))[0])
    )
    assert (
        "The fastest is quick: 0.500 ms/token, 2.00 times as fast as base"
        in headlines(base, row("quick", 2.0, 100, 0.5, (0.4, 0.6)))[1]
    )
    assert "Nothing ran measurably faster than base" in headlines(base, row("same", 2.0, 100, 0.95, (0.85, 1.0)))[1]
    assert "Nothing ran measurably faster than base" in headlines(base, row("slow", 2.0, 100, 2.0, (1.9, 2.1)))[1]


def test_headlines_tell_failures():
    base = row("base", 2.0)
    verdicts = (Verdict(claim="smaller", passed=False), Verdict(claim="better", passed=True))
    assert headlines(base, verdicts=verdicts)[1] == "1 of 2 claims held. Failed: smaller."
    assert headlines(base, verdicts=verdicts[1:])[1] == "The one claim checked held."
    assert headlines(base, row("lost", math.nan, 10))[-1] == "No finite held-out loss: lost."
    assert "no finite held-out loss" in headlines(row("base", math.inf), row("b", 2.0, 10))[0]


@pytest.mark.parametrize(
    ("difference", "interval", "expected"),
    [
        (-0.04, (-0.05, -0.03), "a has a lower loss than b by 0.0400 nats/token"),
        (0.04, (0.03, 0.05), "a has a higher loss than b by 0.0400 nats/token"),
        (0.01, (-0.01, 0.03), "cannot be told apart"),
        (0.01, (math.nan, math.nan), "too few documents"),
        (math.nan, (math.nan, math.nan), "cannot be compared"),
    ],
)
def test_comparison_sentences(difference, interval, expected):
    assert expected in words.comparison_sentence(Comparison(a="a", b="b", difference=difference, interval=interval))
