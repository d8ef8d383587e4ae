"""Tasks by likelihood: multiple choice, and endings that a model should say by itself.

A line of a JSON-lines file is {"query", "choices", "gold"} or {"context", "continuation"}. Scores are those of the Evaluation Harness
(https://github.com/EleutherAI/lm-evaluation-harness), so that numbers can be compared: `acc` takes the choice with the largest log-likelihood, `acc_norm` that
with the largest per character, `acc_bytes` per byte, `acc_tokens` per token.

Where context and ending meet, spaces at the end of the context go to the ending, both are encoded together, and the ids behind the context's own number of
ids are the ending's: words keep the space before them. A row that is too long loses ids on its left, and the result says how many rows did.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.errors import DataError
from lmeff.data.tokenizer import Tokenizer
from lmeff.evals.perplexity import opening
from lmeff.evals.score import Row, Scorer
from lmeff.report.statistics import bootstrap_mean, paired_difference


class Item(NamedTuple):
    """A question. where: its file and line. endings: what may follow the context, without the delimiter; gold: the right one, None for a continuation."""

    where: str
    context: str
    endings: tuple[str, ...]
    gold: int | None


class Pair(NamedTuple):
    """Ids of a context, at least one, and of the ending whose likelihood is asked for."""

    context: np.ndarray
    ending: np.ndarray


class Likelihood(NamedTuple):
    """nats: of the whole ending. greedy: whether each of its tokens is the model's first choice. cut: whether the context lost ids."""

    nats: float
    greedy: bool
    tokens: int
    cut: bool


class Metric(NamedTuple):
    """Sums by item, [items]: the metric is sum(values) / sum(weights)."""

    values: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """metrics by name. nats: of every ending, item by item. truncated: rows, of `rows`, whose context was cut. digest: of the items."""

    metrics: dict[str, Metric]
    nats: tuple[np.ndarray, ...]
    rows: int
    truncated: int
    digest: str

    def summary(self, *, samples: int = 2000) -> dict[str, Any]:
        """Each metric with its 95% interval over items (null for a single one), as a JSON-able object."""
        found: dict[str, Any] = {"items": len(self.nats), "rows": self.rows, "truncated": self.truncated}
        for name, metric in self.metrics.items():
            mean, low, high = bootstrap_mean(*metric, samples=samples)
            found[name] = {"value": mean, "interval": None if math.isnan(low) else [low, high]}
        return found


def read_items(file: Path) -> list[Item]:
    """The items of a JSON-lines file, all of one kind; blank lines are passed over. Raises `DataError` naming file and line."""
    items = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            items = [_item(f"{file}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}), expected a file of JSON lines in UTF-8") from error
    if not items:
        raise DataError(f"{file}: holds no item, expected a JSON object a line")
    for item in items:
        if (item.gold is None) != (items[0].gold is None):
            raise DataError(
                f"{item.where}: is of another kind than {items[0].where}, expected multiple choice or continuations alone; part them into two files"
            )
    return items


def _item(where: str, line: str) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: got {line[:60]!r}, which is no JSON ({error}); expected one JSON object a line"
        ) from error
    if isinstance(row, dict) and {"query", "choices", "gold"} <= row.keys():
        return _choice(where, row)
    if isinstance(row, dict) and {"context", "continuation"} <= row.keys():
        texts = _texts(where, "context and continuation", [row["context"], row["continuation"]])
        if not texts[1]:
            raise DataError(f"{where}: continuation is empty, expected a text to score")
        return Item(where, texts[0], (texts[1],), None)
    got = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a JSON {type(row).__name__}"
    raise DataError(
        f"{where}: got {got}, expected an object with query, choices and gold, or with context and continuation"
    )


def _choice(where: str, row: dict[str, Any]) -> Item:
    choices, gold = row["choices"], row["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: choices is {choices!r:.60}, expected a list of two texts or more")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise DataError(
            f"{where}: gold is {gold!r:.60}, expected the index of the right choice, 0 to {len(choices) - 1}"
        )
    texts = _texts(where, "query and choices", [row["query"], *choices])
    if not all(texts[1:]):
        raise DataError(f"{where}: a choice is empty, expected texts to score")
    return Item(where, texts[0], tuple(texts[1:]), gold)


