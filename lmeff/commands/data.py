"""The command that makes a run's tokens and stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from lmeff.config.overrides import resolve
from lmeff.recipe.run import make_data

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Makes the tokens of a run and stops: on a cheap machine, before chips that are billed would wait for them.

    `lmeff run` and `lmeff train` with the same settings read them back. It goes by the devices that the config's mesh asks for and needs none of them.

    Attributes:
        config: a Python file whose experiment() returns the config.
        json: print one JSON object on stdout and logs on stderr.
    """

    config: tyro.conf.Positional[Path]
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def build_data(command: Data, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff data`."""
    experiment, _ = resolve(command.config, overrides, prog="lmeff run")
    directory, corpus = make_data(experiment, experiment.mesh.devices)
    console.print(f"data: {corpus.describe()}", highlight=False, soft_wrap=True)
    console.print(f"tokens: {directory}", highlight=False, soft_wrap=True)
    splits = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    return {"directory": str(directory), "digest": corpus.digest, "tokens": {n: s.tokens for n, s in splits.items()}}
