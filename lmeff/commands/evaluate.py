"""The command that measures models: on a run's held-out text, on tasks, and by perplexity on any text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from lmeff.commands.words import mesh_of, need_tokenizer
from lmeff.config.files import read
from lmeff.config.overrides import override
from lmeff.core.errors import DataError, UsageError
from lmeff.data.config import Part
from lmeff.data.prepare import Count
from lmeff.data.prepare import read as read_documents
from lmeff.data.tokenizer import Tokenizer
from lmeff.evals.perplexity import Perplexity, difference, perplexity
from lmeff.evals.score import Scorer, make_scorer
from lmeff.evals.tasks import Item, TaskResult, compare, read_items, run_task
from lmeff.launch import Machine
from lmeff.parallel.mesh import MeshPlan
from lmeff.recipe.evaluate import evaluate
from lmeff.recipe.open import is_model, open_model

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measures a model.

    Without --tasks and --perplexity: artifacts of a run, by their loss on its held-out text (or on --text), with the interval over documents; settings of
    its config are overridden by their path.

    Attributes:
        path: the folder of a run, a model folder that `lmeff import` made, or a Hugging Face folder.
        artifact: names of a run's artifacts; where none is named all that are done, or for tasks and perplexity the last that is done.
        text: files or folders of other text to measure a run's artifacts on, read with the run's tokenizer.
        tasks: files of JSON lines, {"query", "choices", "gold"} or {"context", "continuation"}; scored as the LM Evaluation Harness does.
        perplexity: files of text; each token is scored once, in windows that overlap.
        window: the longest row in tokens; the model's context where none is given.
        stride: tokens from one window to the next; half a window where none is given.
        baseline: another model, to tell differences with their paired intervals.
        weights: quantize the blocks' matrices on opening, such as int8 or int4/g32; not the baseline's.
        precision: dtypes by role, such as compute=bfloat16.
        rows: rows that are scored at a time.
        text_field: the field that holds the text, of .jsonl and .parquet.
        machine: what it runs on.
        json: print one JSON object on stdout.
    """

    path: tyro.conf.Positional[Path]
    artifact: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    tasks: tuple[Path, ...] = ()
    perplexity: tuple[Path, ...] = ()
    window: int | None = None
    stride: int | None = None
    baseline: Path | None = None
    weights: str | None = None
    precision: str | None = None
    rows: int = 16
    text_field: str = "text"
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009 -- frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model with what was found: by file."""

    source: str
    tokenizer: Tokenizer
    tasks: dict[str, TaskResult]
    texts: dict[str, Perplexity]


def evaluate_models(command: Eval, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff eval`."""
    if not (command.tasks or command.perplexity):
        return _held_out(command, overrides, console)
    if command.text:
        raise UsageError(
            "eval: got --text with --tasks or --perplexity, expected text of other runs by --perplexity alone"
        )
    check(command)
    mesh = mesh_of(overrides, "lmeff eval PATH")
    items = {str(file): read_items(file) for file in command.tasks}
    texts = {str(file): documents(file, command.text_field) for file in command.perplexity}
    told = [
        measure(command, command.path, name, mesh, items, texts, weights=command.weights)
        for name in command.artifact or (None,)
    ]
    base = None if command.baseline is None else measure(command, command.baseline, None, mesh, items, texts)
    answers = [answer(one, base) for one in told]
    for one in answers:
        print_answer(one, console)
    return {"models": answers, "baseline": None if base is None else answer(base, None)}


def _held_out(command: Eval, overrides: Sequence[str], console: Console) -> Json:
    for name in ("window", "stride", "baseline", "weights", "precision"):
        if getattr(command, name) is not None:
            raise UsageError(
                f"eval: got --{name} without --tasks and --perplexity, expected one of these: give a file to measure on"
            )
    if is_model(command.path):
        raise UsageError(f"eval: {command.path} has no held-out text of its own, expected --tasks or --perplexity")
    experiment = override(read(command.path), overrides, prog="lmeff eval RUN")
    return evaluate(experiment, command.path, names=command.artifact, text=command.text, console=console)


