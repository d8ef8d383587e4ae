"""What a command runs on: the devices of this process, simulated ones, those of several processes, or those of a cluster."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import tyro

from lmeff.core.accelerators import hardware
from lmeff.core.errors import UsageError
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.processes import join, launched


class Share(NamedTuple):
    """How many processes to start for a command, 0 for none but this one, and the simulated devices that they share."""

    processes: int
    devices: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a command runs on.

    Attributes:
        devices: force so many simulated CPU devices.
        processes: a pod on this machine: so many processes of the command, joined as the hosts of a pod are. They share simulated CPU devices,
            as many as the config's mesh has where no --devices are given.
        restarts: babysit the processes: start all again, at most so many times, after one was killed, crashed or was told to stop (exit code 42).
            Exit codes 2 to 6, Ctrl-C and SIGTERM end the command.
        distributed: join the processes of a cluster (TPU pod, Slurm, Kubernetes, Open MPI); start the same command on every host.
    """

    devices: int | None = None
    processes: int | None = None
    restarts: int = 0
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False

    def share(self, mesh: MeshPlan | None = None) -> Share:
        """What to start for a command on this mesh, one device a process where it has none; raises `UsageError` for numbers that cannot be."""
        count = self.processes
        if launched() is not None:
            return Share(0, 0)
        self._check_options()
        if count is None or (count == 1 and not self.restarts):
            return Share(0, 0)
        if self.devices is None:
            if getattr(jax.config, "jax_platforms", None) != "cpu":
                _refuse_chips(count, hardware())
            return Share(count, _devices(count, mesh))
        if self.devices < 1 or self.devices % count:
            raise UsageError(
                f"--processes: got {count} processes for --devices {self.devices}, expected a divisor of the devices: "
                "every process has equally many"
            )
        return Share(count, self.devices)

    def prepare(self) -> None:
        """Simulates devices and joins the other processes, before JAX looks for devices."""
        seat = launched()
        if self.devices is not None:
            simulate_devices(self.devices if seat is None else self.devices // seat.count)
        join(cluster=self.distributed)

    def _check_options(self) -> None:
        if self.processes is not None and self.distributed:
            raise UsageError(
                "--processes: got it with --distributed, expected one of the two: a cluster starts its own processes"
            )
        if self.processes is not None and self.processes < 1:
            raise UsageError(f"--processes: got {self.processes}, expected at least 1")
        if self.restarts < 0:
            raise UsageError(f"--restarts: got {self.restarts}, expected 0 or more")
        if self.restarts and self.processes is None:
            raise UsageError(
                f"--restarts: got {self.restarts} without --processes, expected it with the processes that are started on this machine "
                "(--processes 1 is one). A cluster restarts its own; for TPU machines tpu_scripts/babysit.sh does."
            )


def _devices(count: int, mesh: MeshPlan | None) -> int:
    """Simulated devices for so many processes: those of the mesh, and where its `data` is free the fewest that all processes share."""
    if mesh is None:
        return count
    wanted = mesh.devices
    if mesh.data is None:
        return math.lcm(wanted, count)
    if wanted % count:
        raise UsageError(
            f"--processes: got {count} processes for a mesh of {wanted} devices, expected a divisor of the devices: every process has equally "
            "many. Change the degrees of the mesh, or leave mesh.data out: it takes as many as there are."
        )
    return wanted


def _refuse_chips(count: int, found: Mapping[str, int]) -> None:
    if found:
        told = ", ".join(f"{chips} x {kind}" for kind, chips in found.items())
        raise UsageError(
            f"--processes: got {count} on a machine with {told}, expected --devices too: processes of one machine have simulated CPU devices. "
            "To use the chips leave --processes out: one process drives all chips of a host, and on several hosts the same command is started "
            "on each with --distributed."
        )


def simulate_devices(devices: int) -> None:
    """Forces simulated CPU devices; works until JAX has looked for devices."""
    if devices < 1:
        raise UsageError(f"--devices: got {devices}, expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def this_command(words: Sequence[str], options: Iterable[object] = ()) -> list[str]:
    """The command line of this interpreter that runs `lmeff` with these words, and with `options` behind the command's name."""
    return [sys.executable, "-m", "lmeff.cli", *words[:1], *map(str, options), *words[1:]]
