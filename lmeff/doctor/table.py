"""The table of checks: what each is given of the machine and of the config."""

import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from lmeff.config import Experiment
from lmeff.config.loads import loads
from lmeff.config.validate import shape_of, validate
from lmeff.core.accelerators import hardware
from lmeff.core.errors import UserError
from lmeff.doctor import accelerators, environment, folder, packages, space, step
from lmeff.doctor import devices as on_devices
from lmeff.doctor.check import Check
from lmeff.models.config import ModelConfig
from lmeff.parallel.processes import launched, leads, refuse_unjoined

DEFAULT = Experiment(name="doctor")


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


def _devices(case: Case) -> Check:
    there = hardware(case.root)
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
    built = (case.directory / "data").exists() or not leads()  # of several processes the first alone reads text
    if absent and not built and all(part.source != "hf" for part in case.experiment.data.parts):
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
    sizes, here = _sizes(case), 0
    if sizes is not None:
        on_cpu = jax.local_devices()[0].platform == "cpu"
        together = 1 if launched() is not None else jax.process_count()  # launched processes share one host
        here = (sizes.state if on_cpu else sizes.offloaded) // together
    return space.memory(space.read_memory(case.root), here)


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
    return environment.limits(environment.open_files(), case.root, tuple(hardware(case.root)))


def _plugins(case: Case) -> Check:
    return packages.plugins(packages.read_installed(), tuple(hardware(case.root)))


def _in_use(case: Case) -> Check:
    return accelerators.in_use(hardware(case.root), accelerators.holders(case.root))


def _tpu_lock(case: Case) -> Check:
    return accelerators.tpu_lock(hardware(case.root), case.variables, case.root)


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
    Row("memory", _memory, devices=True),
    Row("config", _config, devices=True),
    Row("disk", _disk, devices=True),
    Row("train step", _step, devices=True),
    Row("clock", _clock),
)
