"""Commands that train nothing: they show a config, a schedule, a finished run's report, or this machine."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from lmeff.commands.words import refuse_unknown
from lmeff.config import Experiment
from lmeff.config.files import to_json
from lmeff.config.overrides import resolve
from lmeff.config.schema import flat_values
from lmeff.config.validate import validate
from lmeff.core.errors import UsageError
from lmeff.core.files import write_asked
from lmeff.core.precision import parse
from lmeff.doctor.examine import examine
from lmeff.doctor.table import Case
from lmeff.launch import Machine, simulate_devices
from lmeff.models.config import ModelConfig
from lmeff.parallel.drawing import print_schedule
from lmeff.parallel.leaves import print_stages
from lmeff.parallel.mesh import make_layout
from lmeff.parallel.schedule_csv import from_csv, to_csv
from lmeff.parallel.schedules import build, is_file
from lmeff.parallel.simulate import simulate
from lmeff.report.html import write_html
from lmeff.report.pipeline import schedule_file
from lmeff.report.schema import Report
from lmeff.report.tables import print_artifacts, print_comparisons

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MakeReport:
    """Prints a run's table again and writes its report.html from report.json.

    Attributes:
        run: the folder of a run.
        json: print the report as one JSON object on stdout and logs on stderr.
    """

    run: tyro.conf.Positional[Path]
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Shows the resolved config, each value with its origin: default, the file, or the command line.

    Attributes:
        action: what to do; there is only show.
        config: a Python file whose experiment() returns the config.
        devices: also check it against so many devices, and show where every parameter lies on them.
        json: print one JSON object on stdout.
    """

    action: tyro.conf.Positional[Literal["show"]]
    config: tyro.conf.Positional[Path]
    devices: int | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class ShowSchedule:
    """Draws a pipeline schedule and counts its ticks, idle share and microbatches in flight.

    Attributes:
        name: a schedule, such as 1f1b, or a .csv file with a table, which has its own stages and microbatches.
        stages: stages of the pipeline.
        microbatches: microbatches of a step.
        chunks: slices of the model a stage; the schedule's own number where none is given.
        csv: also write the table there.
        svg: also write a picture there.
        json: print one JSON object on stdout and the drawing on stderr.
    """

    name: tyro.conf.Positional[str]
    stages: int = 4
    microbatches: int = 8
    chunks: int | None = None
    csv: Path | None = None
    svg: Path | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Checks whether this machine, or every host of a pod, can run: one line a check, with the remedy.

    Exit code 0 where nothing failed ("look" is worth a look and stops nothing), 1 otherwise. With a config also its mesh, its disk, its precision
    and optimizer; settings are overridden as in `lmeff run`. With --distributed or --processes all processes report, and are compared.

    Attributes:
        config: a Python file whose experiment() returns the config; without one the machine alone is checked.
        runs: the folder of all runs; None takes the config's, or ./runs.
        machine: what it runs on.
        json: print one JSON object on stdout and the lines on stderr.
    """

    config: tyro.conf.Positional[
        tuple[Path, ...]
    ] = ()  # tyro takes unknown options for a single one that may be left out
    runs: str | None = None
    machine: tyro.conf.OmitArgPrefixes[Machine] = Machine()  # noqa: RUF009 -- frozen
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def make_report(command: MakeReport, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff report`."""
    refuse_unknown(overrides, "report")
    report = Report.read(command.run / "report.json")
    write_html(report, command.run / "report.html")
    print_artifacts(report, console)
    print_comparisons(report, console)
    console.print(f"report: {command.run / 'report.html'}", highlight=False)
    return report.to_json()


def show_config(command: ShowConfig, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff config show`."""
    experiment, sources = resolve(command.config, overrides, prog="lmeff run")
    shapes: Mapping[str, ModelConfig] = {}
    if command.devices is not None:
        simulate_devices(command.devices)
        shapes = validate(experiment, command.devices)
    for path, value in flat_values(experiment):
        console.print(f"{path} = {value!r}  [dim]({sources[path]})[/dim]", highlight=False, soft_wrap=True)
    answer: Json = {"config": to_json(experiment), "origins": sources}
    if not shapes:
        return answer
    layout, dtype = make_layout(experiment.mesh), parse(experiment.precision).params
    return answer | {"leaves": print_stages(shapes, layout, dtype, console)}


def show_schedule(command: ShowSchedule, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff schedule`."""
    refuse_unknown(overrides, "schedule")
    if is_file(command.name):
        schedule = from_csv(Path(command.name), Path(command.name).stem)
    else:
        schedule = build(command.name, command.stages, command.microbatches, command.chunks)
    counts = simulate(schedule)
    print_schedule(schedule, counts, console)
    for option, path, form in (("csv", command.csv, to_csv), ("svg", command.svg, schedule_file)):
        if path is not None:
            write_asked(option, path, form(schedule))
    return {"name": schedule.name, "table": schedule.table, **counts.to_json()}


def examine_machine(command: Doctor, overrides: Sequence[str], console: Console) -> Json:
    """`lmeff doctor`."""
    chosen = command.machine.devices is not None
    if len(command.config) > 1:
        raise UsageError(f"lmeff doctor: got {len(command.config)} configs, expected one or none")
    if not command.config:
        refuse_unknown(overrides, "doctor")
        runs = Path(command.runs or Experiment(name="none").runs)
        return examine(Case(runs, runs, chosen=chosen), console)
    experiment, _ = resolve(command.config[0], overrides, prog="lmeff doctor")
    if command.runs is not None:
        experiment = dataclasses.replace(experiment, runs=command.runs)
    return examine(Case(Path(experiment.run_dir), Path(experiment.runs), experiment, chosen), console)
