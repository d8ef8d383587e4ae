"""Variables of the environment that change what a run does, and limits of the operating system that end it late."""

import os
import re
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lmeff.doctor.check import Check, Level, Problem, gib, judge
from lmeff.doctor.space import existing

OPEN_FILES = 1024  # a checkpoint of an 8B model opens hundreds of files at once
MAPS = 65_530  # the kernel's own default
SHARED = 2**30  # bytes of /dev/shm that NCCL and data workers of several GPUs may fill
SWITCHED_OFF = ("", "0", "false", "False", "no", "off")

Rule = Callable[[str], Problem | None]


def environment(variables: Mapping[str, str]) -> Check:
    """Variables that bite, by the table `RULES`; others that change JAX are told."""
    found = [rule(variables[name]) for name, rule in RULES.items() if name in variables]
    told = [f"{name}={variables[name]}" for name in (*RULES, *TOLD) if variables.get(name)]
    return judge("environment", ", ".join(told) or "nothing set that changes JAX", [p for p in found if p is not None])


def _switch(name: str, level: Level, why: str) -> Rule:
    """A variable that should be off."""

    def rule(value: str) -> Problem | None:
        if value in SWITCHED_OFF:
            return None
        return Problem(level, why, f"unset {name}")

    return rule


def _xla_flags(value: str) -> Problem | None:
    forced = re.search(r"--xla_force_host_platform_device_count(?:=(\S*))?", value)
    if forced is None:
        return None
    if not (forced[1] or "").isdigit() or forced[1] == "0":
        told = f"XLA_FLAGS forces '{forced[1] or ''}' CPU devices, which is no number: XLA aborts"
        return Problem("FAIL", told, "unset XLA_FLAGS, and say --devices N")
    told = f"XLA_FLAGS makes {forced[1]} devices of this CPU"
    return Problem("look", told, "unset XLA_FLAGS, and say --devices N where you want that")


def _cache(value: str) -> Problem | None:
    if "://" in value:
        return None
    folder = existing(Path(value))
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return None
    told = f"JAX_COMPILATION_CACHE_DIR={value} cannot be written: every start compiles anew"
    return Problem("look", told, "name a folder of your own")


def _libtpu_load(value: str) -> Problem | None:
    if value != "0":
        return None
    return Problem("FAIL", "TPU_LOAD_LIBRARY=0: the TPU is not loaded", "unset TPU_LOAD_LIBRARY")


def _visible(name: str) -> Rule:
    """A variable that hides devices: all of them where it is empty or -1."""

    def rule(value: str) -> Problem | None:
        some = value.strip() not in ("", "-1")
        told = f"{name}={value} hides {'some' if some else 'all'} devices"
        return Problem("look" if some else "FAIL", told, f"unset {name}")

    return rule


def limits(files: tuple[int, int], root: Path = Path("/"), hardware: Sequence[str] = ()) -> Check:
    """Open files (soft and hard limit), memory maps, shared memory, and what a TPU wants of the kernel. hardware: kinds that are here, such as "TPU"."""
    soft, hard = files
    maps, shared = _number(root / "proc/sys/vm/max_map_count"), _size(root / "dev/shm")
    problems = []
    if 0 <= soft < OPEN_FILES:
        more = hard if hard > soft else OPEN_FILES
        remedy = f"ulimit -n {min(more, 65536)}" if hard > soft or hard < 0 else "raise `nofile` in limits.conf"
        problems.append(Problem("look", f"a process may open {soft} files: large checkpoints open more", remedy))
    if maps is not None and maps < MAPS:
        told = f"a process may have {maps} memory maps: programs for the CPU take thousands each"
        problems.append(Problem("look", told, f"sudo sysctl vm.max_map_count={4 * MAPS}"))
    if "NVIDIA" in hardware and shared is not None and shared < SHARED:
        told = f"/dev/shm has {gib(shared)}: NCCL and data workers need more"
        problems.append(Problem("look", told, "docker run --shm-size=8g, or --ipc=host"))
    pages = root / "sys/kernel/mm/transparent_hugepage/enabled"
    if "TPU" in hardware and pages.exists() and "[always]" not in pages.read_text(encoding="ascii"):
        remedy = f"sudo sh -c 'echo always > {pages}'"
        problems.append(Problem("look", "no transparent huge pages: a TPU starts and ends slowly", remedy))
    parts = [f"open files {'unlimited' if soft < 0 else soft}"]
    parts += [] if maps is None else [f"memory maps {maps}"]
    parts += [] if shared is None else [f"/dev/shm {gib(shared)}"]
    return judge("limits", ", ".join(parts), problems)


def open_files() -> tuple[int, int]:
    """The soft and the hard limit of open files; -1 is none."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # no Linux: there is no such limit


def _size(folder: Path) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


TOLD = ("JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "JAX_TRACEBACK_FILTERING", "XLA_PYTHON_CLIENT_MEM_FRACTION")
RULES: dict[str, Rule] = {
    "XLA_FLAGS": _xla_flags,
    "JAX_DISABLE_JIT": _switch("JAX_DISABLE_JIT", "FAIL", "JAX_DISABLE_JIT runs every operation by itself"),
    "JAX_ENABLE_X64": _switch(
        "JAX_ENABLE_X64", "look", "JAX_ENABLE_X64 doubles integers and constants, TPUs are slow at it"
    ),
    "JAX_DEBUG_NANS": _switch("JAX_DEBUG_NANS", "look", "JAX_DEBUG_NANS waits for the device after every step"),
    "JAX_COMPILATION_CACHE_DIR": _cache,
    "TPU_LOAD_LIBRARY": _libtpu_load,
    "TPU_VISIBLE_CHIPS": _visible("TPU_VISIBLE_CHIPS"),
    "TPU_VISIBLE_DEVICES": _visible("TPU_VISIBLE_DEVICES"),
    "CUDA_VISIBLE_DEVICES": _visible("CUDA_VISIBLE_DEVICES"),
    "ALLOW_MULTIPLE_LIBTPU_LOAD": _switch(
        "ALLOW_MULTIPLE_LIBTPU_LOAD",
        "look",
        "ALLOW_MULTIPLE_LIBTPU_LOAD lets two processes take one TPU: the second aborts late",
    ),
}
