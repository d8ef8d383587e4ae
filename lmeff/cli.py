"""The command line: `lmeff run | train | data | eval | generate | import | export | bench | plan | report | log | config show | schedule | doctor`.

Logs go to stderr under `--json`, which leaves one JSON object on stdout.
Exit codes: 0 ok, 2 usage, 3 config, 4 data, 5 checkpoint, 6 does not fit, 42 told to stop (SIGTERM) and nothing lost, 1 anything else.
"""

import functools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from lmeff import __version__
from lmeff.commands.bench import Bench, time_inference
from lmeff.commands.data import Data, build_data
from lmeff.commands.evaluate import Eval, evaluate_models
from lmeff.commands.generate import Generate, write_text
from lmeff.commands.log import Log, log_run
from lmeff.commands.show import (
    Doctor,
    MakeReport,
    ShowConfig,
    ShowSchedule,
    examine_machine,
    make_report,
    show_config,
    show_schedule,
)
from lmeff.commands.train import Run, Train, run_recipe, train_stage
from lmeff.commands.transfer import Export, Import, export_one, import_one
from lmeff.config.files import load_experiment
from lmeff.config.overrides import override, resolve
from lmeff.config.validate import validate
from lmeff.core.errors import DoesNotFit, Preempted, UserError
from lmeff.core.files import clear_passing
from lmeff.doctor.examine import Unwell
from lmeff.launch import Machine, launch, this_command
from lmeff.parallel import processes
from lmeff.parallel.preemption import STOPPED, listen, told
from lmeff.plan.command import Plan, plan

Json = dict[str, Any]

INTERRUPTED = 130  # by Ctrl-C, as shells say it

COMMANDS: dict[str, tuple[type, Callable[..., Json]]] = {
    "run": (Run, run_recipe),
    "train": (Train, train_stage),
    "data": (Data, build_data),
    "eval": (Eval, evaluate_models),
    "generate": (Generate, write_text),
    "import": (Import, import_one),
    "export": (Export, export_one),
    "bench": (Bench, time_inference),
    "plan": (Plan, plan),
    "report": (MakeReport, make_report),
    "log": (Log, log_run),
    "config": (ShowConfig, show_config),
    "schedule": (ShowSchedule, show_schedule),
    "doctor": (Doctor, examine_machine),
}
Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[MakeReport, tyro.conf.subcommand("report")]
    | Annotated[Log, tyro.conf.subcommand("log")]
    | Annotated[ShowConfig, tyro.conf.subcommand("config")]
    | Annotated[ShowSchedule, tyro.conf.subcommand("schedule")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)
_answered = threading.Event()  # why it failed was told
DESCRIPTION = f"lmeff {__version__}: efficient language models in JAX. Every command has --help and --json."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code; where it is one of several processes and fails, the process ends here."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    _answered.clear()
    try:
        return _main(words, as_json)
    except (DoesNotFit, Unwell) as error:
        return _failed(str(error), error.exit_code, as_json, error.answer)
    except UserError as error:
        return _failed(str(error), error.exit_code, as_json)
    except SystemExit as stop:  # tyro has told what is wrong on stderr
        return _failed("", 2, as_json) if stop.code else 0
    except KeyboardInterrupt:
        if told():
            return _failed(STOPPED, Preempted.exit_code, as_json)
        return _failed("interrupted; the same command goes on from the last checkpoint", INTERRUPTED, as_json)
    except Exception as error:
        if told():  # peers that left already, or a library that wraps what it is interrupted by
            first = traceback.format_exception_only(error)[0].splitlines()[0]
            return _failed(f"{STOPPED} (ended by {first})", Preempted.exit_code, as_json)
        if processes.launched() is None and not processes.joined():
            raise
        return _failed(f"failed\n{traceback.format_exc()}", 1, as_json)


def _main(words: list[str], as_json: bool) -> int:
    _help_on_settings(words)
    command, overrides = tyro.cli(Command, prog="lmeff", description=DESCRIPTION, args=words, return_unknown_args=True)  # type: ignore[call-overload]
    machine = getattr(command, "machine", Machine())
    if _run_in_processes(command, overrides, machine, words):
        return 0
    listen(machine.prepare, functools.partial(_end, as_json))
    console = Console(stderr=as_json, quiet=not processes.leads())
    handler = next(handler for kind, handler in COMMANDS.values() if isinstance(command, kind))
    answer = handler(command, overrides, console)
    processes.sync("end")
    if as_json and processes.leads():
        print(json.dumps(answer))
    return 0


def _run_in_processes(command: Any, overrides: Sequence[str], machine: Machine, words: list[str]) -> bool:
    """Starts the processes that the command asks for, where it does, once what can be known to be wrong before that is known to be right."""
    trains = machine.processes is not None and processes.launched() is None and isinstance(command, Run | Train)
    experiment = resolve(command.config, overrides, prog="lmeff run")[0] if trains else None
    share = machine.share(experiment.mesh if experiment else None)
    if not share.processes:
        return False
    if experiment:
        validate(experiment, share.devices)
    options = ("--devices", share.devices) if machine.devices is None else ()
    launch(this_command(words, options), share.processes, restarts=machine.restarts)
    return True


def _help_on_settings(words: Sequence[str]) -> None:
    """`lmeff run CONFIG --help` lists the settings of that config."""
    paths = [word for word in words[1:] if word.endswith(".py")]
    if words[:1] != ["config"] and paths and ("--help" in words or "-h" in words):
        override(load_experiment(Path(paths[0])), ["--help"], prog=f"lmeff {words[0]} {paths[0]}")


def _end(as_json: bool, message: str) -> None:
    """Ends the process under a main thread that was told to stop and is inside a long call, or has told why and is slow to leave."""
    if _answered.is_set():
        time.sleep(processes.LAST)
        os._exit(Preempted.exit_code)
    clear_passing()
    _failed(message, Preempted.exit_code, as_json)


def _failed(message: str, exit_code: int, as_json: bool, answer: Json | None = None) -> int:
    _answered.set()
    if processes.launched() is not None:
        processes.leave(message, exit_code)  # the launcher tells it
    if message:
        print(f"lmeff: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({**(answer or {}), "error": message or "usage", "exit_code": exit_code}))
    if processes.joined() or told() or exit_code == INTERRUPTED:  # XLA may compile on, and would crash an orderly end
        processes.leave("", exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
