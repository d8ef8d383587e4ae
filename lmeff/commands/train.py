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
from lmeff.train.profile import Window, parse

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
        profile: trace these steps of each stage that trains, as 10:13 or 10, for xprof and perfetto.
        json: print one JSON object on stdout and logs on stderr.
    """

    config: tyro.conf.Positional[Path]
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009 -- frozen
    resume: bool = True
    profile: str | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains one stage of a recipe, and before it the stages that it reads where they are not done.

    Attributes:
        config: a Python file whose experiment() returns the config.
        stage: the stage's name; the only one may be left out.
        machine: what it runs on.
        resume: go on with the run in its folder; --no-resume refuses where there is one.
        profile: trace these steps of each stage that trains, as 10:13 or 10, for xprof and perfetto.
        json: print one JSON object on stdout and logs on stderr.
    """

    config: tyro.conf.Positional[Path]
    stage: str | None = None
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009 -- frozen
    resume: bool = True
    profile: str | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def _window(command: Run | Train) -> Window | None:
    return None if command.profile is None else parse(command.profile)


def run_recipe(command: Run, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff run`."""
    window = _window(command)
    experiment, sources = resolve(command.config, overrides, prog="lmeff run")
    return run(experiment, sources=sources, resume=command.resume, profile=window, console=console).to_json()


def train_stage(command: Train, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff train`."""
    window = _window(command)
    experiment, sources = resolve(command.config, overrides, prog="lmeff run")
    if command.stage is None and len(experiment.recipe) > 1:
        raise UsageError(
            f"train: the recipe has several stages; expected --stage, one of {[s.name for s in experiment.recipe]}"
        )
    stage = experiment.stage(command.stage or next(iter(experiment.recipe)).name)
    report = run(experiment, sources=sources, only=stage.name, resume=command.resume, profile=window, console=console)
    return report.to_json()
