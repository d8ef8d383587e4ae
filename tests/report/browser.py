"""A page in a real browser, measured: what the tests of reports and of plans share."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH; apt-get install chromium")
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


def brightness(color):
    return max(map(int, re.findall(r"\d+", color)[:3]))
