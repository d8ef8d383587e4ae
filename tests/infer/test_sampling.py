"""What is drawn: filters against NumPy, frequencies against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.infer.sampling import Sampling, draw, filtered, logprob_of, row_keys

LOGITS = np.array([[2.0, 1.0, 0.5, 2.0, -1.0, 0.0], [0.0, 3.0, 0.0, 0.0, 0.0, 1.0]], np.float32)
CASES = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.5),
    "top_k": Sampling(top_k=3),
    "top_k-larger-than-all": Sampling(top_k=60),
    "top_p": Sampling(top_p=0.7),
    "top_p-of-nearly-nothing": Sampling(top_p=1e-6),
    "min_p": Sampling(min_p=0.3),
    "all": Sampling(temperature=1.5, top_k=4, top_p=0.9, min_p=0.2),
    "greedy": Sampling(temperature=0.0, top_k=4, top_p=0.1),
}


def softmax(x):
    with np.errstate(divide="ignore"):
        weights = np.exp(x - x.max())
    return weights / weights.sum()


def oracle(logits_V, how):
    """The distribution of one row, token by token, in float64."""
    likes = logits_V.astype(np.float64)
    order = sorted(range(len(likes)), key=lambda v: (-likes[v], v))
    if how.temperature == 0:
        return np.eye(len(likes))[order[0]]
    likes = softmax(likes / how.temperature)
    kept = order[: how.top_k] if how.top_k else order
    likes = np.array([likes[v] if v in kept else 0 for v in range(len(likes))])
    likes, mass, nucleus = likes / likes.sum(), 0.0, []
    for v in kept:
        if mass < how.top_p:
            nucleus.append(v)
        mass += likes[v]
    likes = np.array([likes[v] if v in nucleus else 0 for v in range(len(likes))])
    likes = np.where(likes >= how.min_p * likes.max(), likes, 0)
    return likes / likes.sum()


@pytest.mark.parametrize("how", CASES.values(), ids=CASES)
def test_filters_keep_what_the_oracle_keeps(how):
    got = jax.nn.softmax(filtered(jnp.asarray(LOGITS), how), axis=-1)
    np.testing.assert_allclose(got, [oracle(row, how) for row in LOGITS], atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_frequencies_are_the_probabilities(name):
    how, draws = CASES[name], 20_000
    keys = row_keys(jnp.uint32(7), jnp.zeros(draws, jnp.int32), jnp.arange(draws))
    tokens = draw(keys, jnp.broadcast_to(jnp.asarray(LOGITS[0]), (draws, 6)), how)
    want = oracle(LOGITS[0], how)
    counts = np.bincount(np.asarray(tokens), minlength=6)
    assert counts[want == 0].sum() == 0
    possible = want > 0
    chi2 = ((counts - draws * want)[possible] ** 2 / (draws * want[possible])).sum()
    assert chi2 < 20.5  # five degrees of freedom: one in a thousand is larger


def test_a_row_draws_the_same_among_any_others():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)))
    how = Sampling()
    together = draw(row_keys(jnp.uint32(3), jnp.arange(4), jnp.full(4, 9)), logits, how)
    for row in range(4):
        alone = draw(row_keys(jnp.uint32(3), jnp.array([row]), jnp.array([9])), logits[row : row + 1], how)
        assert int(alone[0]) == int(together[row])
    other_step = draw(row_keys(jnp.uint32(3), jnp.arange(4), jnp.full(4, 10)), logits, how)
    other_seed = draw(row_keys(jnp.uint32(4), jnp.arange(4), jnp.full(4, 9)), logits, how)
    assert (np.asarray(other_step) != np.asarray(together)).any()
    assert (np.asarray(other_seed) != np.asarray(together)).any()


def test_logprobs_are_the_models():
    got = logprob_of(jnp.asarray(LOGITS), jnp.array([4, 1]))
    np.testing.assert_allclose(got, [np.log(softmax(LOGITS[0])[4]), np.log(softmax(LOGITS[1])[1])], rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "sampling.temperature: got -1.0"),
        ({"top_k": 0}, "sampling.top_k: got 0"),
        ({"top_p": 0.0}, "sampling.top_p: got 0.0"),
        ({"min_p": 1.5}, "sampling.min_p: got 1.5"),
    ],
    ids=lambda x: str(x),
)
def test_what_leaves_no_distribution_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Sampling(**wrong)
