"""Text from a model: prompts in, completions out.

Rows step together. A step's program draws the next tokens and the host reads them while the next step is already under way, so what a row writes after its
end, a token or so, is thrown away.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.errors import UsageError
from lmeff.infer.engine import Engine, Program, check_prompts, decode, make_engine, rows_for
from lmeff.infer.sampling import Sampling, draw, logprob_of, row_keys
from lmeff.infer.served import Served
from lmeff.infer.stream import TextStream
from lmeff.models.cache import Cache, CacheFormat

OnToken = Callable[[int, int, str], Any]
"""`on_token(row, id, text)`: called for each new token of a row, in order; `text` is what it adds, "" without a decoder or while text is held back."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written after a prompt.

    ids:      int32 [N], the new tokens; the one that stopped the row is the last of them.
    logprobs: float32 [N], of each under the model itself, before temperature and filters.
    reason:   why the row ended: "stop_id", "stop_text" or "length".
    text:     with a decoder, of the new tokens, up to a stop string and without stop ids; else None.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    reason: str
    text: str | None = None


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
    if stop_texts and decoder is None:
        raise UsageError(
            "stop_texts: got strings without a decoder, expected decoder=tokenizer.decode: they are looked for in text"
        )
    if not prompts:
        return []
    rows = rows_for(served.layout, min(batch or len(prompts), len(prompts)))
    length = max(map(len, prompts)) + max_tokens
    engine = make_engine(served, batch=rows, length=length, cache=cache)
    written = [Row(i, max_tokens, stop_ids, stop_texts, decoder, on_token) for i in range(len(prompts))]
    for first in range(0, len(prompts), rows):
        _continue(engine, prompts[first : first + rows], written[first : first + rows], sampling)
    return [row.completion() for row in written]


def _continue(engine: Engine, prompts: Sequence[np.ndarray], rows: "Sequence[Row]", sampling: Sampling) -> None:
    """One batch to its end; rows that are not there have no tokens."""
    lengths = np.zeros(engine.batch, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens_BT = np.zeros((engine.batch, lengths.max()), np.int32)
    for own, prompt in zip(tokens_BT, prompts, strict=False):
        own[: len(prompt)] = prompt
    first = rows[0].index
    numbers_B = np.arange(first, first + engine.batch, dtype=np.int32)
    how, seed = dataclasses.replace(sampling, seed=0), np.uint32(sampling.seed % 2**32)
    weights = (engine.served.params, engine.served.ranges)
    logits_BV, cache = engine.prefill(tokens_BT, lengths)
    drawn = first_tokens(how, logits_BV, seed, numbers_B)
    for step in range(1, rows[0].limit + 1):
        ahead = None
        if step < rows[0].limit:
            *ahead, cache = next_tokens(engine.program, how, weights, cache, drawn[0], seed, numbers_B, np.int32(step))
        tokens_B, logprobs_B = jax.device_get(drawn)
        for own, row in enumerate(rows):
            row.take(int(tokens_B[own]), float(logprobs_B[own]))
        if ahead is None or all(row.reason for row in rows):
            return
        drawn = ahead


@functools.partial(jax.jit, static_argnums=0)
def first_tokens(sampling: Sampling, logits_BV: jax.Array, seed: Any, numbers_B: Any) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] and their log-probabilities after a prompt."""
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


class Row:
    """What one row has written so far, and whether it has ended."""

    def __init__(
        self,
        index: int,
        limit: int,
        stop_ids: Collection[int],
        stop_texts: Sequence[str],
        decoder: Callable[[Sequence[int]], str] | None,
        on_token: OnToken | None,
    ) -> None:
        self.index, self.limit, self.stop_ids, self.on_token = index, limit, frozenset(stop_ids), on_token
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.reason = ""
        self.stream = None if decoder is None else TextStream(decoder, stop_texts)

    def take(self, token: int, logprob: float) -> None:
        """The next token, unless the row has ended."""
        if self.reason:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        text = ""
        if token in self.stop_ids:
            self.reason = "stop_id"
        elif self.stream is not None:
            text = self.stream.add(token)
            self.reason = "stop_text" if self.stream.stopped else ""
        if not self.reason and len(self.ids) == self.limit:
            self.reason = "length"
        if self.reason and self.stream is not None:
            text += self.stream.finish()
        if self.on_token is not None:
            self.on_token(self.index, token, text)

    def completion(self) -> Completion:
        """All of it."""
        text = None if self.stream is None else self.stream.text
        return Completion(
            ids=np.array(self.ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            reason=self.reason,
            text=text,
        )