def _texts(where: str, names: str, values: list[Any]) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{where}: {names} hold {value!r:.60}, expected texts")
    return values


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Ids of (context, ending), split as the module says, behind the tokenizer's `prefix`; where both that and the context are empty, behind its `bos`."""
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + ending) for context, ending in pairs]
    contexts = tokenizer.encode_batch([context for context, _ in moved])
    wholes = tokenizer.encode_batch([context + ending for context, ending in moved])
    found = []
    for context, whole in zip(contexts, wholes, strict=True):
        start = tokenizer.prefix if len(context) else opening(tokenizer)
        found.append(Pair(np.concatenate([start, context]).astype(np.int32), whole[len(context) :]))
    return found


def likelihoods(scorer: Scorer, pairs: Sequence[Pair], where: Sequence[str]) -> list[Likelihood]:
    """Of each pair's ending. Raises `DataError` at the place `where` names for an ending that has no ids or is longer than a row."""
    for pair, place in zip(pairs, where, strict=True):
        if not 0 < len(pair.ending) <= scorer.longest:
            raise DataError(
                f"{place}: the ending has {len(pair.ending)} tokens, expected 1 to {scorer.longest}, the longest row; where it has none, the tokenizer joins "
                "it to the context: begin it with a space"
            )
    most = scorer.longest + 1
    scores = scorer([Row(np.concatenate(pair)[-most:], len(pair.ending)) for pair in pairs])
    return [
        Likelihood(float(s.nats.sum()), bool(s.greedy.all()), len(p.ending), len(p.context) + len(p.ending) > most)
        for s, p in zip(scores, pairs, strict=True)
    ]


def run_task(scorer: Scorer, tokenizer: Tokenizer, items: Sequence[Item], *, delimiter: str = " ") -> TaskResult:
    """Scores every ending of every item. delimiter: between a query and its choices; continuations stand as they are."""
    told = [(item, ending) for item in items for ending in item.endings]
    pairs = [(item.context, ending if item.gold is None else delimiter + ending) for item, ending in told]
    found = likelihoods(scorer, encode_pairs(tokenizer, pairs), [item.where for item, _ in told])
    groups = list(_grouped(items, found))
    measure = _continuations if items[0].gold is None else _choices
    return TaskResult(
        metrics=measure(items, groups),
        nats=tuple(np.array([one.nats for one in group]) for group in groups),
        rows=len(found),
        truncated=sum(one.cut for one in found),
        digest=_digest(items),
    )


def _grouped(items: Sequence[Item], found: Sequence[Likelihood]) -> Iterator[list[Likelihood]]:
    at = 0
    for item in items:
        yield list(found[at : at + len(item.endings)])
        at += len(item.endings)


def _choices(items: Sequence[Item], groups: Sequence[list[Likelihood]]) -> dict[str, Metric]:
    right: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": [], "acc_tokens": []}
    for item, group in zip(items, groups, strict=True):
        nats = np.array([one.nats for one in group])
        lengths = {
            "acc": np.ones(len(group)),
            "acc_norm": np.array([len(ending) for ending in item.endings]),
            "acc_bytes": np.array([len(ending.encode()) for ending in item.endings]),
            "acc_tokens": np.array([one.tokens for one in group]),
        }
        for name, length in lengths.items():
            right[name].append(float(np.argmin(nats / length) == item.gold))
    return {name: _mean(values) for name, values in right.items()}


def _continuations(items: Sequence[Item], groups: Sequence[list[Likelihood]]) -> dict[str, Metric]:
    nats = np.array([one.nats for (one,) in groups])
    tokens = np.array([one.tokens for (one,) in groups], np.float64)
    return {
        "acc": _mean([float(one.greedy) for (one,) in groups]),
        "nats": _mean(nats),
        "nats_per_token": Metric(nats, tokens),
    }


def _mean(values: Any) -> Metric:
    return Metric(np.asarray(values, np.float64), np.ones(len(values)))


def _digest(items: Sequence[Item]) -> str:
    told = json.dumps([(item.context, item.endings, item.gold) for item in items])
    return hashlib.sha256(told.encode()).hexdigest()


def compare(found: TaskResult, baseline: TaskResult, *, samples: int = 2000) -> dict[str, tuple[float, float, float]]:
    """How much more each metric is than a baseline's on the same items, as `(difference, low, high)`: a paired bootstrap over items.

    Metrics per token are left out: they need a common tokenizer. Raises `DataError` where the items differ.
    """
    if found.digest != baseline.digest:
        raise DataError("comparing two models on a task: got different items, expected the same file for both")
    return {
        name: paired_difference(metric, baseline.metrics[name], samples=samples)
        for name, metric in found.metrics.items()
        if (metric.weights == 1).all() and name != "nats_per_token"
    }
