"""Text from a model: prompts in, completions out.

Rows step together. A step's program draws the next tokens, and the host reads them while the next step is already under way: what a row writes after its
end is thrown away.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.infer.engine import Engine, Program, check_prompts, decode, length_for, make_engine, rows_for
from lmeff.infer.rows import Completion, OnToken, Row, Stops, fresh_rows
from lmeff.infer.sampling import Sampling, draw, logprob_of, row_keys
from lmeff.infer.served import Served
from lmeff.models.cache import Cache, CacheFormat


def generate(
    served: Served,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling,
    cache: CacheFormat,
    stop_ids: Collection[int] = (),
    stop_texts: Sequence[str] = (),
    decoder: Callable[[Sequence[int]], str] | None = None,
    on_token: OnToken | None = None,
    batch: int | None = None,
) -> list[Completion]:
    """Continues prompts of any lengths by up to `max_tokens` tokens each.

    decoder: ids to text, such as `tokenizer.decode`; needed for `stop_texts`.
    batch:   rows at once; None takes all. A row's tokens do not depend on it.
    Raises `UsageError` for prompts that are empty or hold no tokens of the model, `ConfigError` where the model has too few positions.
    """
    check_prompts(served.cfg, prompts, max_tokens)
    stops = Stops(frozenset(stop_ids), tuple(stop_texts), decoder)
    rows = fresh_rows(len(prompts), max_tokens, stops, on_token)
    if not prompts:
        return []
    size = rows_for(served.layout, min(batch or len(prompts), len(prompts)))
    length = length_for(served.cfg, max(map(len, prompts)) + max_tokens)
    engine = make_engine(served, batch=size, length=length, cache=cache)
    for first in range(0, len(prompts), size):
        _continue(engine, prompts[first : first + size], rows[first : first + size], sampling)
    return [row.completion() for row in rows]


def prompt_batch(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded on the right, [rows, T], and their lengths; rows beyond them have no tokens."""
    lengths_B = np.zeros(rows, np.int32)
    lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens_BT = np.zeros((rows, lengths_B.max()), np.int32)
    for own, prompt in zip(tokens_BT, prompts, strict=False):
        own[: len(prompt)] = prompt
    return tokens_BT, lengths_B


def _continue(engine: Engine, prompts: Sequence[np.ndarray], rows: Sequence[Row], sampling: Sampling) -> None:
    """One batch to its end."""
    numbers_B = rows[0].index + np.arange(engine.batch, dtype=np.int32)
    how, seed = dataclasses.replace(sampling, seed=0), np.uint32(sampling.seed % 2**32)
    logits_BV, cache = engine.prefill(*prompt_batch(prompts, engine.batch))
    drawn = first_tokens(how, logits_BV, seed, numbers_B)
    for step in range(1, rows[0].limit + 1):
        ahead = None
        if step < rows[0].limit:
            seeds = (seed, numbers_B, np.int32(step))
            *ahead, cache = next_tokens(engine.program, how, engine.weights, cache, drawn[0], *seeds)
        for row, token, logprob in zip(rows, *jax.device_get(drawn), strict=False):
            row.take(int(token), float(logprob))
        if ahead is None or all(row.reason for row in rows):
            return
        drawn = ahead


@functools.partial(jax.jit, static_argnums=0)
def first_tokens(sampling: Sampling, logits_BV: jax.Array, seed: Any, numbers_B: Any) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] after a prompt, and their log-probabilities."""
    return _drawn(sampling, logits_BV, seed, numbers_B, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def next_tokens(
    program: Program,
    sampling: Sampling,
    weights: Any,
    cache: Cache,
    tokens_B: jax.Array,
    seed: Any,
    numbers_B: Any,
    step: Any,
) -> tuple[jax.Array, jax.Array, Cache]:
    """The tokens after these, their log-probabilities, and the cache."""
    logits_BV, cache = decode(program, weights, cache, tokens_B)
    return *_drawn(sampling, logits_BV, seed, numbers_B, step), cache


def _drawn(sampling: Sampling, logits_BV: jax.Array, seed: Any, numbers_B: Any, step: Any) -> tuple[Any, Any]:
    keys_B = row_keys(seed, numbers_B, jnp.full_like(numbers_B, step))
    tokens_B = draw(keys_B, logits_BV, sampling)
    return tokens_B, logprob_of(logits_BV, tokens_B)
