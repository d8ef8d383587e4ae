"""Several processes of one command on this machine, as a pod would run it: started, watched, and ended together.

Process 0 has the terminal; the others are silent. The first to fail is told once, with its exit code, and the rest are stopped: none waits
inside a collective for a peer that is gone, and none outlives the launcher.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import tyro

from lmeff.core.errors import UsageError, UserError
from lmeff.parallel.processes import VARIABLE, Failure, Seat, failure_of, join, launched

POLL = 0.02  # seconds
GRACE = 15.0  # seconds that stopped processes have, to finish a checkpoint that is being written
TAIL = 30  # lines told of a process that died without a reason
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ABORTED = -signal.SIGABRT


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a command runs on.

    Attributes:
        devices: force so many simulated CPU devices.
        processes: share the simulated devices among so many processes on this machine, as the hosts of a pod share theirs.
        distributed: join the processes of a cluster (TPU pod, Slurm, Kubernetes, Open MPI); start the same command on every host.
    """

    devices: int | None = None
    processes: int | None = None
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False

    @property
    def copies(self) -> int:
        """How many processes to start for the command, 1 for none but this one; raises `UsageError` for numbers that cannot be."""
        count, devices = self.processes, self.devices
        if count is None or launched() is not None:
            return 1
        if self.distributed:
            raise UsageError(
                "--processes: got it with --distributed, expected one of the two: a cluster starts its own processes"
            )
        if count < 1:
            raise UsageError(f"--processes: got {count}, expected at least 1")
        if devices is None:
            raise UsageError(
                f"--processes: got {count} without --devices, expected the number of simulated CPU devices that the processes share. "
                "On a pod or another cluster start the same command on every host with --distributed instead."
            )
        if devices < 1 or devices % count:
            raise UsageError(
                f"--processes: got {count} processes for --devices {devices}, expected a divisor of the devices: every process has equally many"
            )
        return count

    def prepare(self) -> None:
        """Simulates devices and joins the other processes, before JAX looks for devices."""
        seat = launched()
        if self.devices is not None:
            simulate_devices(self.devices if seat is None else self.devices // seat.count)
        join(cluster=self.distributed)


def simulate_devices(devices: int) -> None:
    """Forces simulated CPU devices; works until JAX has looked for devices."""
    if devices < 1:
        raise UsageError(f"--devices: got {devices}, expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


class Stopped(UserError):
    """One process failed, or all were told to stop; `exit_code` is the failed one's."""

    def __init__(self, message: str, exit_code: int) -> None:
        """`exit_code`: what the command line returns."""
        super().__init__(message)
        self.exit_code = exit_code


class Peers(NamedTuple):
    """The processes, and the folder of their seats: reasons of failures, and what the silent ones wrote to stderr."""

    processes: list["subprocess.Popen[Any]"]
    folder: Path


def launch(command: Sequence[str], processes: int) -> None:
    """Runs so many copies of `command` until all have ended; returns where all succeeded, raises `Stopped` with the first failure else."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="lmeff-") as name, _signals() as received:
        peers = Peers([], Path(name))
        coordinator = f"127.0.0.1:{_free_port()}"
        try:
            for index in range(processes):
                seat = Seat(coordinator, index, processes, reader, name)
                peers.processes.append(_start(command, seat))
            _watch(peers, received)
        finally:
            for process in peers.processes:
                _signal(process, signal.SIGKILL)
                process.wait()
            os.close(reader)
            os.close(writer)


def _start(command: Sequence[str], seat: Seat) -> "subprocess.Popen[Any]":
    environment = {**os.environ, VARIABLE: json.dumps(seat._asdict())}
    options: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if seat.index > 0:
            errors = stack.enter_context(open(_stderr(seat.index, Path(seat.folder)), "wb"))
            options = {"stdout": subprocess.DEVNULL, "stderr": errors}
        return subprocess.Popen(
            [*command],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(seat.lifeline,),
            process_group=0,  # so that a signal from the terminal comes from here alone, and nothing below a process outlives it
            **options,
        )


def _watch(peers: Peers, received: list[int]) -> None:
    """Waits until all have succeeded; raises `Stopped` at the first failure, or a bounded time after a signal."""
    while True:
        codes = [process.poll() for process in peers.processes]
        if received:
            _stop(peers, received)
        if any(codes):
            raise _first_failure(peers)
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL)


def _stop(peers: Peers, received: list[int]) -> None:
    """Passes the signal on, waits for the processes to end, no longer than `GRACE` or until a second signal, and raises `Stopped`."""
    told = received[0]
    for process in peers.processes:
        _signal(process, told)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and len(received) == 1 and any(p.poll() is None for p in peers.processes):
        time.sleep(POLL)
    word = "interrupted" if told == signal.SIGINT else f"stopped by {signal.Signals(told).name}"
    raise Stopped(f"{word}; the same command goes on from the last checkpoint", 128 + told)


def _first_failure(peers: Peers) -> Stopped:
    """What went wrong first. A peer's death makes errors in others, so the reasons are put in order of time; one may be told before its process ends."""
    codes = [process.poll() for process in peers.processes]
    found = [failure_of(index, peers.folder) for index in range(len(codes))]
    ends = [code or (failure.exit_code if failure else 0) for code, failure in zip(codes, found)]
    failed = [(index, code) for index, code in enumerate(ends) if code]
    index, code = min(failed, key=lambda pair: _rank(pair[1], found[pair[0]]))
    return _told(index, code, found[index], peers)


def _rank(code: int, failure: Failure | None) -> tuple[int, int]:
    """Killed from outside, then those that gave a reason by time; JAX aborts a process whose coordinator is gone, so that comes last."""
    if failure is not None:
        return 1, failure.at
    return (0 if code < 0 and code != ABORTED else 2), 0


def _told(index: int, code: int, failure: Failure | None, peers: Peers) -> Stopped:
    if failure is not None:
        return Stopped(failure.message, failure.exit_code)
    who = f"process {index} of {len(peers.processes)}"
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    message = f"{who} {how}; the others were stopped; the same command goes on from the last checkpoint"
    tail = _tail(index, peers.folder) if code != -signal.SIGKILL else ""
    return Stopped(f"{message}{tail}", 128 - code if code < 0 else code)


def _tail(index: int, folder: Path) -> str:
    file = _stderr(index, folder)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if file.exists() else []
    return "".join(f"\n  {line}" for line in lines)


def _stderr(index: int, folder: Path) -> Path:
    return folder / f"{index}.stderr"


def _signal(process: "subprocess.Popen[Any]", number: int) -> None:
    """To the whole process group, which may outlive its leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that arrive in the block, in order, instead of what they do elsewhere."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays nohup
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def this_command(words: Sequence[str]) -> list[str]:
    """The command line of this interpreter that runs `lmeff` with these words."""
    return [sys.executable, "-m", "lmeff.cli", *words]
