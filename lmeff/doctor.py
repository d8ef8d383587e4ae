"""What can be wrong with a machine before a run begins."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

EXTRAS = {
    "report": ("matplotlib", "jinja2"),
    "text": ("tokenizers", "sentencepiece"),
    "gguf": ("gguf",),
    "eval": ("lm_eval",),
    "parquet": ("pyarrow",),
    "hf": ("datasets",),
    "remote": ("fsspec", "gcsfs"),
}
# jaxlib 0.11.2 ends with a segmentation fault where it simplifies the gradient of a `jax.shard_map` (Shardy's pattern for unused inputs).
KNOWN_BAD = {"jaxlib": {"0.11.2": "it crashes on gradients of sharded programs"}}
DISK_GIB = 2.0
MEMORY_GIB = 3.0


class Check(NamedTuple):
    """One line: what was looked at, whether it is well, what was found, and what to do where it is not."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine() -> list[Check]:
    """Runs every check."""
    return [check() for check in CHECKS]


def print_checks(checks: list[Check], console: Console) -> None:
    """One line a check."""
    for check in checks:
        mark = "[green]ok  [/green]" if check.ok else "[yellow]look[/yellow]"
        remedy = "" if check.ok else f"  -> {check.remedy}"
        console.print(f"{mark} {check.name}: {check.found}{remedy}", highlight=False, soft_wrap=True)


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), "lmeff needs Python 3.11 or newer")


def _packages() -> Check:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    bad = {name: why[versions[name]] for name, why in KNOWN_BAD.items() if versions[name] in why}
    return Check(
        "packages",
        not bad,
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "; ".join(f"{name} {versions[name]}: {why}; pip install --upgrade jax" for name, why in bad.items()),
    )


def _extras() -> Check:
    missing = [extra for extra, modules in EXTRAS.items() if any(importlib.util.find_spec(m) is None for m in modules)]
    told = ", ".join(extra for extra in EXTRAS if extra not in missing) or "none"
    return Check(
        "extras",
        "report" not in missing,
        f"installed: {told}" + (f"; absent: {', '.join(missing)}" if missing else ""),
        "pip install 'lmeff[report]' for the HTML report",
    )


def _devices() -> Check:
    devices = jax.devices()
    return Check(
        "devices", True, f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {os.cpu_count()} cores"
    )


def _compiles() -> Check:
    found = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8), jnp.float32)))
    return Check(
        "compiler", found == 512.0, f"an 8 x 8 product gives {found:g}", "reinstall jax and jaxlib of the same version"
    )


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Check(
        "memory", total >= MEMORY_GIB, f"{total:.1f} GiB", f"the quickstart wants {MEMORY_GIB:g} GiB; lower train.batch"
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check(
        "disk",
        free >= DISK_GIB,
        f"{free:.1f} GiB free here",
        f"the quickstart wants {DISK_GIB:g} GiB; set --runs to another disk",
    )


def _writable() -> Check:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            return Check("folder", True, "the current folder can be written")
    except OSError as error:
        return Check(
            "folder", False, f"cannot write here ({error.strerror})", "run from a folder of your own, or set --runs"
        )


CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _packages,
    _extras,
    _devices,
    _compiles,
    _memory,
    _disk,
    _writable,
)
