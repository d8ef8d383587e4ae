"""Chips by name, and the CPU of this machine, which is measured once."""

import contextlib
import difflib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lmeff.core.errors import ConfigError
from lmeff.core.files import write_text
from lmeff.plan.chips import CHIPS, FORMATS, Chip

__all__ = ["CHIPS", "FORMATS", "Chip", "cache_dir", "chip", "measure_cpu", "this_cpu"]


def chip(name: str) -> Chip:
    """A chip by its name; "cpu" is this machine's, measured the first time. Raises `ConfigError` with the nearest names."""
    if name == "cpu":
        return this_cpu()
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower(), CHIPS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"chip: got '{name}', expected one of {', '.join(CHIPS)}, cpu{hint}")
    return CHIPS[name]


def this_cpu() -> Chip:
    """This machine as a chip, from the cache of the user, or measured and kept there."""
    # A home may be shared by unlike machines, and a container may have fewer cores today: both are part of the name.
    path = cache_dir() / f"cpu-{platform.machine()}-{os.cpu_count()}-{_memory()}.json"
    try:
        return Chip(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none there yet, or one of another version
        found = measure_cpu()
    with contextlib.suppress(OSError):  # a home that nobody may write to: it is measured again next time
        write_text(path, json.dumps(asdict(found), indent=1))
    return found


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_dir() -> Path:
    """Where a user's caches of lmeff lie: `$XDG_CACHE_HOME/lmeff`, or `~/.cache/lmeff`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmeff"


def measure_cpu() -> Chip:
    """What the CPU of this machine does: a product of float32 matrices, the same in bfloat16 and int8, and a loop over 32 MiB; takes a second or two."""
    rates = {
        "float32": _product_rate(jnp.float32, jnp.float32),
        "bfloat16": _product_rate(jnp.bfloat16, jnp.float32),
        "int8": _product_rate(jnp.int8, jnp.int32),
    }
    memory, bandwidth = _memory(), _bandwidth(8 * 2**20, turns=8)
    return Chip(
        name="cpu",
        platform="cpu",
        source="measured on this machine",
        flops=rates,
        hbm=memory,
        usable=memory,
        bandwidth=bandwidth,
        # Devices are threads of one process: what they send is copied once, read and written.
        nvlink=bandwidth / 2,
        domain=2**20,
        pcie=bandwidth / 2,
        dcn=bandwidth / 2,
        power=CPU_WATTS,
    )


def _product_rate(dtype: DTypeLike, wide: DTypeLike, n: int = 512) -> float:
    """FLOP/s of a product that fills all cores and takes milliseconds: of many that short, some have the machine for themselves."""
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=wide))
    return 2 * n**3 / _fastest(product, a)


def _bandwidth(numbers: int, turns: int) -> float:
    """Bytes/s read and written by a loop over an array in place: fresh memory would cost the pages of the system."""
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, x: x * 0.5 + 1.0, x))
    x = jnp.ones((numbers,), jnp.float32)
    return 2 * x.nbytes * turns / _fastest(loop, x, runs=3)


def _fastest(fn: Callable[[jax.Array], jax.Array], x: jax.Array, runs: int = 20) -> float:
    """Seconds of the fastest of a few calls, after one that compiles: others shared the machine."""
    fn(x).block_until_ready()
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        fn(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


CPU_WATTS = 65.0  # a laptop's or desktop's processor under load; an assumption, nothing here can measure it
