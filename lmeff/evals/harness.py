"""A model of lmeff as the LM Evaluation Harness takes it (https://github.com/EleutherAI/lm-evaluation-harness); needs the extra `eval`.

Importing this module registers the class as "lmeff"; `evaluate` hands an instance over, so that nothing need be found by name. The harness asks for
likelihoods of texts; ids, windows and scores are those of `evals.tasks` and `evals.perplexity`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lmeff.core.errors import ConfigError
from lmeff.core.extras import require
from lmeff.data.tokenizer import Tokenizer
from lmeff.evals.perplexity import opening, windows
from lmeff.evals.score import Row, Scorer
from lmeff.evals.tasks import encode_pairs, likelihoods
from lmeff.infer.generate import generate
from lmeff.infer.sampling import GREEDY, Sampling
from lmeff.models.cache import CacheFormat

require("lm_eval", extra="eval")  # before it is imported by name: it may be absent

from lm_eval import evaluator  # pyright: ignore[reportMissingImports]  # noqa: E402
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]  # noqa: E402
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]  # noqa: E402


class HarnessModel(LM):
    """Answers what the harness asks of a model; one process and its mesh answer all requests.

    cache: in which numbers keys and values are kept while text is generated; None keeps them as arithmetic has them, in float32 or bfloat16.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        cache: CacheFormat | None = None,
    ) -> None:
        super().__init__()
        self.scorer, self.tokens = scorer, tokenizer
        wide = scorer.served.policy.compute == jnp.float32
        self.cache = cache or CacheFormat(numbers="float32" if wide else "bfloat16")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-likelihood, and whether it is the greedy answer."""
        asked = [request.args for request in requests]
        found = likelihoods(self.scorer, encode_pairs(self.tokens, asked), _places(asked))
        return [self._told("loglikelihood", a, (-one.nats, one.greedy)) for a, one in zip(asked, found, strict=True)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-likelihood of each text, in windows of the longest row that do not overlap but for the last, as the harness defines it."""
        asked = [request.args for request in requests]
        rows, owners, start = [], [], opening(self.tokens)
        for i, body in enumerate(self.tokens.encode_batch([text for (text,) in asked])):
            ids = np.concatenate([start, body]).astype(np.int32)
            for first, last, scored in windows(len(ids), self.scorer.longest, self.scorer.longest, len(start)):
                rows.append(Row(ids[first:last], scored))
                owners.append(i)
        nats = np.zeros(len(asked))
        np.add.at(nats, owners, [scores.nats.sum() for scores in self.scorer(rows)])
        return [self._told("loglikelihood_rolling", a, -float(n)) for a, n in zip(asked, nats, strict=True)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text after each context, up to its first stop string, its end or so many tokens. Contexts that leave no room lose ids on their left."""
        answers: dict[int, str] = {}
        asked = [request.args for request in requests]
        groups: dict[Wish, list[int]] = {}
        for i, (_, options) in enumerate(asked):
            groups.setdefault(read_options(options), []).append(i)
        for wish, group in groups.items():
            for i, text in zip(group, self._written(wish, [asked[i][0] for i in group]), strict=True):
                answers[i] = self._told("generate_until", asked[i], text)
        return [answers[i] for i in range(len(asked))]

    def _written(self, wish: "Wish", contexts: Sequence[str]) -> list[str]:
        room = self.scorer.longest - wish.tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks: got {wish.tokens}, expected less than the longest row of this model, {self.scorer.longest}"
            )
        prompts = []
        for body in self.tokens.encode_batch(list(contexts)):
            start = self.tokens.prefix if len(body) else opening(self.tokens)
            prompts.append(np.concatenate([start, body]).astype(np.int32)[-room:])
        found = generate(
            self.scorer.served,
            prompts,
            max_tokens=wish.tokens,
            sampling=wish.sampling,
            cache=self.cache,
            stop_ids=self.tokens.stops,
            stop_texts=wish.until,
            decoder=self.tokens.decode,
            batch=self.scorer.rows,
        )
        return [one.text or "" for one in found]

    def _told(self, kind: str, asked: Any, answer: Any) -> Any:
        """Offers an answer to the harness's cache."""
        self.cache_hook.add_partial(kind, asked, answer)
        return answer


register_model("lmeff")(HarnessModel)


class Wish(NamedTuple):
    """How a task wants text generated: stop strings, how tokens are drawn, how many at most."""

    until: tuple[str, ...]
    sampling: Sampling
    tokens: int


def read_options(options: dict[str, Any]) -> Wish:
    """A task's `generation_kwargs`. Tokens are drawn where it says `do_sample`, or gives a temperature above 0 and does not say.

    Raises `ConfigError` for an option that would be ignored.
    """
    known = {"until", "max_gen_toks", "do_sample", *DRAWN}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(f"generation_kwargs: got {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
    until = options.get("until") or []
    drawn = {name: options[name] for name in DRAWN if options.get(name) is not None}
    draws = options.get("do_sample")
    if draws is None:
        draws = drawn.get("temperature", 0) > 0
    return Wish(
        until=(until,) if isinstance(until, str) else tuple(until),
        sampling=Sampling(**drawn) if draws else GREEDY,
        tokens=int(options.get("max_gen_toks", MAX_TOKENS)),
    )


MAX_TOKENS = 256  # of a task that says nothing, as in the harness's own models
DRAWN = ("temperature", "top_k", "top_p", "min_p", "seed")  # the fields of `Sampling`


def _places(asked: Sequence[tuple[str, str]]) -> list[str]:
    return [f"request {i} ({ending!r:.40})" for i, (_, ending) in enumerate(asked)]


def evaluate(scorer: Scorer, tokenizer: Tokenizer, tasks: list[Any], **options: Any) -> Any:
    """`lm_eval.simple_evaluate` of these tasks (names, or their configs as dicts); `options` are its own, such as `limit` and `num_fewshot`."""
    return evaluator.simple_evaluate(model=HarnessModel(scorer, tokenizer), tasks=tasks, **options)
