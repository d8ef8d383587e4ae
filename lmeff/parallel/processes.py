"""Several processes that run one program: joining them, waiting for each other, and which of them writes.

Every process runs the same code on the same config and differs only in the devices it drives. Arrays span all of them, so whatever touches an array is
done by all; files, the report and the terminal belong to process 0 alone. Where they come from: a cluster that JAX knows (TPU pods, Slurm,
Kubernetes, Open MPI: https://docs.jax.dev/en/latest/multi_process.html), or `lmeff.launch` on one machine.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from lmeff.core.errors import Preempted, UsageError
from lmeff.core.files import write_text

VARIABLE = "LMEFF_LAUNCHED"  # in the environment of a process that `lmeff.launch` started: its `Seat` as JSON
LAST = 6.0  # seconds that the other hosts of a cluster have to leave before process 0: JAX aborts whoever loses its coordinator
NOTICE = 20.0  # seconds until it is told that the other hosts of a cluster are waited for
JOINING = 300.0  # seconds until they are no longer waited for
PATIENCE = 24 * 3600  # seconds at a barrier: one process may prepare data for all. A peer's death ends it sooner.

_barriers = itertools.count()


class Seat(NamedTuple):
    """The place of a launched process.

    coordinator: host:port of process 0.
    lifeline:    a file descriptor that ends with the launcher, however that ends.
    folder:      where a process leaves the reason of its failure, for the launcher to tell.
    """

    coordinator: str
    index: int
    count: int
    lifeline: int
    folder: str


class Failure(NamedTuple):
    """Why a launched process ended: what to tell, the exit code, and when, in nanoseconds of the machine's monotonic clock."""

    message: str
    exit_code: int
    at: int


def launched() -> Seat | None:
    """The seat of this process; None where no launcher started it."""
    told = os.environ.get(VARIABLE)
    return Seat(**json.loads(told)) if told else None


def join(*, cluster: bool) -> None:
    """Joins the other processes, before JAX looks for devices: those of the launcher, or of the cluster that JAX detects where one is asked for."""
    seat = launched()
    if seat is not None or cluster:
        _keep_stdout()
        jax.config.update("jax_enable_preemption_service", True)  # tells all when one is told (`preemption`)
    if seat is not None:
        threading.Thread(target=_end_with_launcher, args=(seat,), daemon=True).start()
        jax.config.update("jax_check_proxy_envs", False)  # the peers are on this machine
        jax.distributed.initialize(
            seat.coordinator,
            seat.count,
            seat.index,
            cluster_detection_method="deactivate",
            coordinator_bind_address=seat.coordinator,
        )
    elif cluster:
        come = threading.Event()
        threading.Thread(target=_wait_for_hosts, args=(come,), daemon=True).start()
        try:
            jax.distributed.initialize(initialization_timeout=int(JOINING) + 60)  # then JAX aborts, with a trace
        except ValueError as error:
            raise UsageError(
                f"--distributed: JAX finds no cluster here ({error}); expected a TPU pod, Slurm, Kubernetes or Open MPI, with the same command "
                "started on every host. On one machine leave it out, or use --processes."
            ) from error
        finally:
            come.set()


def _wait_for_hosts(come: threading.Event) -> None:
    """Tells that this host waits for others, and ends the process where they do not come: the main thread is inside JAX, which would abort."""
    if come.wait(NOTICE):
        return
    print(
        "lmeff: waiting for the other hosts; --distributed is to be started on every one of them",
        file=sys.stderr,
        flush=True,
    )
    if not come.wait(JOINING - NOTICE):
        leave(
            f"--distributed: not all hosts came within {JOINING:.0f} s, expected the same command on every one at about the same time. Look for a host that "
            "does not run it, or that cannot reach the first by its name and port.",
            1,
        )


def joined() -> bool:
    """Whether this is one of several processes."""
    return jax.distributed.is_initialized()


def refuse_unjoined() -> None:
    """Raises `UsageError` on a pod where the run was not told of the other hosts: each would write as if it were alone."""
    if jax.process_count() > 1 and not joined():
        raise UsageError(
            f"this host is one of {jax.process_count()} of a pod, and the command runs alone; expected it on every host with --distributed"
        )


def leads() -> bool:
    """Whether this process writes for all."""
    return not joined() or jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until all processes are here. Not a collective on devices: those give up on a peer that is minutes late."""
    if joined():
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(f"lmeff {name} {next(_barriers)}", timeout=PATIENCE, processes=everyone)


def same(text: str) -> bool:
    """Whether every process came with the same text."""
    if not joined():
        return True
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(own) == own).all())


def whole(x: jax.Array) -> np.ndarray:
    """All of an array on every host, also where other processes hold parts of it; all processes must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def leave(message: str, exit_code: int) -> None:
    """Ends this process at once after a failure: an orderly shutdown would wait for peers that wait for this process inside a collective.

    A launched process leaves the reason to its launcher, which tells the first one alone; any other prints it.
    """
    seat = launched()
    if seat is not None:
        failure = Failure(message, exit_code, time.monotonic_ns())
        write_text(Path(seat.folder) / str(seat.index), json.dumps(failure._asdict()))
    elif message:
        print(f"lmeff: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code == Preempted.exit_code and seat is None and joined() and leads():
        time.sleep(LAST)
    os._exit(exit_code)


def failure_of(index: int, folder: Path) -> Failure | None:
    """The reason that a launched process left; None where it had no chance to."""
    file = folder / str(index)
    return Failure(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _keep_stdout() -> None:
    """Leaves stdout to Python: what connects the processes prints a line there for every connection it makes."""
    own = os.dup(1)
    sys.stdout.flush()
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.close(silent)


def _end_with_launcher(seat: Seat) -> None:
    os.read(seat.lifeline, 1)  # nobody writes: it returns when the launcher's end is closed
    shutil.rmtree(seat.folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
