"""The page in a real browser: 1280 and 420 pixels wide, light and dark; nothing fetched, no error, no sideways scrolling, marks and names visible."""

import dataclasses
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest

from lmeff.report.html import render
from tests.report.report_sample import make_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH; apt-get install chromium")
WIDTHS = (1280, 420)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--window-size=1400,1000", "--virtual-time-budget=4000",
)  # fmt: skip

# Run inside a copy of the page in a frame: a headless window cannot be narrower than about 500 pixels.
MEASURE = """
<script>
addEventListener("load", () => {
  const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const plots = {};
  for (const figure of document.querySelectorAll("figure.plot")) {
    const svg = [...figure.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().width > 0);
    plots[figure.id] = {
      drawings: svg.length,
      scale: svg[0].getBoundingClientRect().width / svg[0].viewBox.baseVal.width,
      drawing: box(svg[0]),
      marks: [...svg[0].querySelectorAll("[data-mark]")].map(m => [m.dataset.mark, ...box(m)]),
      texts: [...svg[0].querySelectorAll("text")].map(t => [t.textContent, parseFloat(getComputedStyle(t).fontSize), ...box(t)]),
    };
  }
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    tables: [...document.querySelectorAll(".scroll")].map(s => [s.clientWidth, s.scrollWidth]),
    page: getComputedStyle(document.body).backgroundColor,
    accent: getComputedStyle(document.documentElement).getPropertyValue("--accent"),
    plots,
  }), "*");
});
</script>
"""


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def site(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def browse(url, folder, *flags):
    """The page's DOM after loading, and what it wrote to the console."""
    profile = folder / f"profile-{len(list(folder.iterdir()))}"
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def measure(page, folder, *flags):
    """`{width: measurements}` of a copy of the page that measures itself, in frames of every width."""
    assert "default-src 'none'; style-src" in page
    copy = page.replace("default-src 'none'; style-src", "default-src 'none'; script-src 'unsafe-inline'; style-src")
    copy = copy.replace("<details>", "<details open>").replace("</body>", f"{MEASURE}</body>")
    (folder / "measured.html").write_text(copy, encoding="utf-8")
    frames = "".join(f'<iframe src="measured.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in WIDTHS)
    collect = "<script>addEventListener('message', e => document.body.append(Object.assign(document.createElement('pre'), {textContent: e.data})))</script>"
    (folder / "frames.html").write_text(f"<!DOCTYPE html><body>{collect}{frames}</body>", encoding="utf-8")
    dom, console = browse((folder / "frames.html").as_uri(), folder, *flags)
    found = [json.loads(html.unescape(text)) for text in re.findall(r"<pre>(.*?)</pre>", dom, re.S)]
    assert sorted(entry["width"] for entry in found) == sorted(WIDTHS)
    return {entry["width"]: entry for entry in found}, console


@pytest.fixture(scope="module")
def measured(folder):
    return measure(render(make_report()), folder)


def test_only_the_page_itself_is_asked_for_and_the_console_is_silent(folder, site):
    (folder / "report.html").write_text(render(make_report()), encoding="utf-8")
    Server.asked.clear()
    dom, console = browse(f"{site}/report.html", folder)
    assert "tinystories-demo" in dom
    assert console == []
    assert Server.asked == ["/report.html"]


def test_the_check_above_would_notice(folder, site):
    page = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", render(make_report()))
    page = page.replace("</main>", '</main><img src="lost.png" alt=""><script>console.error("seen")</script>')
    (folder / "broken.html").write_text(page, encoding="utf-8")
    Server.asked.clear()
    _, console = browse(f"{site}/broken.html", folder)
    assert "/lost.png" in Server.asked
    assert any('"seen"' in line for line in console)


def test_no_sideways_scrolling_and_nothing_fetched(measured):
    found, console = measured
    assert console == []
    for width in WIDTHS:
        assert found[width]["scroll"] <= width
        assert found[width]["fetched"] == []
    assert any(inner > outer for outer, inner in found[420]["tables"])  # the wide table scrolls inside its own box


def test_every_plot_shows_one_drawing_with_visible_marks(measured):
    report = make_report()
    for width in WIDTHS:
        plots = measured[0][width]["plots"]
        assert list(plots) == ["plot-bytes", "plot-flops", "plot-ms", "plot-curves", "plot-comparisons"]
        for key, plot in plots.items():
            assert plot["drawings"] == 1
            left, top, right, bottom = plot["drawing"]
            assert 0 <= left < right <= width
            expected = {"plot-curves": 7, "plot-comparisons": 2}.get(key, len(report.artifacts))
            assert len(plot["marks"]) == expected
            for name, *box in plot["marks"]:
                assert box[2] - box[0] >= 5, name
                assert box[3] - box[1] >= 5, name
                assert left <= (box[0] + box[2]) / 2 <= right, name
                assert top <= (box[1] + box[3]) / 2 <= bottom or key == "plot-curves", name


def legible(found):
    """Asserts that texts of every plot are large enough, on the page, and on no other text; returns the texts."""
    told = []
    for width in WIDTHS:
        for key, plot in found[width]["plots"].items():
            for text, size, left, _, right, _ in plot["texts"]:
                assert size * plot["scale"] >= 11, (width, key, text)
                assert left >= 0, (width, key, text)
                assert right <= width, (width, key, text)
                told.append(text)
            for a, b in ((a, b) for i, a in enumerate(plot["texts"]) for b in plot["texts"][:i]):
                across, down = min(a[4], b[4]) - max(a[2], b[2]), min(a[5], b[5]) - max(a[3], b[3])
                assert across <= 1 or down <= 4, (
                    width,
                    key,
                    a[0],
                    b[0],
                )  # a line box is some 4 pixels taller than its letters
    return told


def test_names_are_legible_and_do_not_overlap(measured):
    told = legible(measured[0])
    for row in make_report().artifacts:
        assert sum(text.startswith(row.name) for text in told) >= 6


def test_a_crowded_report_in_the_dark_stays_legible(measured, folder):
    report = make_report()
    more = [
        dataclasses.replace(
            row,
            name=f"{row.name}-of-a-longer-family-{i}",
            loss=row.loss + 0.013 * (i - 3),
            stored_bytes=row.stored_bytes * (9 + i) // 11,
        )
        for i, row in enumerate(report.artifacts)
    ]
    crowded = render(dataclasses.replace(report, artifacts=(*report.artifacts, *more)))
    found, console = measure(crowded, folder, "--blink-settings=preferredColorScheme=0")
    assert console == []
    assert all(found[width]["scroll"] <= width for width in WIDTHS)
    told = legible(found)
    assert len({text for text in told if "…" in text and "family-" in text}) >= 6
    light = measured[0][1280]
    assert brightness(light["page"]) > 200
    assert brightness(found[1280]["page"]) < 60
    assert light["accent"] != found[1280]["accent"]


def brightness(color):
    return max(map(int, re.findall(r"\d+", color)[:3]))
