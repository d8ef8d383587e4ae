"""One attempt: the processes of a command are started, watched, and ended together.

Process 0 has the terminal; the others are silent. The first to fail decides, and the rest are stopped: none waits inside a collective for a
peer that is gone, and none outlives the launcher. Processes that are told to stop have time to save first.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lmeff.core.errors import Preempted, UserError
from lmeff.parallel.processes import VARIABLE, Failure, Seat, failure_of

POLL = 0.02  # seconds
GRACE = 60.0  # seconds from being told to stop, to come to a safe point and save
TAIL = 30  # lines told of a process that died without a reason
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVED = Preempted.exit_code
NEEDS_MENDING = range(2, 7)  # exit codes: usage, config, data, checkpoint, does not fit
GOES_ON = "the same command goes on from the last checkpoint"


class Stopped(UserError):
    """A process failed, or all were told to stop; `exit_code` is what the command line returns."""

    def __init__(self, message: str, exit_code: int, told: int | None = None) -> None:
        """`told`: the signal that the launcher itself received, if any."""
        super().__init__(message)
        self.exit_code, self.told = exit_code, told


class Peers(NamedTuple):
    """The processes, and the folder of their seats: reasons of failures, and what the silent ones wrote to stderr."""

    processes: list["subprocess.Popen[Any]"]
    folder: Path


def attempt(command: Sequence[str], processes: int, received: list[int]) -> None:
    """Runs so many copies of `command` until all have ended; returns where all succeeded, raises `Stopped` else.

    received: the signals of this process, as `signals` gives them.
    """
    if received:
        raise stopped_by(received[0])
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="lmeff-") as name, _reserved_port() as port:
        peers = Peers([], Path(name))
        try:
            for index in range(processes):
                seat = Seat(f"127.0.0.1:{port}", index, processes, reader, name)
                peers.processes.append(_start(command, seat))
            _watch(peers, received)
        finally:
            for process in peers.processes:
                _kill(process)
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
    """Waits until all have succeeded; raises `Stopped` at the first failure, or a bounded time after all were told to stop."""
    while not _all_succeeded(peers):
        if received:
            return _stop(peers, received)
        if any(process.poll() for process in peers.processes):
            return _fail(peers, received)
        time.sleep(POLL)
    return None


def _all_succeeded(peers: Peers) -> bool:
    return all(process.poll() == 0 for process in peers.processes)


def _stop(peers: Peers, received: list[int]) -> None:
    """Passes on a signal to the launcher. What the user has to mend, such as a full disk, is told first, then what was saved."""
    told = received[0]
    late = _tell(peers, told, lambda: len(received) > 1)
    if _all_succeeded(peers):
        return
    saved = None if late else _reason(peers, (SAVED,), told)
    raise _reason(peers, NEEDS_MENDING, told) or saved or stopped_by(told, late)


def _reason(peers: Peers, codes: Collection[int], told: int | None = None) -> Stopped | None:
    """The first reason with one of these exit codes."""
    found = [failure_of(index, peers.folder) for index in range(len(peers.processes))]
    fitting = [failure for failure in found if failure and failure.exit_code in codes]
    first = min(fitting, key=lambda failure: failure.at, default=None)
    return Stopped(first.message, first.exit_code, told) if first else None


def stopped_by(told: int, late: int = 0) -> Stopped:
    """What a signal to the launcher comes to. late: how many processes had not ended in time."""
    word = "interrupted" if told == signal.SIGINT else f"stopped by {signal.Signals(told).name}"
    killed = f", and {late} that did not end in time killed" if late else ""
    return Stopped(f"{word}{killed}; {GOES_ON}", SAVED if told == signal.SIGTERM else 128 + told, told)


def _fail(peers: Peers, received: list[int]) -> None:
    """Raises what went wrong. Where a process was told to stop, the others are told too: they save with it, or would wait for it in vain."""
    end = _first_failure(peers)
    if end.exit_code != SAVED:
        raise end
    _tell(peers, signal.SIGTERM, lambda: bool(received))
    if received:
        _stop(peers, received)
    raise _reason(peers, NEEDS_MENDING) or end


def _tell(peers: Peers, number: int, hurried: Callable[[], bool]) -> int:
    """Passes a signal on, and waits for the processes to end, no longer than `GRACE`; gives how many have not."""
    for process in peers.processes:
        process.send_signal(number)  # nothing happens to one that has ended
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and not hurried() and any(p.poll() is None for p in peers.processes):
        time.sleep(POLL)
    return sum(p.poll() is None for p in peers.processes)


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
    return (0 if code < 0 and code != -signal.SIGABRT else 2), 0


def _told(index: int, code: int, failure: Failure | None, peers: Peers) -> Stopped:
    if failure is not None:
        return Stopped(failure.message, failure.exit_code)
    who = f"process {index} of {len(peers.processes)}"
    if code == -signal.SIGTERM:  # before it listened: there was nothing to save
        return Stopped(f"{who} was told to stop before it ran; the others were stopped; {GOES_ON}", SAVED)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    tail = _tail(index, peers.folder) if code != -signal.SIGKILL else ""
    return Stopped(f"{who} {how}; the others were stopped; {GOES_ON}{tail}", 128 - code if code < 0 else code)


def _tail(index: int, folder: Path) -> str:
    file = _stderr(index, folder)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if file.exists() else []
    return "".join(f"\n  {line}" for line in lines)


def _stderr(index: int, folder: Path) -> Path:
    return folder / f"{index}.stderr"


def _kill(process: "subprocess.Popen[Any]") -> None:
    """The whole process group, which may outlive its leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
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


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A port for the coordinator that nobody else is given meanwhile: a socket that does not listen holds it, and gRPC may share it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
