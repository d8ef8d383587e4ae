"""The page of a plan: what it says, that it is one offline file, and how it looks in a real browser."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from lmeff.plan.answer import join
from lmeff.plan.estimate import Memory
from lmeff.report.plan import colors, memory_bars, render_plan, time_bar
from lmeff.report.roofline import decades, points, roofline_plot, roofs
from tests.plan.plan_sample import GIB, JOB, MEMORY, SITES, compared, make_full, make_plan
from tests.report.browser import WIDTHS, brightness, legible, measure, needs_browser

COMPILED = {
    "argument_bytes": 12.01 * GIB,
    "temp_bytes": 17 * GIB,
    "compared": compared(12.01 * GIB, 17 * GIB, 28 * GIB),
    "total_bytes": 29.01 * GIB,
    "where": "v5p:4x8x8",
    "fits": True,
    "collective_bytes": {"all-gather": {"fsdp": 21.5 * GIB, "tensor": 310 * GIB}},
}


class Text(HTMLParser):
    """The words of a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_data(self, data):
        self.found += data.split()


def told(page):
    reader = Text()
    reader.feed(page.partition("</style>")[2])
    return " ".join(reader.found)


def answer(**changes):
    plan = make_full() | make_plan(**changes) | {"compiled": COMPILED}
    return join("llama3-70b", [plan], plan)


@pytest.fixture(scope="module")
def page():
    return render_plan(answer())


def test_it_says_the_verdict_the_cost_and_both_sides_of_the_compiler(page):
    text = told(page)
    assert "Fits, says the compiler: 29.0 GiB of 95.0 GiB, 31%; predicted 30.5 GiB, 32%." in text
    assert "93.6 k to 206 k tokens/s" in text  # 256 x 4096 tokens in 11.2 and in 5.1 seconds
    assert "15,000 steps, 15.7 G tokens" in text
    assert "arguments 12.0 GiB 12.0 GiB −0.1%" in text
    assert "temporaries 18.5 GiB 17.0 GiB +8.8%" in text
    assert "all-gather tensor 300 GiB 310 GiB" in text
    assert "all 336 GiB 332 GiB" in text  # 21.5 + 10.7 + 300 + 4.1, and 21.5 + 310
    for word in ("do not pipeline", "room for 2,944 rows", "Compressions within a budget", "int4/g64", "48,320 cannot"):
        assert word in text
    for leaf in answer()["leaves"]:
        assert leaf["path"] in text


def test_it_is_one_file_that_asks_for_nothing(page):
    assert "default-src 'none'" in page
    assert "<script" not in page
    targets = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)""", page)
    assert {target for pair in targets for target in pair if target and not target.startswith("#")} == {"data:,"}
    assert page == render_plan(answer())


def test_a_plan_that_does_not_fit_names_what_is_to_blame():
    memory = Memory(stage=0, state={"parameters": GIB}, temporaries={"kept activations": 120 * GIB, "logits": GIB})
    found = answer(memory=(memory,)) | {"compiled": {"where": "v5p:4x8x8", "fits": False, "refusal": "too <large>"}}
    assert not found["fits"]
    text = told(render_plan(found))
    assert (
        "Does not fit, says the compiler: refused; predicted 122 GiB, 128%; kept activations take 120 GiB of it."
        in text
    )
    assert "too <large>" in text
    bars = memory_bars(found)
    assert bars["edge"] == pytest.approx(100 * 95 / 122)
    assert sum(float(piece["width"]) for piece in bars["bars"][0]["pieces"]) == pytest.approx(100, abs=0.01)


def test_bars_have_every_category_to_scale():
    plan = make_plan()
    bars = memory_bars(plan)
    for bar, memory in zip(bars["bars"], MEMORY, strict=True):
        widths = {piece["title"].split(":")[0]: float(piece["width"]) for piece in bar["pieces"]}
        expected = {name: 100 * n / (95 * GIB) for name, n in {**memory.state, **memory.temporaries}.items() if n}
        assert widths == pytest.approx(expected, abs=1e-3)
    parts = time_bar(plan)
    assert sum(float(piece["width"]) for piece in parts["pieces"]) == pytest.approx(100, abs=0.01)
    assert [row[0] for row in parts["rows"]] == ["compute", "memory", "network", "bubble", "optimizer"]


def test_colours_are_of_the_largest():
    found = colors({str(i): i for i in range(10)})
    assert found["9"] == "var(--series-0)"
    assert len(set(found.values())) == 8
    assert {found["0"], found["1"], found["2"]} == {"var(--muted)"}


def test_the_roofline_has_the_chip_s_roofs_and_every_site_under_them():
    sites = [site._asdict() for site in SITES]
    rates, memory = roofs(sites)
    assert rates == [459e12]
    assert memory == pytest.approx(2.765e12)
    found = {point.name: point for point in points(sites)}
    assert set(found) == {site.name for site in SITES} - {"embed"}  # which computes nothing
    for site in SITES:
        if site.name in found:
            assert found[site.name].rate == pytest.approx(min(459e12, site.flops / site.bytes * 2.765e12))
    plot = roofline_plot(sites)
    assert plot is not None
    assert "Bound by memory: norms." in plot.caption
    for drawing in (plot.wide, plot.narrow):
        assert re.findall(r'data-mark="([^"]+)"', drawing).count("mlp.up") == 1
    assert roofline_plot([]) is None


@pytest.mark.parametrize(
    ("low", "high", "count"), [(0.3, 30_000, 5), (2e12, 8e14, 2), (1.2, 4.9, 1), (1e3, 1e15, 5), (3, 60, 4)]
)
def test_decades(low, high, count):
    found = decades(low, high)
    assert len(found) == count
    assert all(low <= tick <= high for tick in found)


def test_several_stages_are_a_line_each():
    first, second = make_plan(), make_plan(job=dataclasses.replace(JOB, name="student"))
    text = told(render_plan(join("two", [first, second], second)))
    assert "two: student" in text
    assert "teacher 70.6 G" in text
    assert "student 70.6 G" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser_nothing_is_fetched_cut_or_illegible(page, folder, dark):
    flags = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    found, console = measure(page, folder, *flags)
    assert console == []
    for width in WIDTHS:
        entry = found[width]
        assert entry["scroll"] <= width
        assert entry["fetched"] == []
        assert (brightness(entry["page"]) < 60) == dark
        (plot,) = entry["plots"].values()
        assert plot["drawings"] == 1
        assert {name for name, *_ in plot["marks"]} == {point.name for point in points([s._asdict() for s in SITES])}
        left, _, right, _ = plot["drawing"]
        assert 0 <= left < right <= width
    assert {"mlp.up", "norms"} <= set(legible(found))
    inner = found[1280]["tables"]
    assert sum(wanted > outer for outer, wanted in inner) <= 1  # the schedule alone is wider than the page
