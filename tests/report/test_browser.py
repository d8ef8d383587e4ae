"""The page in a real browser: 1280 and 420 pixels wide, light and dark; nothing fetched, no error, no sideways scrolling, marks and names visible."""

import dataclasses
import functools
import http.server
import re
import threading

import pytest

from lmeff.report.html import render
from tests.report.browser import WIDTHS, brightness, browse, legible, measure, needs_browser
from tests.report.report_sample import make_report

pytestmark = needs_browser


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
