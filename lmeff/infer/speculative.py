"""Speculative sampling: a small model writes a few tokens ahead, the large one judges them all in one pass.

A guess `x` of the draft, drawn from q, is kept with probability min(1, p(x) / q(x)); the first one that is not is drawn anew from the positive part of p - q.
What is written then has the distribution of the large model alone, filters and all (Leviathan et al. 2022, https://arxiv.org/abs/2211.17192, appendix A.1;
Chen et al. 2023, https://arxiv.org/abs/2302.01318). At temperature 0 it is the large model's greedy text.

Both caches hold all tokens but the last one. A round feeds it and the guesses to both, and takes back from both what was not kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.errors import ConfigError
from lmeff.infer.engine import Program, check_prompts, extend, length_for, make_engine, rows_for
from lmeff.infer.generate import first_tokens, prompt_batch
from lmeff.infer.rows import Completion, OnToken, Row, Stops, fresh_rows
from lmeff.infer.sampling import Sampling, draw, filtered, logprob_of, row_keys
from lmeff.infer.served import Served
from lmeff.models.cache import Cache, CacheFormat

GUESS, JUDGE, AGAIN = 0, 1, 2  # what a key of a row is folded with, by what it is for


class Speculated(NamedTuple):
    """Completions, and how well the draft guessed.

    offered, accepted: guesses that the large model judged, and kept, of rows that had not ended.
    rounds:            its passes after the prompt.
    """

    completions: list[Completion]
    offered: int
    accepted: int
    rounds: int

    @property
    def rate(self) -> float:
        """The part of the guesses that was kept."""
        return self.accepted / max(self.offered, 1)


class State(NamedTuple):
    """Where all rows are between two rounds.

    last:    [B], the token that no cache holds yet. written: [B], tokens written so far.
    """

    target: Cache
    draft: Cache
    last_B: jax.Array
    written_B: jax.Array


class Round(NamedTuple):
    """What a round gives: of `tokens` and `logprobs` [B, guesses + 1] each row's first `count`."""

    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    count_B: jax.Array


class Pair(NamedTuple):
    """What a round's program depends on; static."""

    target: Program
    draft: Program
    sampling: Sampling
    guesses: int


