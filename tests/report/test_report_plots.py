"""The pictures: what they mark, where names stand, that the same report gives the same bytes."""

import dataclasses
import itertools
import math
import re
import sys

import numpy as np
import pytest

from lmeff.core.errors import MissingExtra
from lmeff.report.curves import spread
from lmeff.report.frontier import frontier, log_ticks, scale_top, short_number
from lmeff.report.labels import overlap, place
from lmeff.report.plots import make_plots
from lmeff.report.words import AXES
from tests.report.report_sample import make_report


@pytest.fixture(scope="module")
def report():
    return make_report()


@pytest.fixture(scope="module")
def plots(report):
    return make_plots(report)


def marks(svg):
    return re.findall(r'data-mark="([^"]*)"', svg)


def test_every_artifact_is_marked_in_every_frontier(report, plots):
    names = sorted(row.name for row in report.artifacts)
    assert list(plots) == ["bytes", "flops", "ms", "curves", "comparisons"]
    for key, plot in plots.items():
        for svg in (plot.wide, plot.narrow):
            if key in ("bytes", "flops", "ms"):
                assert sorted(marks(svg)) == names
    assert sorted(marks(plots["curves"].wide)) == sorted(row.name for row in report.artifacts if row.curve)
    assert marks(plots["comparisons"].narrow) == ["student − control", "qat-int8 − teacher"]


def test_captions_say_what_the_frontier_is(report, plots):
    rows = {row.name: row for row in report.artifacts}
    for axis in AXES:
        on = re.search(r"On the frontier: ([^.]*)\.", plots[axis.key].caption)[1].split(", ")
        for name, row in rows.items():
            beaten = any(
                axis.value(o) <= axis.value(row)
                and o.loss <= row.loss
                and (axis.value(o), o.loss) != (axis.value(row), row.loss)
                for o in rows.values()
            )
            assert (name in on) == (not beaten), (axis.key, name)
        assert "Above the scale: shrunk (3.08" in plots[axis.key].caption


def test_dominated_marks_are_grey_and_hollow(report, plots):
    found = frontier(report, AXES[0])
    for row, best in zip(found.rows, found.best):
        group = plots["bytes"].wide.split(f'data-mark="{row.name}"')[1].split("<g data-mark")[0]
        style = re.search(r'<use [^>]*style="([^"]*)"', group)[1]
        assert ("var(--accent)" in style) == bool(best), row.name
        assert ("var(--page)" in style) == (not best), row.name


def test_same_report_same_bytes_whatever_the_users_style(report, plots):
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 30, "savefig.dpi": 300}):
        assert make_plots(make_report()) == plots
        assert matplotlib.rcParams["font.size"] == 30


def test_colours_are_variables_and_nothing_else(plots):
    for plot in plots.values():
        for svg in (plot.wide, plot.narrow):
            assert not re.search(r"#[0-9a-f]{6}\b(?![^<]*</title>)", re.sub(r'(id|href|clip-path)="[^"]*"', "", svg))
            assert "var(--" in svg
            assert "DejaVu" not in svg
            assert "http" not in svg


def test_artifacts_without_a_number_are_left_out_and_told(report):
    rows = list(report.artifacts)
    rows[1] = dataclasses.replace(rows[1], loss=math.nan, loss_interval=(math.nan, math.nan))
    rows[2] = dataclasses.replace(rows[2], ms_per_token=None, ms_interval=None)
    changed = make_plots(dataclasses.replace(report, artifacts=tuple(rows)))
    assert "pruned-50" not in marks(changed["bytes"].wide)
    assert "Without a finite number here: pruned-50." in changed["bytes"].caption
    assert "Without a finite number here: pruned-50, shrunk." in changed["ms"].caption


def test_degenerate_reports_are_drawn(report):
    one = dataclasses.replace(report.artifacts[2], loss_interval=(math.nan, math.nan), ms_interval=None)
    alone = make_plots(dataclasses.replace(report, artifacts=(one,), comparisons=()))
    assert list(alone) == ["bytes", "flops", "ms"]
    assert marks(alone["ms"].wide) == ["shrunk"]
    twins = (one, dataclasses.replace(one, name="twin"))
    assert sorted(marks(make_plots(dataclasses.replace(report, artifacts=twins, comparisons=()))["bytes"].wide)) == [
        "shrunk",
        "twin",
    ]
    lost = dataclasses.replace(one, loss=math.nan)
    assert make_plots(dataclasses.replace(report, artifacts=(lost,), comparisons=())) == {}


