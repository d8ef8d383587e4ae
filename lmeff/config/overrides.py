"""Typed overrides on the command line: `--mesh.tensor 2 --optim.learning-rate 3e-4 --recipe.teacher.steps 50`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from lmeff.config.files import load_experiment, origins
from lmeff.config.schema import Experiment, Stage


def resolve(path: Path, arguments: Sequence[str], *, prog: str) -> tuple[Experiment, dict[str, str]]:
    """The experiment of a config file with the settings that the arguments name, and the origin of each value."""
    from_file = load_experiment(path)
    experiment = override(from_file, arguments, prog=f"{prog} {path}")
    return experiment, origins(experiment, from_file, str(path))


def override(experiment: Experiment, arguments: Sequence[str], *, prog: str) -> Experiment:
    """The experiment with the settings that the arguments name; tyro refuses unknown ones with the nearest (exit code 2)."""
    if not arguments:
        return experiment
    by_name = {stage.name: stage for stage in experiment.recipe}
    values = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    mirror = _mirror()
    made: Any = tyro.cli(
        mirror,
        prog=prog,
        default=mirror(**{**values, "recipe": by_name}),
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
    )
    chosen = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    return Experiment(**{**chosen, "recipe": tuple(made.recipe.values())})


def _mirror() -> Any:
    """`Experiment` with its stages as a dict, which tyro addresses by name instead of by position."""
    fields = [
        (f.name, dict[str, Stage] if f.name == "recipe" else f.type, dataclasses.field())
        for f in dataclasses.fields(Experiment)
    ]
    mirror = dataclasses.make_dataclass("Experiment", fields, frozen=True, kw_only=True)
    mirror.__doc__ = Experiment.__doc__
    return mirror
