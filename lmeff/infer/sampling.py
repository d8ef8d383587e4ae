"""From logits to the next token: pure functions, row by row.

The order is that of Hugging Face: logits are divided by the temperature, then `top_k`, `top_p` and `min_p` take tokens away, each from what the ones before
have left; what remains is drawn from in proportion to its probabilities.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lmeff.core.errors import ConfigError

NEVER = -1e30  # the logit of a token that is never drawn; finite, so that no difference of two of them is NaN


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    temperature: logits are divided by it; 0 takes the likeliest token, of equally likely ones the first.
    top_k:       only the k likeliest tokens; None keeps all.
    top_p:       only the likeliest tokens that together have at least this probability (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).
    min_p:       only tokens at least this part as likely as the likeliest (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082).
    seed:        a row's tokens depend on it, on the row's number and on the token's, not on what other rows there are.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what no distribution is left of."""
        if self.temperature < 0:
            raise ConfigError(f"sampling.temperature: got {self.temperature}, expected 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"sampling.top_k: got {self.top_k}, expected at least 1, or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p: got {self.top_p}, expected more than 0 and at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"sampling.min_p: got {self.min_p}, expected 0 (all tokens) to 1")


GREEDY = Sampling(temperature=0.0)


def filtered(logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits "...V" of the distribution that is drawn from, `NEVER` where a token is left out."""
    if sampling.temperature == 0:
        first = jnp.argmax(logits_V, axis=-1, keepdims=True) == jnp.arange(logits_V.shape[-1])
        return jnp.where(first, 0.0, NEVER)
    logits_V = logits_V.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None or sampling.top_p < 1:
        logits_V = _likeliest(logits_V, sampling.top_k, sampling.top_p)
    if sampling.min_p > 0:
        near = logits_V - logits_V.max(-1, keepdims=True) >= jnp.log(sampling.min_p)
        logits_V = jnp.where(near, logits_V, NEVER)
    return logits_V


def _likeliest(logits_V: jax.Array, top_k: int | None, top_p: float) -> jax.Array:
    """Without all but the k likeliest tokens, and of those without the ones whose likelier ones have `top_p` already; of equally likely ones the first stay."""
    vocab = logits_V.shape[-1]
    best_K, tokens_K = jax.lax.top_k(logits_V, vocab if top_k is None else min(top_k, vocab))
    likes_K = jax.nn.softmax(best_K, axis=-1)
    kept_K = jnp.where(jnp.cumsum(likes_K, axis=-1) - likes_K < top_p, best_K, NEVER)
    return jnp.put_along_axis(jnp.full_like(logits_V, NEVER), tokens_K, kept_K, axis=-1, inplace=False)


def row_keys(seed: jax.Array, rows_B: jax.Array, steps_B: jax.Array) -> jax.Array:
    """A key for each row's next token, folded from the seed, the row's number and the token's."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row, step: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows_B, steps_B)


def draw(keys_B: jax.Array, logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """A token for each row, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filtered(logits_BV, sampling)).astype(jnp.int32)


def logprob_of(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """The model's own log-probability of these tokens, before temperature and filters, float32 [B]."""
    found = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return found - jax.nn.logsumexp(logits_BV, axis=-1)