def test_a_missing_package_is_told(monkeypatch, report):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lmeff\[report\]'"):
        make_plots(report)


def crowd(seed, count=12):
    rng = np.random.default_rng(seed)
    points = [tuple(p) for p in rng.uniform((60, 60), (340, 300), (count, 2))]
    sizes = [(float(w), 14.0) for w in rng.uniform(30, 110, count)]
    marks = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    return points, sizes, (40.0, 40.0, 384.0, 330.0), marks


def test_labels_never_overlap_a_label_or_a_mark_and_stay_inside():
    placed = 0
    for seed in range(30):
        points, sizes, within, marks = crowd(seed)
        boxes = [spot.box for spot in place(points, sizes, within, marks, []) if spot is not None]
        placed += len(boxes)
        assert all(overlap(a, b) == 0 for a, b in itertools.combinations(boxes, 2))
        assert all(overlap(box, mark) == 0 for box in boxes for mark in marks)
        assert all(b[0] >= within[0] and b[1] >= within[1] and b[2] <= within[2] and b[3] <= within[3] for b in boxes)
    assert placed >= 0.97 * 30 * 12


def test_a_label_without_room_is_left_out_and_the_first_chooses_first():
    points, sizes = [(50.0, 50.0), (50.0, 50.0)], [(60.0, 30.0), (60.0, 30.0)]
    first, second = place(points, sizes, (0.0, 20.0, 125.0, 80.0), [(44.0, 44.0, 56.0, 56.0)], [])
    assert first is not None
    assert second is None


def test_spread_keeps_order_and_distance():
    rng = np.random.default_rng(0)
    for count in (1, 2, 8, 15):
        wanted = rng.uniform(0, 300, count)
        got = spread(wanted, 15, 0, 300)
        assert (np.diff(np.sort(got)) >= 15 - 1e-3).all()
        assert (np.argsort(got) == np.argsort(wanted)).all()
    np.testing.assert_allclose(spread(np.array([10.0, 100.0]), 15, 0, 300), [10, 100])


@pytest.mark.parametrize(
    ("low", "high", "base", "expected"),
    [
        (9e5, 17e6, 2, [2.0**20, 2.0**21, 2.0**22, 2.0**23, 2.0**24]),
        (8e2, 2e9, 2, [2.0**9, 2.0**15, 2.0**21, 2.0**27][1:]),
        (0.8, 12, 10, [1.0, 2.0, 5.0, 10.0]),
        (1.4e6, 6.8e6, 10, [2e6, 3e6, 5e6]),
    ],
)
def test_ticks_are_few_and_round(low, high, base, expected):
    ticks = log_ticks(low, high, base)
    assert 3 <= len(ticks) <= 5
    if base == 10 or high < 1e8:
        assert ticks == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_every_scale_has_ticks(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        low = 10 ** rng.uniform(-5, 12)
        high = low * 10 ** rng.uniform(0.05, 6)
        for base in (2, 10):
            ticks = log_ticks(low, high, base)
            assert 1 <= len(ticks) <= 5, (low, high, base)
            assert all(low <= tick <= high for tick in ticks)


def test_short_number():
    assert [short_number(t) for t in ("10.0 M", "1.00 MiB", "512 B", "1.50 k", "100")] == [
        "10 M",
        "1 MiB",
        "512 B",
        "1.5 k",
        "100",
    ]


def test_one_far_loss_does_not_set_the_scale():
    assert scale_top([2.0, 2.1, 2.2, 9.0]) == 2.2
    assert scale_top([2.0, 2.1, 2.2, 2.4]) == 2.4
    assert scale_top([2.0, 9.0]) == 9.0
    assert scale_top([2.0, 2.0, 2.0]) == 2.0
    assert scale_top([2.0, 2.0, 2.0, 3.0]) == 3.0
