"""The command line: `lmeff run | train | eval | report | config show | schedule | doctor`.

Logs go to stderr under `--json`, which leaves one JSON object on stdout. Exit codes: 0 ok, 2 usage, 3 config, 4 data, 5 checkpoint, 1 anything else.
"""

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from lmeff import __version__, doctor
from lmeff.config import Experiment
from lmeff.config.files import load_experiment, origins, read, to_json
from lmeff.config.overrides import override
from lmeff.config.schema import flat_values
from lmeff.config.validate import validate
from lmeff.core.errors import UsageError, UserError
from lmeff.core.files import write_text
from lmeff.core.precision import parse
from lmeff.launch import Machine, launch, simulate_devices, this_command
from lmeff.models.config import ModelConfig
from lmeff.parallel import processes
from lmeff.parallel.drawing import print_schedule
from lmeff.parallel.leaves import print_stages
from lmeff.parallel.mesh import make_layout
from lmeff.parallel.schedule_csv import from_csv, to_csv
from lmeff.parallel.schedules import build, is_file
from lmeff.parallel.simulate import simulate
from lmeff.recipe.evaluate import evaluate
from lmeff.recipe.run import run
from lmeff.report.html import write_html
from lmeff.report.pipeline import schedule_file
from lmeff.report.schema import Report
from lmeff.report.tables import print_artifacts, print_comparisons

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
    """Checks this machine: versions, devices, memory, disk, optional packages; one line each, with the remedy.

    Attributes:
        json: print one JSON object on stdout.
    """

    json: tyro.conf.FlagCreatePairsOff[bool] = False


def _run(command: Run, overrides: Sequence[str], console: Console) -> Json:
    experiment, sources = _experiment(command.config, overrides)
    return run(experiment, sources=sources, resume=command.resume, console=console).to_json()


def _train(command: Train, overrides: Sequence[str], console: Console) -> Json:
    experiment, sources = _experiment(command.config, overrides)
    if command.stage is None and len(experiment.recipe) > 1:
        raise UsageError(
            f"train: the recipe has several stages; expected --stage, one of {[s.name for s in experiment.recipe]}"
        )
    stage = experiment.stage(command.stage or next(iter(experiment.recipe)).name)
    return run(experiment, sources=sources, only=stage.name, resume=command.resume, console=console).to_json()


def _eval(command: Eval, overrides: Sequence[str], console: Console) -> Json:
    experiment = override(read(command.run), overrides, prog="lmeff eval RUN")
    return evaluate(experiment, command.run, names=command.artifact, text=command.text, console=console)


def _report(command: MakeReport, overrides: Sequence[str], console: Console) -> Json:
    _refuse(overrides, "report")
    report = Report.read(command.run / "report.json")
    write_html(report, command.run / "report.html")
    print_artifacts(report, console)
    print_comparisons(report, console)
    console.print(f"report: {command.run / 'report.html'}", highlight=False)
    return report.to_json()


def _show(command: ShowConfig, overrides: Sequence[str], console: Console) -> Json:
    experiment, sources = _experiment(command.config, overrides)
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


def _schedule(command: ShowSchedule, overrides: Sequence[str], console: Console) -> Json:
    _refuse(overrides, "schedule")
    if is_file(command.name):
        schedule = from_csv(Path(command.name), Path(command.name).stem)
    else:
        schedule = build(command.name, command.stages, command.microbatches, command.chunks)
    counts = simulate(schedule)
    print_schedule(schedule, counts, console)
    for option, path, form in (("csv", command.csv, to_csv), ("svg", command.svg, schedule_file)):
        if path is not None:
            _write(option, path, form(schedule))
    return {"name": schedule.name, "table": schedule.table, **counts.to_json()}


def _write(option: str, path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--{option}: cannot write {path}: {error.strerror}; choose a folder of your own") from error


def _doctor(command: Doctor, overrides: Sequence[str], console: Console) -> Json:
    _refuse(overrides, "doctor")
    checks = doctor.examine()
    doctor.print_checks(checks, console)
    return {"checks": [check._asdict() for check in checks]}


def _experiment(path: Path, overrides: Sequence[str]) -> tuple[Experiment, dict[str, str]]:
    """The experiment of a file with overrides, and the origin of each value."""
    from_file = load_experiment(path)
    experiment = override(from_file, overrides, prog=f"lmeff run {path}")
    return experiment, origins(experiment, from_file, str(path))


def _refuse(arguments: Sequence[str], command: str) -> None:
    if arguments:
        raise UsageError(
            f"lmeff {command}: unknown arguments {list(arguments)}; expected those that `lmeff {command} --help` lists"
        )


COMMANDS: dict[str, tuple[type, Callable[..., Json]]] = {
    "run": (Run, _run),
    "train": (Train, _train),
    "eval": (Eval, _eval),
    "report": (MakeReport, _report),
    "config": (ShowConfig, _show),
    "schedule": (ShowSchedule, _schedule),
    "doctor": (Doctor, _doctor),
}
Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[MakeReport, tyro.conf.subcommand("report")]
    | Annotated[ShowConfig, tyro.conf.subcommand("config")]
    | Annotated[ShowSchedule, tyro.conf.subcommand("schedule")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)
DESCRIPTION = f"lmeff {__version__}: efficient language models in JAX. Every command has --help and --json."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code; where it is one of several processes and fails, the process ends here."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        return _main(words, as_json)
    except UserError as error:
        return _failed(str(error), error.exit_code, as_json)
    except SystemExit as stop:  # tyro has told what is wrong on stderr
        return _failed("", 2, as_json) if stop.code else 0
    except KeyboardInterrupt:
        return _failed("interrupted; the same command goes on from the last checkpoint", 130, as_json)
    except Exception:
        if processes.launched() is None and not processes.joined():
            raise
        return _failed(f"failed\n{traceback.format_exc()}", 1, as_json)


def _main(words: list[str], as_json: bool) -> int:
    _help_on_settings(words)
    command, overrides = tyro.cli(Command, prog="lmeff", description=DESCRIPTION, args=words, return_unknown_args=True)  # type: ignore[call-overload]
    machine = getattr(command, "machine", Machine())
    copies = machine.copies
    if copies > 1:
        _check(command, overrides, machine)
        launch(this_command(words), copies)
        return 0
    machine.prepare()
    console = Console(stderr=as_json, quiet=not processes.leads())
    handler = next(handler for kind, handler in COMMANDS.values() if isinstance(command, kind))
    answer = handler(command, overrides, console)
    processes.sync("end")
    if as_json and processes.leads():
        print(json.dumps(answer))
    return 0


def _check(command: Any, overrides: Sequence[str], machine: Machine) -> None:
    """What can be known to be wrong before processes are started."""
    if isinstance(command, Run | Train):
        experiment, _ = _experiment(command.config, overrides)
        validate(experiment, machine.devices or 1)


def _help_on_settings(words: Sequence[str]) -> None:
    """`lmeff run CONFIG --help` lists the settings of that config."""
    paths = [word for word in words[1:] if word.endswith(".py")]
    if words[:1] != ["config"] and paths and ("--help" in words or "-h" in words):
        override(load_experiment(Path(paths[0])), ["--help"], prog=f"lmeff {words[0]} {paths[0]}")


def _failed(message: str, exit_code: int, as_json: bool) -> int:
    if processes.launched() is not None:
        processes.leave(message, exit_code)  # the launcher tells it
    if message:
        print(f"lmeff: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message or "usage", "exit_code": exit_code}))
    if processes.joined():
        processes.leave("", exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