def judge(keys_B: jax.Array, p_BTV: jax.Array, q_BTV: jax.Array, guessed_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many guesses each row keeps, and the token after them.

    p: probabilities of the large model, one more than there are guesses; q: those that the guesses were drawn from.
    """
    guesses = guessed_BT.shape[1]
    picked = guessed_BT[..., None]
    p_BT, q_BT = (jnp.take_along_axis(x[:, :guesses], picked, axis=-1)[..., 0] for x in (p_BTV, q_BTV))
    chances_BT = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, JUDGE), (guesses,)))(keys_B)
    kept_BT = chances_BT * q_BT < p_BT
    kept_B = jnp.cumprod(kept_BT.astype(jnp.int32), axis=1).sum(1)
    q_BTV = jnp.concatenate([q_BTV, jnp.zeros_like(q_BTV[:, :1])], axis=1)  # after the last guess nothing is taken away
    p_BV, q_BV = (jnp.take_along_axis(x, kept_B[:, None, None], axis=1)[:, 0] for x in (p_BTV, q_BTV))
    left_BV = jnp.maximum(p_BV - q_BV, 0)
    left_BV = jnp.where(left_BV.sum(-1, keepdims=True) > 0, left_BV, p_BV)  # p = q but for rounding
    again_B = jax.vmap(lambda key: jax.random.fold_in(key, AGAIN))(keys_B)
    return kept_B, jax.vmap(jax.random.categorical)(again_B, jnp.log(left_BV)).astype(jnp.int32)


def generate_ahead(
    target: Served,
    draft: Served,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling,
    cache: CacheFormat,
    draft_cache: CacheFormat | None = None,
    guesses: int = 4,
    stop_ids: Collection[int] = (),
    stop_texts: Sequence[str] = (),
    decoder: Callable[[Sequence[int]], str] | None = None,
    on_token: OnToken | None = None,
    batch: int | None = None,
) -> Speculated:
    """`lmeff.infer.generate.generate` of `target`, with a draft that guesses so many tokens a round; on the same mesh, however each is packed.

    Log-probabilities are the target's.
    """
    check_pair(target, draft, guesses)
    check_prompts(target.cfg, prompts, max_tokens)
    stops = Stops(frozenset(stop_ids), tuple(stop_texts), decoder)
    rows = fresh_rows(len(prompts), max_tokens, stops, on_token)
    if not prompts:
        return Speculated([], 0, 0, 0)
    size = rows_for(target.layout, min(batch or len(prompts), len(prompts)))
    tokens = max(map(len, prompts)) + max_tokens
    engines = tuple(
        make_engine(model, batch=size, length=length_for(model.cfg, tokens), cache=format, chunk=guesses + 1)
        for model, format in ((target, cache), (draft, draft_cache or cache))
    )
    pair = Pair(engines[0].program, engines[1].program, dataclasses.replace(sampling, seed=0), guesses)
    weights = tuple(engine.weights for engine in engines)
    seed, counts = np.uint32(sampling.seed % 2**32), np.zeros(3, int)
    for first in range(0, len(prompts), size):
        own, numbers_B = rows[first : first + size], np.arange(first, first + size, dtype=np.int32)
        tokens_BT, lengths_B = prompt_batch(prompts[first : first + size], size)
        (logits_BV, target_cache), (_, drafted) = (engine.prefill(tokens_BT, lengths_B) for engine in engines)
        tokens_B, logprobs_B = first_tokens(pair.sampling, logits_BV, seed, numbers_B)
        for row, token, logprob in zip(own, *jax.device_get((tokens_B, logprobs_B)), strict=False):
            row.take(int(token), float(logprob))
        state = State(target_cache, drafted, tokens_B, jnp.ones_like(tokens_B))
        while not all(row.reason for row in own):
            state, made_round = play(pair, weights, state, seed, numbers_B, np.int32(max_tokens))
            counts += _hand_out(own, jax.device_get(made_round), guesses)
    return Speculated([row.completion() for row in rows], *map(int, counts))


def _hand_out(rows: Sequence[Row], made: Round, guesses: int) -> np.ndarray:
    """A round's tokens to rows that have not ended; (offered, accepted, rounds)."""
    offered = accepted = 0
    for row, tokens, logprobs, count in zip(rows, *made, strict=False):
        if row.reason:
            continue
        offered, accepted = offered + guesses, accepted + int(count) - 1
        for token, logprob in zip(tokens[:count], logprobs[:count], strict=True):
            row.take(int(token), float(logprob))
    return np.array([offered, accepted, 1])


def check_pair(target: Served, draft: Served, guesses: int) -> None:
    """Refuses a draft whose guesses mean nothing to the target."""
    if draft.cfg.vocab != target.cfg.vocab:
        raise ConfigError(
            f"draft: got a vocabulary of {draft.cfg.vocab}, expected the target's {target.cfg.vocab}: its guesses are the target's tokens"
        )
    if draft.layout.mesh != target.layout.mesh:
        raise ConfigError(
            f"draft: got a model on {draft.layout.describe()}, expected the target's devices, {target.layout.describe()}; open both with one mesh"
        )
    if guesses < 1:
        raise ConfigError(f"guesses: got {guesses}, expected at least 1 token a round")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def play(pair: Pair, weights: Any, state: State, seed: Any, numbers_B: Any, limit: Any) -> tuple[State, Round]:
    """One round of all rows; those that have written `limit` tokens stay as they are."""
    live_B = state.written_B < limit
    before_B = state.target.length_B

    def guess(carry: tuple[Cache, jax.Array], step: Any) -> Any:
        cache, token_B = carry
        logits_BTV, cache = extend(pair.draft, weights[1], cache, token_B[:, None], live_B.astype(jnp.int32))
        logits_BV = logits_BTV[:, 0]
        keys_B = row_keys(seed, numbers_B, state.written_B + step)
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, GUESS))(keys_B)
        return (cache, draw(keys_B, logits_BV, pair.sampling)), (token_B, _likes(logits_BV, pair.sampling))

    steps = jnp.arange(pair.guesses + 1)  # the last one only to bring the last guess into the cache
    (draft, _), (fed_TB, q_TBV) = jax.lax.scan(guess, (state.draft, state.last_B), steps)
    fed_BT, q_BTV = fed_TB.T, jnp.swapaxes(q_TBV, 0, 1)[:, :-1]
    counts_B = jnp.where(live_B, pair.guesses + 1, 0)
    logits_BTV, target = extend(pair.target, weights[0], state.target, fed_BT, counts_B)
    p_BTV, guessed_BT = _likes(logits_BTV, pair.sampling), fed_BT[:, 1:]
    kept_B, next_B = judge(row_keys(seed, numbers_B, state.written_B), p_BTV, q_BTV, guessed_BT)
    place_T = jnp.arange(pair.guesses + 1)
    tokens_BT = jnp.pad(guessed_BT, [(0, 0), (0, 1)])
    tokens_BT = jnp.where(place_T == kept_B[:, None], next_B[:, None], tokens_BT)
    logprobs_BT = jax.vmap(logprob_of, in_axes=1, out_axes=1)(logits_BTV, tokens_BT)
    count_B = jnp.where(live_B, kept_B + 1, 0)
    now_B = before_B + count_B
    last_B = jnp.where(live_B, next_B, state.last_B)
    after = State(target.taken_back(now_B), draft.taken_back(now_B), last_B, state.written_B + count_B)
    return after, Round(tokens_BT, logprobs_BT, count_B)


def _likes(logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    return jax.nn.softmax(filtered(logits_V, sampling), axis=-1)
