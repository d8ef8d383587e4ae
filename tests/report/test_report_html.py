"""The page as text: well formed, self-contained, safe against what a name may hold, the same bytes for the same report."""

import dataclasses
import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from lmeff.parallel.schedule_csv import to_csv
from lmeff.parallel.schedules import build
from lmeff.report.html import render, write_html
from lmeff.report.pipeline import schedule_svg
from lmeff.report.schema import Verdict
from tests.report.report_sample import make_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "<script>alert('x')</script>\"&amp;{{ 901*7 }}</title>$x_{1$\x1b\x00</style>"


class Page(HTMLParser):
    """Checks nesting; collects elements and visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def report():
    return make_report()


@pytest.fixture(scope="module")
def text(report):
    return render(report)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_same_report_same_bytes(report, text, tmp_path):
    write_html(make_report(), tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_bytes() == text.encode()


def test_nothing_is_fetched(text, page):
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "img", "object", "embed", "video", "audio", "source", "base", "form"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith("#") or (tag, attributes[name]) == ("link", "data:,")
        assert not any(name.startswith("on") for name in attributes)


def test_identifiers_are_unique_and_references_arrive(text, page):
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    wanted = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r' href="#([^"]*)"', text))
    wanted |= {
        i for _, a in page.elements for key in ("aria-labelledby", "aria-describedby") for i in a.get(key, "").split()
    }
    assert wanted
    assert wanted <= set(identifiers)


def test_accessible(page):
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    assert ("html", {"lang": "en"}) in page.elements
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 10  # five pictures, each wide and narrow
    assert all(d["role"] == "img" and len(d["aria-label"]) > 40 for d in drawings)
    assert all(a.get("scope") in ("row", "col") for tag, a in page.elements if tag == "th")
    boxes = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert len(boxes) == sum(tag == "table" for tag, _ in page.elements)
    assert all(
        box["tabindex"] == "0" and box["role"] == "region" and ("aria-label" in box or "aria-labelledby" in box)
        for box in boxes
    )


def test_the_page_tells_every_number(report, page):
    told = " ".join(" ".join(page.text).split())
    for row in report.artifacts:
        assert row.name in told
        assert f"{row.loss:.4f}" in told
        assert f"{row.loss_interval[0]:.4f} to {row.loss_interval[1]:.4f}" in told
    for expected in (
        "5.91 M",
        "13.0 MiB",
        "1018 KiB",
        "0.0412",
        "×0.25",
        "16.4 M",
        "21 min 52 s",
        "73,795 tokens in 400 documents",
    ):
        assert expected in told
    for sentence in (*report.conventions.values(), *(verdict.claim for verdict in report.verdicts)):
        assert sentence in told
    assert "blocks/mlp/w_up" in told
    assert "optim.lr" in told
    assert "--optim.lr" in told
    assert told.count("Failed") == 2  # the headline and the claim itself
    assert "mesh.tensor" in told


def test_failed_claims_are_told_as_loud_as_held_ones(report):
    verdicts = (Verdict(claim="int8 is harmless", passed=False, measured=0.07, bound=0.005, detail="loss ratio - 1"),)
    told = " ".join(Page(render(dataclasses.replace(report, verdicts=verdicts))).text)
    assert "0 of 1 claim held. Failed: int8 is harmless." in told
    assert "measured 0.0700" in told


def test_hostile_names_stay_text(report):
    rows = list(report.artifacts)
    rows[0] = dataclasses.replace(rows[0], name=HOSTILE, kind=HOSTILE, note=HOSTILE, parents=(HOSTILE,))
    rows[1] = dataclasses.replace(rows[1], rules=(dataclasses.replace(rows[1].rules[0], path=HOSTILE, rule=HOSTILE),))
    comparison = dataclasses.replace(report.comparisons[1], b=HOSTILE, sentence=HOSTILE)
    hostile = dataclasses.replace(
        report, name=HOSTILE, created=HOSTILE, artifacts=tuple(rows), comparisons=(comparison,), data=HOSTILE,
        verdicts=(Verdict(claim=HOSTILE, passed=True, detail=HOSTILE),), conventions={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE}, config={HOSTILE: {"value": HOSTILE, "origin": HOSTILE}},
    )  # fmt: skip
    text = render(hostile)
    page = Page(text)
    assert "<script" not in text
    assert sum(tag == "style" for tag, _ in page.elements) == 1
    assert "6307" not in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
    assert "".join(page.text).count("<script>alert('x')</script>\"&amp;{{ 901*7 }}</title>") > 15


def test_reports_with_little_in_them(report):
    bare = dataclasses.replace(
        report.artifacts[0], loss=math.nan, loss_interval=(math.nan,) * 2, ms_per_token=None, ms_interval=None, curve=()
    )
    empty = dataclasses.replace(
        report,
        artifacts=(bare,),
        comparisons=(),
        verdicts=(),
        conventions={},
        environment={},
        config={},
        data="",
        created="",
    )
    page = Page(render(empty))
    assert not any(tag in ("svg", "details") for tag, _ in page.elements)
    assert "no finite held-out loss" in " ".join(page.text)


def test_colours_have_contrast_in_light_and_dark(text):
    css = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    light, dark = (
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block))
        for block in css.split("prefers-color-scheme: dark", 1)
    )
    assert light.keys() <= set(re.findall(r"--([a-z0-9-]+):", css))
    for colors in (light, {**light, **dark}):
        for role in ("ink", "muted", "accent", "failed", *(f"series-{i}" for i in range(8))):
            assert contrast(colors[role], colors["page"]) >= 4.5, (role, colors[role])
            if not role.startswith("series"):
                assert contrast(colors[role], colors["raised"]) >= 4.5, role
    assert dark.keys() == light.keys()


def contrast(a, b):
    """WCAG 2 contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_pipelined_run_shows_its_schedule():
    report = make_report()
    schedule = build("zb-h1", 4, 8)
    page = render(dataclasses.replace(report, schedule="zb-h1", schedule_table=to_csv(schedule)))
    assert schedule_svg(schedule) in page
    assert "zb-h1: 4 stages, microbatches: 8, 27 ticks, 11% of them idle" in page
    assert 'id="pipeline"' not in render(report)
    Page(page)
