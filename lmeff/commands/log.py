"""The command that brings a run's metrics to TensorBoard, Weights & Biases or trackio afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from lmeff.commands.words import refuse_unknown
from lmeff.config.files import read
from lmeff.core.errors import UsageError, UserError
from lmeff.recipe.log import read_results, replay
from lmeff.train.checkpoint import lock
from lmeff.train.sinks import LogConfig, Name, check

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Log:
    """Replays the metrics of a run into sinks: what it trained without, or what one of them missed. The run itself is not touched.

    Attributes:
        run: the folder of a run.
        sinks: tensorboard, wandb, trackio; those of the run's config where none is given.
        project: of wandb and trackio; the config's where none is given.
        group: of wandb and trackio; the config's where none is given.
        offline: wandb writes to the run's folder alone.
        json: print one JSON object on stdout and logs on stderr.
    """

    run: tyro.conf.Positional[Path]
    sinks: tuple[Name, ...] = ()
    project: str | None = None
    group: str | None = None
    offline: tyro.conf.FlagCreatePairsOff[bool] = False
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def log_run(command: Log, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff log`."""
    refuse_unknown(overrides, "log")
    experiment = read(command.run)
    before = experiment.log
    config = LogConfig(
        sinks=command.sinks or before.sinks,
        project=command.project or before.project,
        group=command.group or before.group,
        offline=command.offline or before.offline,
    )
    if not config.sinks:
        raise UsageError("log: the run's config names no sinks; expected --sinks, any of tensorboard, wandb, trackio")
    check(config)
    with lock(command.run):
        results = read_results(command.run)
        failed = replay(
            config, experiment, command.run, results, lambda line: console.print(line, highlight=False, soft_wrap=True)
        )
    if failed:
        raise UserError(
            f"log: {', '.join(failed)} failed, as told above; expected all to take the run's metrics. Try again."
        )
    console.print(f"logged to {', '.join(config.sinks)}", highlight=False)
    return {"run": str(command.run), "sinks": list(config.sinks)}
