"""Commands that train: a whole recipe, or one stage of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from lmeff.config.overrides import resolve
from lmeff.core.errors import UsageError
from lmeff.launch import Machine
from lmeff.recipe.run import run

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Runs a recipe: every stage, then every artifact measured on the same held-out text, then the report.

    Stages that are done are read back, so the same command goes on where it was stopped. Settings of the config are overridden by their path:
    --mesh.tensor 2 --optim.learning-rate 3e-4 --recipe.teacher.steps 50; `lmeff run CONFIG --help` lists them.

    Attributes:
        config: a Python file whose experiment() returns the config.
        machine: what it runs on.
        resume: go on with the run in its folder; --no-resume refuses where there is one.
        json: print one JSON object on stdout and logs on stderr.
    """

    config: tyro.conf.Positional[Path]
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009 -- frozen
    resume: bool = True
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains one stage of a recipe, and before it the stages that it reads where they are not done.

    Attributes:
        config: a Python file whose experiment() returns the config.
        stage: the stage's name; the only one may be left out.
        machine: what it runs on.
        resume: go on with the run in its folder; --no-resume refuses where there is one.
        json: print one JSON object on stdout and logs on stderr.
    """

    config: tyro.conf.Positional[Path]
    stage: str | None = None
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009 -- frozen
    resume: bool = True
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def run_recipe(command: Run, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff run`."""
    experiment, sources = resolve(command.config, overrides, prog="lmeff run")
    return run(experiment, sources=sources, resume=command.resume, console=console).to_json()


def train_stage(command: Train, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff train`."""
    experiment, sources = resolve(command.config, overrides, prog="lmeff run")
    if command.stage is None and len(experiment.recipe) > 1:
        raise UsageError(
            f"train: the recipe has several stages; expected --stage, one of {[s.name for s in experiment.recipe]}"
        )
    stage = experiment.stage(command.stage or next(iter(experiment.recipe)).name)
    return run(experiment, sources=sources, only=stage.name, resume=command.resume, console=console).to_json()
