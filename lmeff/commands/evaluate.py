"""Commands that measure models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from lmeff.config.files import read
from lmeff.config.overrides import override
from lmeff.launch import Machine
from lmeff.recipe.evaluate import evaluate

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measures artifacts of a run: loss on its held-out text, with the interval over documents.

    Attributes:
        run: the folder of a run.
        artifact: names of artifacts; all that are done where none is named.
        text: files or folders of other text to measure on, read with the run's tokenizer.
        machine: what it runs on.
        json: print one JSON object on stdout and logs on stderr.
    """

    run: tyro.conf.Positional[Path]
    artifact: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def evaluate_models(command: Eval, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff eval`."""
    experiment = override(read(command.run), overrides, prog="lmeff eval RUN")
    return evaluate(experiment, command.run, names=command.artifact, text=command.text, console=console)