def check(command: Eval) -> None:
    """Refuses numbers that no window has, before a model is opened."""
    for name in ("window", "stride", "rows"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: got {value}, expected at least 1")
        if name != "rows" and value is not None and not command.perplexity:
            raise UsageError(
                f"--{name}: got {value} without --perplexity, expected a text beside it: tasks have no windows"
            )


def documents(file: Path, text_field: str) -> list[str]:
    """The documents of a file or a folder."""
    found = [
        document.text
        for document in read_documents(Part(name="text", path=(str(file),), text_field=text_field), None, Count())
    ]
    if not found:
        raise DataError(f"--perplexity: {file} holds no text but blanks, expected at least one document")
    return found


def measure(
    command: Eval,
    path: Path,
    artifact: str | None,
    mesh: MeshPlan,
    items: dict[str, list[Item]],
    texts: dict[str, list[str]],
    *,
    weights: str | None = None,
) -> Measured:
    """Opens a model and scores it on everything."""
    opened = open_model(path, artifact=artifact, mesh=mesh, precision=command.precision, weights=weights)
    tokenizer = need_tokenizer(opened, path)
    scorer: Scorer = make_scorer(opened.served, rows=command.rows)
    return Measured(
        source=opened.source,
        tokenizer=tokenizer,
        tasks={name: run_task(scorer, tokenizer, each) for name, each in items.items()},
        texts={
            name: perplexity(scorer, tokenizer, each, window=command.window, stride=command.stride)
            for name, each in texts.items()
        },
    )


def answer(one: Measured, base: Measured | None) -> Json:
    """What was found as a JSON-able object; with a baseline, differences and their intervals."""
    found: Json = {"model": one.source}
    found["tasks"] = {name: result.summary() for name, result in one.tasks.items()}
    found["perplexity"] = {name: result.summary() for name, result in one.texts.items()}
    if base is not None:
        for name, result in one.tasks.items():
            gaps = compare(result, base.tasks[name])
            found["tasks"][name]["against_baseline"] = {metric: list(gap) for metric, gap in gaps.items()}
        for name, result in one.texts.items():
            gap = _gap(result, base.texts[name])
            found["perplexity"][name]["against_baseline"] = gap
    return found


def _gap(found: Perplexity, base: Perplexity) -> list[float] | None:
    """Nats per token more than the baseline, None where tokens differ: then only bits per byte can be compared."""
    alike = found.tokens.shape == base.tokens.shape and bool((found.tokens == base.tokens).all())
    return list(difference(found, base)) if alike else None


def print_answer(one: Json, console: Console) -> None:
    """A line for every metric."""
    console.print(one["model"], style="bold", highlight=False, soft_wrap=True)
    for name, result in one["tasks"].items():
        for metric, value in result.items():
            if isinstance(value, dict) and "value" in value:
                told = _interval(value["value"], value["interval"]) + _against(result, metric)
                console.print(f"  {name}: {metric} {told}", highlight=False, soft_wrap=True)
        console.print(
            f"  {name}: {result['items']} items, {result['truncated']} of {result['rows']} rows cut", highlight=False
        )
    for name, result in one["perplexity"].items():
        nats = _interval(result["nats_per_token"], result["nats_per_token_interval"])
        gap = result.get("against_baseline")
        told = "" if gap is None else f"; against the baseline {gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]"
        console.print(
            f"  {name}: {nats} nats/token (perplexity {result['perplexity']:.3f}), {result['bits_per_byte']:.4f} bits/byte over {result['tokens']:,} tokens, "
            f"window {result['window']}, stride {result['stride']}{told}",
            highlight=False,
            soft_wrap=True,
        )


def _interval(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.4f}" + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")


def _against(result: Json, metric: str) -> str:
    gap = result.get("against_baseline", {}).get(metric)
    return "" if gap is None else f"; against the baseline {gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]"
