"""Windows score each token once behind enough context, and the sums are those of the model run window by window in NumPy float64."""

import math

import numpy as np
import pytest

from lmeff.core.errors import ConfigError, DataError
from lmeff.evals.perplexity import difference, perplexity, windows
from lmeff.report.statistics import bootstrap_mean
from tests.evals.scored import TOKENIZER, log_probabilities, plain_scorer

TEXTS = ["a man, a plan", "", "é", "the quick brown fox jumps"]


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 1), (4, 3), (4, 4), (7, 2), (8, 8), (100, 5)])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 10, 23])
def test_each_token_is_scored_once_behind_enough_context(count, window, stride):
    context = {}
    for first, last, scored in windows(count, window, stride):
        assert 0 <= first < last <= count
        assert last - first <= window + 1
        for target in range(last - scored, last):
            assert target not in context
            context[target] = target - first
    assert sorted(context) == list(range(1, count))
    assert all(seen >= min(target, window - stride + 1) for target, seen in context.items())
    assert all(context[target] == target for target in context if target <= window)


@pytest.mark.parametrize("start", [2, 5])
def test_ids_before_a_text_are_no_targets(start):
    found = list(windows(20, 4, 3, start))
    targets = [t for _, last, scored in found for t in range(last - scored, last)]
    assert targets == list(range(start, 20))
    assert all(last - first <= 5 and scored < last - first for first, last, scored in found)


def test_windows_of_the_harness_are_the_same():
    utils = pytest.importorskip("lm_eval.utils")
    for count, window, stride in ((2, 4, 4), (9, 4, 4), (23, 8, 3), (24, 8, 8)):
        ids = list(range(count))
        theirs = list(utils.get_rolling_token_windows(ids[1:], 0, window, window - stride + 1))
        ours = [(ids[a : b - 1], ids[b - n : b]) for a, b, n in windows(count, window, stride)]
        assert [(list(a), list(b)) for a, b in theirs] == ours


def brute_force(text, window, stride, ends):
    """Nats and tokens of a document: every target by itself, behind the ids that its window shows."""
    ids = [TOKENIZER.bos, *text.encode(), *([TOKENIZER.eos] if ends else [])]
    nats, end = 0.0, window  # `end`: the last target of the window
    for target in range(1, len(ids)):
        if target > end:
            end = min(end + stride, len(ids) - 1)
        first = max(0, min(end, len(ids) - 1) - window)
        nats -= log_probabilities(plain_scorer().served, ids[first : target + 1])[-1][ids[target]]
    return nats, len(ids) - 1


@pytest.mark.parametrize(("window", "stride", "ends"), [(64, 32, True), (12, 5, False), (12, 12, True)])
def test_perplexity_equals_brute_force(window, stride, ends):
    found = perplexity(plain_scorer(), TOKENIZER, TEXTS, window=window, stride=stride, ends=ends)
    wanted = np.array([brute_force(text, window, stride, ends) for text in TEXTS if text])
    np.testing.assert_allclose(found.nats, wanted[:, 0], rtol=1e-4)
    np.testing.assert_array_equal(found.tokens, wanted[:, 1])
    summary = found.summary(samples=200)
    loss = wanted[:, 0].sum() / wanted[:, 1].sum()
    count = sum(len(text.encode()) for text in TEXTS)
    assert summary["nats_per_token"] == pytest.approx(loss, rel=1e-4)
    assert summary["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert summary["bits_per_byte"] == pytest.approx(wanted[:, 0].sum() / math.log(2) / count, rel=1e-4)
    assert (summary["documents"], summary["documents_without_tokens"], summary["bytes"]) == (3, 1, count)
    _, low, high = bootstrap_mean(found.nats, found.tokens, samples=200)
    assert summary["nats_per_token_interval"] == [low, high]


def test_one_document_is_resampled_by_window():
    found = perplexity(plain_scorer(), TOKENIZER, [TEXTS[3]], window=8, stride=4)
    assert (found.unit, found.tokens.tolist()) == ("window", [8, 4, 4, 4, 4, 1])
    assert found.summary()["nats_per_token_interval"] is not None
    alone = perplexity(plain_scorer(), TOKENIZER, [TEXTS[0]])
    assert alone.summary()["nats_per_token_interval"] is None
    np.testing.assert_allclose(alone.nats.sum(), brute_force(TEXTS[0], 64, 32, False)[0], rtol=1e-4)


def test_a_difference_is_paired():
    a, b = (perplexity(plain_scorer(seed=seed), TOKENIZER, TEXTS) for seed in (0, 1))
    mean, low, high = difference(a, b)
    assert mean == pytest.approx(a.nats_per_token - b.nats_per_token)
    assert low <= mean <= high
    assert difference(a, a) == (0, 0, 0)


@pytest.mark.parametrize(
    ("window", "stride", "word"),
    [(65, 1, "window: got 65, expected 1 to 64"), (8, 9, "stride: got 9"), (8, 0, "stride: got 0")],
)
def test_windows_out_of_range_are_refused(window, stride, word):
    with pytest.raises(ConfigError, match=word):
        perplexity(plain_scorer(), TOKENIZER, TEXTS, window=window, stride=stride)


def test_no_text_is_refused():
    with pytest.raises(DataError, match="none of 2 documents has a token"):
        perplexity(plain_scorer(), TOKENIZER, ["", ""])
