"""Memory and disks: what is there, and whether it holds the run of a config."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from lmeff.compress.config import build
from lmeff.config import Experiment
from lmeff.config.schema import Transform
from lmeff.core.precision import parse
from lmeff.core.specs import abstract
from lmeff.doctor.check import Check, Problem, gib, judge
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.train.optim import make_optimizer
from lmeff.train.state import build_state

MEMORY = 3 * 2**30  # what the quickstart wants
DISK = 2 * 2**30  # the same
TEMPORARY = 2**30
INODES = 10_000
UNLIMITED = 2**60  # cgroup v1 tells a number near 2^63 where there is no limit
ON_MEMORY = ("tmpfs", "ramfs")


class Sizes(NamedTuple):
    """Bytes of a run.

    state: of the largest stage's training, without gradients and activations. kept: of all checkpoints and artifacts on the disk. offloaded: of the
    moments that lie in the host's memory, 0 without `optim.offload`.
    """

    state: int
    kept: int
    offloaded: int = 0


def sizes(experiment: Experiment, shapes: Mapping[str, ModelConfig]) -> Sizes:
    """From shapes alone; while a checkpoint is written there is one more than `train.keep`."""
    policy, largest, kept, offloaded = parse(experiment.precision), 0, 0, 0
    transforms: dict[str, tuple[Transform, ...]] = {}
    for stage in experiment.recipe:
        transforms[stage.name] = transforms[str(stage.start)] if stage.continues else stage.compress
        specs, compression = param_specs(shapes[stage.name]), build(transforms[stage.name])
        params = abstract(specs, policy.params)
        kept += _bytes(params)
        if experiment.steps(stage):
            optim = stage.optim or experiment.optim
            tx = make_optimizer(optim, experiment.steps(stage), policy=policy, specs=specs)
            fresh = jax.eval_shape(
                lambda p, c=compression, s=specs, t=tx, o=optim: build_state(p, s, c, t, ema=o.ema is not None), params
            )
            state = _bytes(fresh)
            largest, kept = max(largest, state), kept + (experiment.train.keep + 1) * state
            offloaded = max(offloaded, _bytes(fresh.opt) if optim.offload else 0)
    return Sizes(largest, kept, offloaded)


def _bytes(tree: object) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Memory(NamedTuple):
    """Bytes. limit: of the cgroup (a container or a job), None for none."""

    total: int
    available: int
    swap: int
    limit: int | None


def read_memory(root: Path = Path("/")) -> Memory:
    """The host's memory; of the cgroups above this process the tightest limit counts, of version 1 or 2."""
    rows = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
    kib = {name: int(value.split()[0]) * 1024 for name, value in rows.items()}
    limits = [limit for file in _limit_files(root) if (limit := _limit(file)) is not None]
    return Memory(kib["MemTotal"], kib["MemAvailable"], kib["SwapTotal"], min(limits, default=None))


def _limit_files(root: Path) -> list[Path]:
    """Where limits of this process's cgroups may lie. Inside a container its own cgroup is often mounted as the root of them all."""
    files = []
    cgroups = root / "proc/self/cgroup"
    for line in cgroups.read_text(encoding="utf-8").splitlines() if cgroups.exists() else []:
        _, kinds, place = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        base, name = ("sys/fs/cgroup", "memory.max") if not kinds else ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
        here = Path(place.lstrip("/"))
        files += [root / base / folder / name for folder in (here, *here.parents)]
    return files


def _limit(file: Path) -> int | None:
    try:
        found = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(found) if found.isdigit() and int(found) < UNLIMITED else None


def memory(found: Memory, state: int = 0) -> Check:
    """The host's memory. state: bytes of the state of training that lie there: all of it on CPUs, what is offloaded elsewhere."""
    usable = min(found.total, found.limit or found.total)
    told = f"{gib(usable)}" + (
        f" (the cgroup's limit; the host has {gib(found.total)})" if usable < found.total else ""
    )
    told += f", {gib(found.available)} free" + ("" if found.swap else ", no swap")
    problems = []
    if state > usable:
        lacks = f"the state of training takes {gib(state)} of this memory"
        problems.append(Problem("FAIL", lacks, "`lmeff plan CONFIG` says which devices hold it"))
    if usable < MEMORY:
        problems.append(Problem("look", f"the quickstart wants {gib(MEMORY)}", "lower train.batch"))
    elif found.available < MEMORY:
        problems.append(
            Problem("look", f"only {gib(found.available)} are free", "end what takes the rest: top -o %MEM")
        )
    return judge("memory", told, problems)


class Place(NamedTuple):
    """A folder that is written to: free bytes and inodes (None where the file system counts none), and its kind."""

    path: Path
    free: int
    inodes: int | None
    kind: str


def read_place(path: Path, root: Path = Path("/")) -> Place:
    """The file system that a folder lies on, or will lie on once it is made."""
    there = existing(path)
    found = os.statvfs(there)
    return Place(path, found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None, _kind(there, root))


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return path if path.exists() else existing(path.parent)


def _kind(path: Path, root: Path) -> str:
    """The kind of the mount that holds a path, "" where that is not told."""
    try:
        rows = [line.split() for line in (root / "proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    real = path.resolve()
    mounts = {Path(row[1].encode().decode("unicode_escape")): row[2] for row in rows if len(row) > 2}
    above = [place for place in (real, *real.parents) if place in mounts]
    return mounts[above[0]] if above else ""


def disk(places: Mapping[str, Place], needed: int | None = None, there: int = 0) -> Check:
    """Room in the folders that are written to, by what they are for; "runs" is the run's.

    needed: bytes of the whole run, None where no config says. there: how many of them lie there already.
    """
    problems = [problem for what, place in places.items() for problem in _lacks(what, place, needed, there)]
    told = [f"{what} {gib(place.free)} free{_on(place)}" for what, place in places.items()]
    takes = f", the run takes {gib(needed)}" if needed and not problems else ""
    return judge("disk", ", ".join(told) + takes, problems)


def _lacks(what: str, place: Place, needed: int | None, there: int) -> list[Problem]:
    problems, least = [], DISK if what == "runs" else TEMPORARY
    if what == "runs" and needed is not None and place.free + there < needed:
        lacks = f"checkpoints and artifacts take {gib(needed)}, {place.path} has {gib(place.free)}"
        problems.append(Problem("FAIL", lacks, "set --runs to a larger disk, or lower train.keep"))
    elif place.free < least:
        problems.append(Problem("look", f"{what}: only {gib(place.free)} in {place.path}", REMEDIES[what]))
    if place.inodes is not None and place.inodes < INODES:
        problems.append(Problem("look", f"{what}: room for {place.inodes} more files", "delete small files there"))
    if what == "runs" and place.kind in ON_MEMORY:
        told = f"{place.path} is {place.kind}: checkpoints take memory and are gone after a restart"
        problems.append(Problem("look", told, "set --runs to a disk"))
    return problems


def _on(place: Place) -> str:
    return f" ({place.kind})" if place.kind in ON_MEMORY else ""


REMEDIES = {
    "runs": "set --runs to another disk",
    "cache": "set JAX_COMPILATION_CACHE_DIR to another disk",
    "temporary": "set TMPDIR to another disk",
}


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
