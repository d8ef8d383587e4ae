"""Speculation writes what the large model alone would."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import ConfigError, UsageError
from lmeff.infer.generate import generate
from lmeff.infer.sampling import GREEDY, Sampling
from lmeff.infer.speculative import generate_ahead, judge
from lmeff.models.cache import CacheFormat, parse_cache
from lmeff.models.config import preset
from tests.infer.tiny import MODELS, pack, rows, served

F32 = CacheFormat(numbers="float32")
PROMPTS = [rows(64, 1, n, seed=n)[0] for n in (3, 7, 1)]
DRAFT = preset("tiny", layers=1)


def likes(seed, *shape):
    return jax.nn.softmax(2 * jax.random.normal(jax.random.key(seed), shape), axis=-1)


def test_one_guess_leaves_exactly_the_large_models_distribution():
    """By the formula: what is kept, plus what is drawn anew, is p; no randomness in this one."""
    p_V, q_V = np.asarray(likes(0, 5), np.float64), np.asarray(likes(1, 5), np.float64)
    kept_V = np.minimum(p_V, q_V)
    left_V = np.maximum(p_V - q_V, 0)
    np.testing.assert_allclose(kept_V + (1 - kept_V.sum()) * left_V / left_V.sum(), p_V, atol=1e-6)


@functools.lru_cache
def outcomes(draws=40_000):
    """Two written tokens of a first-order model with three, from one guess a round: counts [3, 3] and the expected distribution."""
    p_VV, q_VV = likes(3, 3, 3), likes(4, 3, 3)  # of the next token after each
    start = 1

    def one(key):
        guess_key, judge_key, rest_key = jax.random.split(key, 3)
        guess = jax.random.categorical(guess_key, jnp.log(q_VV[start]))
        p_TV = jnp.stack([p_VV[start], p_VV[guess]])
        kept, token = judge(judge_key[None], p_TV[None], q_VV[start][None, None], guess[None, None])
        first = jnp.where(kept[0] == 1, guess, token[0])
        alone = jax.random.categorical(rest_key, jnp.log(p_VV[first]))  # the next round's, had the guess not been kept
        return first, jnp.where(kept[0] == 1, token[0], alone), kept[0]

    first, second, kept = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(9), draws))
    counts = np.zeros((3, 3))
    np.add.at(counts, (np.asarray(first), np.asarray(second)), 1)
    want = np.asarray(p_VV[start])[:, None] * np.asarray(p_VV)
    rate = np.minimum(np.asarray(p_VV[start]), np.asarray(q_VV[start])).sum()
    return counts, want, float(np.mean(np.asarray(kept))), rate


def test_pairs_of_tokens_have_the_large_models_frequencies():
    counts, want, _, _ = outcomes()
    chi2 = ((counts - counts.sum() * want) ** 2 / (counts.sum() * want)).sum()
    assert chi2 < 26.1  # eight degrees of freedom: one in a thousand is larger


def test_guesses_are_kept_as_often_as_the_distributions_overlap():
    counts, _, kept, rate = outcomes()
    assert abs(kept - rate) < 4 * (rate * (1 - rate) / counts.sum()) ** 0.5


@pytest.mark.parametrize(
    ("likely", "guessed", "kept", "token"),
    [
        ([0, 1, 2], [0, 1], 2, 2),
        ([0, 1, 2], [0, 2], 1, 1),
        ([0, 1, 2], [1, 1], 0, 0),
    ],
    ids=["all", "first", "none"],
)
def test_a_certain_model_keeps_what_it_would_have_said(likely, guessed, kept, token):
    p_BTV, q_BTV = jnp.eye(3)[jnp.array([likely])], jnp.full((1, 2, 3), 1 / 3)
    got = judge(jax.random.split(jax.random.key(0), 1), p_BTV, q_BTV, jnp.array([guessed]))
    assert [int(x[0]) for x in got] == [kept, token]


@pytest.mark.parametrize(
    ("mesh", "name"), [("one", "window"), pytest.param("data4-tensor2", "mixed", marks=pytest.mark.slow)]
)
def test_greedy_text_is_the_large_models(mesh, name):
    target, draft = served(MODELS[name], mesh), served(DRAFT, mesh, seed=1)
    alone = generate(target, PROMPTS, max_tokens=9, sampling=GREEDY, cache=F32)
    made = generate_ahead(target, draft, PROMPTS, max_tokens=9, sampling=GREEDY, cache=F32, guesses=3)
    assert [c.ids.tolist() for c in made.completions] == [c.ids.tolist() for c in alone]
    for own, other in zip(made.completions, alone, strict=True):
        np.testing.assert_allclose(own.logprobs, other.logprobs, atol=1e-5)
    assert 0 <= made.accepted < made.offered


def test_a_draft_that_is_the_model_is_always_right():
    target = served(MODELS["gqa-untied"])
    same = generate_ahead(target, target, PROMPTS, max_tokens=9, sampling=GREEDY, cache=F32, guesses=3)
    assert same.accepted == same.offered
    assert same.rate == 1.0
    assert same.rounds == 2  # the first token is the prompt's, then four a round


@pytest.mark.slow
def test_a_draft_that_is_the_model_rounded_is_nearly_always_right():
    target = served(MODELS["gqa-untied"])
    how = {"max_tokens": 20, "sampling": GREEDY, "cache": F32}
    rounded = dataclasses.replace(target, params=pack(target, "int8"))
    made = generate_ahead(target, rounded, PROMPTS, draft_cache=parse_cache("int8"), guesses=3, **how)
    assert made.rate > 0.6
    assert made.rounds < 15
    alone = generate(target, PROMPTS, **how)
    assert [c.ids.tolist() for c in made.completions] == [c.ids.tolist() for c in alone]


def test_rows_end_and_stop_within_a_round():
    target, draft = served(MODELS["window"]), served(DRAFT, seed=1)
    how = {"max_tokens": 9, "sampling": GREEDY, "cache": F32}
    stop = int(generate(target, PROMPTS, **how)[0].ids[4])
    alone = generate(target, PROMPTS, stop_ids=[stop], **how)
    ahead = generate_ahead(target, draft, PROMPTS, stop_ids=[stop], guesses=3, **how).completions
    for own, other in zip(ahead, alone, strict=True):
        assert (own.ids.tolist(), own.reason) == (other.ids.tolist(), other.reason)


@pytest.mark.slow
def test_a_rows_sampled_text_does_not_depend_on_the_batch():
    target, draft, how = served(preset("tiny", layers=1)), served(DRAFT, seed=1), Sampling(seed=3)
    made = {"max_tokens": 7, "sampling": how, "cache": F32, "guesses": 3}
    together = generate_ahead(target, draft, PROMPTS, **made)
    in_turn = generate_ahead(target, draft, PROMPTS, batch=1, **made)
    assert [c.ids.tolist() for c in together.completions] == [c.ids.tolist() for c in in_turn.completions]


@pytest.mark.slow
def test_sampled_text_has_the_large_models_frequencies():
    """Whole programs, caches and all: the second and third token after a prompt, of many rows, against the model's own probabilities."""
    cfg = preset("tiny", vocab=4, width=16, heads=2, kv_heads=1, ffn=16, layers=1)
    target, draft = served(cfg), served(cfg, seed=1)
    count, prompt = 4096, np.array([1, 2], np.int32)
    how = Sampling(temperature=0.7, top_k=3, seed=11)
    made = generate_ahead(
        target, draft, [prompt] * count, max_tokens=3, sampling=how, cache=F32, guesses=2, batch=1024
    ).completions
    got = np.zeros((4, 4, 4))
    np.add.at(got, tuple(np.array([c.ids for c in made]).T), 1)
    want = np.zeros((4, 4, 4))
    alone = generate(
        target, [prompt] * count, max_tokens=3, sampling=dataclasses.replace(how, seed=12), cache=F32, batch=1024
    )
    np.add.at(want, tuple(np.array([c.ids for c in alone]).T), 1)
    both = got + want
    chi2 = (np.square(got - want)[both > 0] / both[both > 0]).sum()
    cells = int((both > 0).sum())
    assert cells > 10
    assert chi2 < cells + 3.1 * (2 * cells) ** 0.5 + 5  # two samples alike: about one in a thousand is larger


def test_pairs_that_do_not_match_are_refused():
    target = served(preset("tiny"))
    how = {"max_tokens": 4, "sampling": GREEDY, "cache": F32}
    with pytest.raises(ConfigError, match="draft: got a vocabulary of 32, expected the target's 64"):
        generate_ahead(target, served(preset("tiny", vocab=32)), PROMPTS, **how)
    with pytest.raises(ConfigError, match="draft: got a model on data 4 x tensor 2"):
        generate_ahead(target, served(preset("tiny"), "data4-tensor2"), PROMPTS, **how)
    with pytest.raises(ConfigError, match="guesses: got 0"):
        generate_ahead(target, target, PROMPTS, guesses=0, **how)
    with pytest.raises(UsageError, match="prompt 0"):
        generate_ahead(target, target, [np.array([99])], **how)
