"""The command that writes text."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from lmeff.commands.words import need_tokenizer, refuse_unknown
from lmeff.core.errors import DataError, UsageError
from lmeff.data.tokenizer import Tokenizer, continuing
from lmeff.data.tokenizer import prompt as prompt_ids
from lmeff.infer.generate import generate
from lmeff.infer.rows import Completion
from lmeff.infer.sampling import Sampling
from lmeff.infer.served import Served
from lmeff.infer.speculative import generate_ahead
from lmeff.launch import Machine
from lmeff.models.cache import CacheFormat, parse_cache
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.processes import leads
from lmeff.recipe.open import open_model

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continues prompts. What is written is alone on stdout, everything else on stderr.

    A prompt is plain text: templates of chats are not applied, and what spells a special token in it is text.

    Attributes:
        path: the folder of a run, a model folder that `lmeff import` made, or a Hugging Face folder.
        artifact: of a run, by name; the last that is done where none is named.
        prompt: the text to continue.
        prompts: a file with a prompt on every line; without it and --prompt they are read from stdin.
        max_tokens: the most that are written after a prompt; a token of the model's that ends a text may end it before.
        temperature: 0 takes the likeliest token each time.
        top_k: draw from the likeliest tokens only, so many.
        top_p: draw from the likeliest tokens only that together have this probability.
        min_p: draw only from tokens at least this part as likely as the likeliest.
        seed: of what is drawn.
        stop: end before this text; may be given several times.
        cache: numbers of the cache of keys and values: float32, bfloat16, int8 or int4; those that the model computes in where none are named.
        keys: what shares a scale of an integer cache's keys: token, or channel.
        weights: quantize the blocks' matrices on opening, such as int8 or int4/g32.
        precision: dtypes by role, such as compute=bfloat16; the run's own, or float32 on CPUs and elsewhere what is stored.
        draft: a smaller model of the same vocabulary that writes ahead; the text is distributed as without it.
        guesses: tokens that the draft writes ahead.
        batch: prompts that are continued at a time; all where none is given.
        logprobs: tell the log-probability of every token.
        stream: write text while it comes, for a single prompt.
        mesh: how many devices cut what.
        machine: what it runs on.
        json: print one JSON object on stdout.
    """

    path: tyro.conf.Positional[Path]
    artifact: str | None = None
    prompt: str | None = None
    prompts: Path | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    cache: str | None = None
    keys: str | None = None
    weights: str | None = None
    precision: str | None = None
    draft: Path | None = None
    guesses: int = 4
    batch: int | None = None
    logprobs: tyro.conf.FlagCreatePairsOff[bool] = False
    stream: bool = True
    mesh: MeshPlan = MeshPlan()  # noqa: RUF009 -- frozen
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def write_text(command: Generate, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff generate`."""
    refuse_unknown(overrides, "generate")
    check(command)
    sampling = Sampling(
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        min_p=command.min_p,
        seed=command.seed,
    )
    format = None if command.cache is None else cache_format(command.cache, command.keys)
    texts = read_prompts(command)
    told = Console(stderr=True, quiet=console.quiet)
    opened = open_model(
        command.path,
        artifact=command.artifact,
        mesh=command.mesh,
        precision=command.precision,
        weights=command.weights,
    )
    tokenizer = need_tokenizer(opened, command.path)
    draft = None if command.draft is None else open_model(command.draft, mesh=command.mesh).served
    told.print(f"model: {opened.source}", highlight=False, soft_wrap=True)
    streams = command.stream and len(texts) == 1 and not command.json and leads()
    done, guessed = complete(command, opened.served, draft, tokenizer, texts, sampling, format, streams)
    if leads() and not command.json:
        print_texts(done, streams=streams)
    if command.logprobs:
        print_logprobs(done, tokenizer, told)
    ends = ", ".join(f"{len(one.ids)} tokens ({one.reason})" for one in done[:8])
    told.print(f"written: {ends}{', ...' if len(done) > 8 else ''}", highlight=False)
    return {
        "model": opened.source,
        "completions": [completion_json(text, one, command.logprobs) for text, one in zip(texts, done, strict=True)],
        **guessed,
    }


def check(command: Generate) -> None:
    """Refuses options that say nothing or contradict each other."""
    if command.prompt is not None and command.prompts is not None:
        raise UsageError("generate: got --prompt and --prompts, expected one of the two")
    for name in ("max_tokens", "guesses", "batch"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    if "" in command.stop:
        raise UsageError("--stop: got an empty text, expected at least one character: every text contains it")
    if command.keys is not None and command.cache is None:
        raise UsageError(f"--keys: got '{command.keys}' without --cache, expected --cache int8 or int4 beside it")


def cache_format(numbers: str, keys: str | None) -> CacheFormat:
    """The format that --cache and --keys name."""
    format = parse_cache(numbers)
    return format if keys is None else CacheFormat(numbers=format.numbers, keys=keys)


def read_prompts(command: Generate) -> list[str]:
    """The prompts, of which there is at least one."""
    if command.prompt is not None:
        return [command.prompt]
    if command.prompts is None:
        if sys.stdin.isatty():
            raise UsageError("generate: got no prompt, expected --prompt, --prompts or text on stdin")
        found, where = sys.stdin.read().splitlines(), "stdin"
    else:
        where = str(command.prompts)
        try:
            found = command.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--prompts: {where} cannot be read ({error}), expected a text with a prompt on every line"
            ) from error
    found = [line for line in found if line]
    if not found:
        raise DataError(f"prompts: {where} holds none, expected a prompt on every line")
    return found


def complete(
    command: Generate,
    served: Served,
    draft: Served | None,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    sampling: Sampling,
    format: CacheFormat | None,
    streams: bool,
) -> tuple[list[Completion], Json]:
    """What is written after each prompt, and how well the draft guessed, where there is one."""
    if format is None:
        format = CacheFormat(numbers="float32" if served.policy.compute == jnp.float32 else "bfloat16")
    options: dict[str, Any] = {
        "max_tokens": command.max_tokens,
        "sampling": sampling,
        "cache": format,
        "stop_ids": tokenizer.stops,
        "stop_texts": command.stop,
        "decoder": continuing(tokenizer) if any(texts) else tokenizer.decode,
        "on_token": (lambda row, token, text: give_out(text)) if streams else None,
        "batch": command.batch,
    }
    prompts: list[np.ndarray] = [prompt_ids(tokenizer, text) for text in texts]
    if draft is None:
        return generate(served, prompts, **options), {}
    found = generate_ahead(served, draft, prompts, guesses=command.guesses, **options)
    return found.completions, {"draft": {"offered": found.offered, "accepted": found.accepted, "rate": found.rate}}


def give_out(text: str) -> None:
    """Text as soon as it is there."""
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def print_texts(done: Sequence[Completion], *, streams: bool) -> None:
    """Every completion, a line break after each; what was streamed needs only that."""
    for one in done:
        give_out("\n" if streams else f"{one.text}\n")


def print_logprobs(done: Sequence[Completion], tokenizer: Tokenizer, told: Console) -> None:
    """A line for every token."""
    text_of = continuing(tokenizer)
    for one in done:
        for i, logprob in zip(one.ids.tolist(), one.logprobs.tolist(), strict=True):
            told.print(f"{logprob:9.4f}  {i:6}  {text_of([i])!r}", highlight=False, markup=False)


def completion_json(text: str, one: Completion, logprobs: bool) -> Json:
    """A completion as a JSON-able object."""
    found: Json = {"prompt": text, "text": one.text, "ids": one.ids.tolist(), "reason": one.reason}
    return found | ({"logprobs": [round(x, 6) for x in one.logprobs.tolist()]} if logprobs else {})
