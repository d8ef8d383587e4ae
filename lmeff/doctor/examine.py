"""The table of checks, and an examination: each is made, none can end it, and several processes compare what they found."""

import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from lmeff.config import Experiment
from lmeff.config.files import to_json
from lmeff.config.loads import loads
from lmeff.config.validate import shape_of, validate
from lmeff.core.errors import UserError
from lmeff.doctor import accelerators, environment, folder, hosts, packages, space, step
from lmeff.doctor import devices as on_devices
from lmeff.doctor.check import Check, crashed
from lmeff.models.config import ModelConfig
from lmeff.parallel.processes import joined, leads, refuse_unjoined

LONG = 20.0  # seconds after which to say what is waited for
MARKS = {"ok": "[green]ok  [/green]", "look": "[yellow]look[/yellow]", "FAIL": "[red]FAIL[/red]"}
DEFAULT = Experiment(name="doctor")


class Unwell(UserError):
    """Something failed. `answer`: all that was found, for `--json`."""

    exit_code = 1

    def __init__(self, message: str, answer: dict[str, Any]) -> None:
        """`message`: what failed, in words."""
        super().__init__(message)
        self.answer = answer


class Case(NamedTuple):
    """What is examined.

    directory: the run's folder, `runs` itself where no config says which. experiment: None without a config. chosen: the CPU was asked for.
    root:      of the file system, /proc, /dev and /sys. began: `time.time()` and `time.monotonic()` at the start.
    """

    directory: Path
    runs: Path
    experiment: Experiment | None = None
    chosen: bool = False
    root: Path = Path("/")
    variables: Mapping[str, str] = os.environ
    began: tuple[float, float] = (0.0, 0.0)


class Row(NamedTuple):
    """A check by name. devices: it can be made only where JAX finds devices."""

    name: str
    check: Callable[[Case], Check]
    devices: bool = False


def examine(case: Case, console: Console) -> dict[str, Any]:
    """Makes every check and prints it as it is made; of several processes the first prints for all. Raises `Unwell` where one failed."""
    case, alone = case._replace(began=(time.time(), time.monotonic())), not joined()
    if not alone:
        console.print(f"{jax.process_count()} processes examine themselves", highlight=False)
    with _folder(case):
        checks = list(_made(case, console if alone else None))
        reports = [] if alone else _exchanged(case, checks)
    if not alone:
        checks = _together(case, checks, reports)
        for check in checks:
            show(check, console)
    failed = [check.name for check in checks if check.level == "FAIL"]
    answer = {"checks": [check.to_json() for check in checks], "failed": failed}
    answer["processes"] = [report.to_json() for report in reports]
    if failed:
        count = f"{len(failed)} of {len(checks)} checks failed" if len(failed) > 1 else "a check failed"
        raise Unwell(f"doctor: {count}: {', '.join(dict.fromkeys(failed))}; follow the arrows, then ask again", answer)
    return answer


@contextmanager
def _folder(case: Case) -> Iterator[None]:
    """The run folder is there meanwhile; of several processes the first makes it and clears it away."""
    if not leads():
        hosts.wait("folder made")
        yield
        hosts.wait("all done")
        return
    with folder.standing(case.directory):
        hosts.wait("folder made")
        yield
        hosts.wait("all done")


def _made(case: Case, console: Console | None) -> Iterator[Check]:
    """The checks of this process, one after the other; an exception becomes a finding."""
    blind = False
    for row in CHECKS:
        if row.devices and blind:
            check = Check(row.name, "look", "not checked: JAX finds no devices", "mend `devices` first")
        else:
            check = attempt(row, case, console)
        blind = blind or (row.name == "devices" and check.level == "FAIL" and not _has_devices())
        if console is not None:
            show(check, console)
        yield check


def attempt(row: Row, case: Case, console: Console | None = None) -> Check:
    """One check. Where it takes long, it is said what is waited for."""
    told = f"     {row.name}: still waiting; on a pod start the same command on every host, with --distributed"
    patience = threading.Timer(LONG, lambda: console.print(told, highlight=False) if console is not None else None)
    patience.daemon = True
    patience.start()
    try:
        return row.check(case)
    except Exception as error:
        return crashed(row.name, error)
    finally:
        patience.cancel()


def _has_devices() -> bool:
    try:
        return bool(jax.local_devices())
    except RuntimeError:
        return False


def _exchanged(case: Case, checks: list[Check]) -> list[hosts.Report]:
    """What all processes found; nothing where they cannot reach each other."""
    config = None if case.experiment is None else json.dumps(to_json(case.experiment), sort_keys=True)
    try:
        return hosts.report(hosts.versions(packages.read_installed(), config), checks, case.directory)
    except Exception as error:
        checks.append(crashed("hosts", error))
        return []


def _together(case: Case, own: list[Check], reports: list[hosts.Report]) -> list[Check]:
    if not reports:
        return own
    shared = [hosts.alike(reports), hosts.one_folder(reports, case.directory), hosts.one_time(reports)]
    return hosts.merged(reports) + shared


