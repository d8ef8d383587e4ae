"""Comparisons and claims carry their numbers and say what these say."""

import math

import numpy as np
import pytest

from lmeff.report.compare import at_most, compare
from lmeff.report.statistics import paired_difference


def test_compare_carries_the_paired_difference():
    tokens = np.array([10.0, 20.0, 30.0])
    a, b = (tokens * [2.0, 2.1, 2.2], tokens), (tokens * [2.1, 2.3, 2.3], tokens)
    found = compare("new", a, "old", b)
    assert (found.difference, *found.interval) == paired_difference(a, b)
    assert found.sentence == (
        f"new has a lower loss than old by {-found.difference:.4f} nats/token, interval [{found.interval[0]:+.4f}, {found.interval[1]:+.4f}]."
    )


@pytest.mark.parametrize(
    ("measured", "passed"), [(0.9, True), (1.0, True), (1.0001, False), (math.nan, False), (math.inf, False)]
)
def test_at_most(measured, passed):
    verdict = at_most("small", np.float32(measured) if passed else measured, 1.0, "why")
    assert verdict.passed is passed
    assert verdict.bound == 1.0
