"""Intervals against an oracle: their coverage on synthetic documents, and the frontier against its definition."""

import itertools

import numpy as np
import pytest

from lmeff.core.errors import DataError
from lmeff.report.statistics import bootstrap_mean, paired_difference, pareto


def corpus(rng, documents, shift=0.0):
    """Documents of uneven length, a shared difficulty, and two models' nats; the truth is 2.0 and the difference is `shift`."""
    tokens = rng.integers(20, 400, documents).astype(float)
    difficulty = rng.normal(0, 0.5, documents)
    a = (2.0 + shift + difficulty + rng.normal(0, 0.05, documents)) * tokens
    b = (2.0 + difficulty + rng.normal(0, 0.05, documents)) * tokens
    return a, b, tokens


def test_mean_is_the_ratio_of_sums_and_not_the_mean_of_ratios():
    nats, tokens = np.array([10.0, 300.0]), np.array([10.0, 100.0])
    mean, low, high = bootstrap_mean(nats, tokens)
    assert mean == 310 / 110
    assert low == 1.0  # both resampled documents are the first
    assert high == 3.0


def test_bootstrap_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    nats, _, tokens = corpus(rng, 30)
    drawn = np.random.default_rng(5).integers(30, size=(200, 30))
    ratios = [sum(nats[i] for i in row) / sum(tokens[i] for i in row) for row in drawn]
    expected = np.quantile(ratios, [0.05, 0.95])
    _, low, high = bootstrap_mean(nats, tokens, samples=200, seed=5, level=0.9)
    np.testing.assert_allclose([low, high], expected, rtol=1e-12)


def test_blocks_do_not_change_the_number_of_resamples(monkeypatch):
    rng = np.random.default_rng(0)
    nats, _, tokens = corpus(rng, 30)
    whole = bootstrap_mean(nats, tokens, samples=101)
    monkeypatch.setattr("lmeff.report.statistics.CELLS", 30 * 7)
    np.testing.assert_allclose(bootstrap_mean(nats, tokens, samples=101), whole, rtol=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    trials, covered, covered_difference = 400, 0, 0
    for trial in range(trials):
        a, b, tokens = corpus(rng, 150, shift=0.03)
        _, low, high = bootstrap_mean(b, tokens, samples=400, seed=trial)
        covered += low <= 2.0 <= high
        _, low, high = paired_difference((a, tokens), (b, tokens), samples=400, seed=trial)
        covered_difference += low <= 0.03 <= high
    # 95% of 400 has a standard deviation of 4.4; the percentile bootstrap on 150 documents covers a little less
    assert 0.915 <= covered / trials <= 0.98
    assert 0.915 <= covered_difference / trials <= 0.98


def test_pairing_finds_what_two_separate_intervals_cannot():
    a, b, tokens = corpus(np.random.default_rng(2), 200, shift=0.03)
    (_, low_a, high_a), (_, low_b, high_b) = bootstrap_mean(a, tokens), bootstrap_mean(b, tokens)
    difference, low, high = paired_difference((a, tokens), (b, tokens))
    assert low_a < high_b  # the separate intervals overlap
    assert low_b < high_a
    assert 0 < low < difference < high
    assert high - low < (high_a - low_a) / 4


def test_paired_difference_draws_the_same_documents_for_both():
    _, b, tokens = corpus(np.random.default_rng(3), 50)
    difference, low, high = paired_difference((b + 0.25 * tokens, tokens), (b, tokens))
    np.testing.assert_allclose([difference, low, high], 0.25, rtol=1e-12)


def test_same_seed_same_interval_and_antisymmetry():
    a, b, tokens = corpus(np.random.default_rng(4), 80, shift=0.1)
    forward = paired_difference((a, tokens), (b, tokens), seed=9)
    assert forward == paired_difference((a, tokens), (b, tokens), seed=9)
    assert forward != paired_difference((a, tokens), (b, tokens), seed=10)
    back = paired_difference((b, tokens), (a, tokens), seed=9)
    np.testing.assert_allclose(back, [-forward[0], -forward[2], -forward[1]], rtol=1e-9)


def test_documents_without_tokens_are_ignored():
    a, _, tokens = corpus(np.random.default_rng(6), 40)
    padded = bootstrap_mean(np.append(a, [0.0, 5.0]), np.append(tokens, [0.0, 0.0]))
    assert padded == bootstrap_mean(a, tokens)


def test_one_document_has_no_interval():
    mean, low, high = bootstrap_mean([6.0], [3.0])
    assert mean == 2.0
    assert np.isnan(low)
    assert np.isnan(high)


@pytest.mark.parametrize(("nats", "tokens"), [([1.0], [0.0]), ([], []), ([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]])])
def test_wrong_documents_are_refused(nats, tokens):
    with pytest.raises(DataError, match="expected"):
        bootstrap_mean(nats, tokens)


def test_different_documents_are_refused():
    with pytest.raises(DataError, match="same held-out text"):
        paired_difference(([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [2.0, 1.0]))


CASES = {
    "empty": ([], []),
    "one": ([(1, 1)], [True]),
    "chain": ([(1, 3), (2, 2), (3, 1)], [True, True, True]),
    "dominated": ([(1, 1), (2, 2)], [True, False]),
    "equal points are both on it": ([(1, 1), (1, 1), (2, 0)], [True, True, True]),
    "tie on x": ([(1, 1), (1, 2)], [True, False]),
    "tie on y": ([(1, 1), (2, 1)], [True, False]),
    "not finite": ([(np.nan, 0), (0, np.nan), (1, np.inf), (-np.inf, 0), (2, 2)], [False, False, False, False, True]),
}


@pytest.mark.parametrize("case", CASES)
def test_pareto_cases(case):
    points, expected = CASES[case]
    assert pareto(points).tolist() == expected


def test_pareto_equals_its_definition_on_a_grid_with_many_ties():
    points = np.random.default_rng(8).integers(0, 6, (60, 2))
    expected = [not any((q <= p).all() and (q < p).any() for q in points) for p in points]
    assert pareto(points).tolist() == expected
    for (p, on_p), (q, on_q) in itertools.combinations(zip(points, expected), 2):
        assert not (on_p and on_q and (p < q).all())