def show(check: Check, console: Console) -> None:
    """One line in a file or a pipe; on a terminal folded to its width, the remedy below."""
    if not console.is_terminal:
        remedy = f"  -> {check.remedy}" if check.remedy else ""
        line = f"{check.level:4} {check.name}: {check.found}{remedy}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(width=4)
    table.add_column(width=13)
    table.add_column(overflow="fold")
    table.add_row(MARKS[check.level], check.name, _plain(check.found))
    if check.remedy:
        table.add_row("", "", _plain(f"-> {check.remedy}"))
    console.print(table, highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _devices(case: Case) -> Check:
    there = accelerators.hardware(case.root)
    try:
        with on_devices.silent(unless=bool(there)):
            found = jax.devices()
        refuse_unjoined()
    except (RuntimeError, UserError) as error:
        return on_devices.refused(error, case.variables)
    return on_devices.devices(found, there, case.variables, packages.read_installed(), chosen=case.chosen)


def _config(case: Case) -> Check:
    if case.experiment is None:
        return Check("config", "ok", "none given: `lmeff doctor CONFIG` checks one, too")
    count = jax.device_count()
    try:
        validate(case.experiment, count, case.directory)
    except UserError as error:
        return Check("config", "FAIL", str(error), "change it, or take it to the devices that it is for")
    parts = [path for part in case.experiment.data.parts for path in part.path]
    absent = [path for path in parts if "://" not in path and not Path(path).expanduser().exists()]
    if absent and all(part.source != "hf" for part in case.experiment.data.parts):
        return Check("config", "FAIL", f"data.path: {', '.join(absent)} is not there", "correct it, or fetch the text")
    remote = [path for path in parts if "://" in path]
    unseen = f"; not looked at: {', '.join(remote)}" if remote else ""
    return Check("config", "ok", f"goes with {count} device{'s' * (count > 1)}{unseen}")


def _shapes(case: Case) -> dict[str, ModelConfig] | None:
    """The models of the config's stages; None without a config, or where it does not hold, which `config` tells."""
    if case.experiment is None:
        return None
    seen: dict[str, ModelConfig] = {}
    try:
        loaded = loads(case.experiment, case.directory)
        for stage in case.experiment.recipe:
            seen[stage.name] = shape_of(case.experiment, stage, seen, loaded)
    except (UserError, KeyError):
        return None
    return seen


def _sizes(case: Case) -> space.Sizes | None:
    shapes = _shapes(case)
    return None if shapes is None or case.experiment is None else space.sizes(case.experiment, shapes)


def _memory(case: Case) -> Check:
    sizes = _sizes(case) if _has_devices() and jax.local_devices()[0].platform == "cpu" else None
    share = 1 if sizes is None or not joined() else jax.process_count()
    return space.memory(space.read_memory(case.root), None if sizes is None else sizes.state // share)


def _disk(case: Case) -> Check:
    folders = {"runs": case.directory, "temporary": Path(case.variables.get("TMPDIR", "/tmp"))}
    cache = case.variables.get("JAX_COMPILATION_CACHE_DIR", "")
    if cache and "://" not in cache:
        folders["cache"] = Path(cache)
    sizes = _sizes(case)
    places = {what: space.read_place(path, case.root) for what, path in folders.items()}
    return space.disk(places, None if sizes is None else sizes.kept, space.size_of(case.directory) if sizes else 0)


def _step(case: Case) -> Check:
    shapes = _shapes(case)
    cfg = None if not shapes else next(iter(shapes.values()))
    return step.train_step(cfg, case.experiment or DEFAULT, jax.local_devices()[0])


def _clock(case: Case) -> Check:
    wall, steady = time.time() - case.began[0], time.monotonic() - case.began[1]
    return folder.clock(_skew(case.directory), wall - steady, time.time(), _installed_at())


def _skew(directory: Path) -> float | None:
    try:
        return folder.disk_time(directory)
    except OSError:
        return None  # `folder` tells


def _installed_at() -> float:
    """When the newest of the packages that are needed was installed, in seconds since 1970."""
    files = [importlib.metadata.distribution(name).locate_file("") for name in packages.read_installed()]
    return max((Path(str(file)).stat().st_mtime for file in files), default=0.0)


def _limits(case: Case) -> Check:
    return environment.limits(environment.open_files(), case.root, tuple(accelerators.hardware(case.root)))


def _plugins(case: Case) -> Check:
    return packages.plugins(packages.read_installed(), tuple(accelerators.hardware(case.root)))


def _in_use(case: Case) -> Check:
    return accelerators.in_use(accelerators.hardware(case.root), accelerators.holders(case.root))


def _tpu_lock(case: Case) -> Check:
    return accelerators.tpu_lock(accelerators.hardware(case.root), case.variables, case.root)


# What JAX could hang on or abort at comes after what can be known without it.
CHECKS = (
    Row("python", lambda case: packages.python()),
    Row("packages", lambda case: packages.packages(packages.read_installed())),
    Row("plugins", _plugins),
    Row("imports", lambda case: packages.shadowed(packages.origins())),
    Row("extras", lambda case: packages.extras()),
    Row("environment", lambda case: environment.environment(case.variables)),
    Row("limits", _limits),
    Row("folder", lambda case: folder.writable(case.directory)),
    Row("run lock", lambda case: folder.lock(case.directory, case.runs, case.root)),
    Row("accelerators", _in_use),
    Row("TPU lock", _tpu_lock),
    Row("devices", _devices),
    Row("device memory", lambda case: on_devices.device_memory(jax.local_devices()), devices=True),
    Row("product", lambda case: on_devices.computes(jax.local_devices()), devices=True),
    Row("memory", _memory),
    Row("config", _config, devices=True),
    Row("disk", _disk, devices=True),
    Row("train step", _step, devices=True),
    Row("clock", _clock),
)
