"""Devices as JAX sees them, and whether they compute."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmeff.core.errors import UserError
from lmeff.doctor.check import Check, Problem, gib, judge
from lmeff.doctor.packages import Installed

PLATFORMS = {"TPU": "tpu", "NVIDIA": "gpu", "AMD": "gpu"}
USED = 0.05  # share of a device's memory that is in use before anything was put there
N = 64


def devices(
    found: Sequence[Any], there: Mapping[str, int], variables: Mapping[str, str], installed: Installed, *, chosen: bool
) -> Check:
    """What JAX sees, and whether an accelerator is there that it does not use. chosen: the CPU was asked for (--devices)."""
    first = found[0]
    told = f"{len(found)} x {first.device_kind} ({first.platform})"
    if jax.process_count() > 1:
        told += f" on {jax.process_count()} processes"
    if chosen or first.platform != "cpu":
        return Check("devices", "ok", told)
    unused = [Problem("FAIL", f"{n} x {kind} unused", _remedy(kind, variables, installed)) for kind, n in there.items()]
    return judge("devices", f"JAX computes on {told}" if unused else told, unused)


def refused(error: Exception, variables: Mapping[str, str]) -> Check:
    """JAX finds no devices at all."""
    told = str(error).strip().splitlines()[0]
    chosen = variables.get("JAX_PLATFORMS", "")
    if isinstance(error, UserError):
        remedy = "start `lmeff doctor --distributed` on every host at once"
    elif "in use" in told:
        remedy = "end the process that `accelerators` or `TPU lock` names"
    elif chosen:
        remedy = f"unset JAX_PLATFORMS, which is '{chosen}'; where that is right, mend the lines above first"
    else:
        remedy = "mend the lines above first, then: python -c 'import jax; jax.devices()'"
    return Check("devices", "FAIL", told, remedy)


def _remedy(kind: str, variables: Mapping[str, str], installed: Installed) -> str:
    """Why JAX does not use an accelerator that is there."""
    chosen = variables.get("JAX_PLATFORMS", "")
    if chosen and PLATFORMS[kind] not in chosen and not {"cuda", "rocm"} & set(chosen.split(",")):
        return f"unset JAX_PLATFORMS, which is '{chosen}'"
    version = f"=={installed['jax'].version}" if "jax" in installed else ""
    needed = {"TPU": ("libtpu", "tpu"), "NVIDIA": ("cuda", "cuda"), "AMD": ("rocm", "rocm7-local")}
    plugin, extra = needed[kind]
    if not any(plugin in name for name in installed):
        return f"pip install 'jax[{extra}]{version}': this JAX is for CPUs alone"
    return f'JAX_PLATFORMS={PLATFORMS[kind]} python -c "import jax; jax.devices()" says why'


def device_memory(local: Sequence[Any]) -> Check:
    """Memory of this host's devices, before anything of ours lies there."""
    stats = {device: device.memory_stats() for device in local}
    known = {device: s for device, s in stats.items() if s and s.get("bytes_limit")}
    if not known:
        return Check("device memory", "ok", f"not told by {local[0].platform} devices")
    limits = [s["bytes_limit"] for s in known.values()]
    used = {device: s["bytes_in_use"] for device, s in known.items() if s["bytes_in_use"] > USED * s["bytes_limit"]}
    told = f"{gib(min(limits))} each" if len(set(limits)) == 1 else f"{gib(min(limits))} to {gib(max(limits))}"
    problems = []
    if used:
        names = ", ".join(f"{gib(size)} of device {device.id}" for device, size in used.items())
        problems.append(Problem("look", f"{names} in use already", "end what else runs on them"))
    if min(limits) < 0.9 * max(limits):
        problems.append(Problem("look", "devices differ in memory: the smallest decides", "end what else runs on them"))
    return judge("device memory", told, problems)


def computes(local: Sequence[Any]) -> Check:
    """A product on every device of this host, whose result is known."""
    mesh = Mesh(np.array(local), ("device",))
    place = NamedSharding(mesh, PartitionSpec("device"))
    x_BNN = jax.device_put(np.ones((len(local), N, N), np.float32), place)
    found = np.asarray(jax.jit(lambda x: (x @ x).sum((1, 2)), out_shardings=place)(x_BNN))
    wrong = {device: x for device, x in zip(local, found) if x != float(N**3)}
    problems = [
        Problem(
            "FAIL", f"device {device.id}: {x:g} instead of {N**3}", "reinstall jax and jaxlib; else replace the device"
        )
        for device, x in wrong.items()
    ]
    return judge("product", f"{N} x {N} on {len(local)} device{'s' * (len(local) > 1)}: right", problems)


@contextlib.contextmanager
def silent(*, unless: bool) -> Iterator[None]:
    """Drops what libraries say on stderr while they look for devices in vain. unless: leave it, since it may be the last word of an abort."""
    if unless:
        yield
        return
    sys.stderr.flush()
    own = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)
        os.close(nowhere)
