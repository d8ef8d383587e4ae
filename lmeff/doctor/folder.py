"""The run folder: whether it can be written as checkpoints are, whether locks hold there, who has it, and what time its disk has."""

import contextlib
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from lmeff.doctor.check import Check, Problem, judge
from lmeff.doctor.space import existing

PREFIX = ".lmeff-doctor-"
WORDS = b"written by lmeff doctor, and deleted by it\n"
SKEW = 2.0  # seconds between this clock and that of the disk
DAY = 24 * 3600


@contextlib.contextmanager
def standing(directory: Path) -> Iterator[None]:
    """The folder and those above it are there while the block runs; what was made for it, and is still empty, is gone after."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    with contextlib.suppress(OSError):  # what cannot be made is told by `writable`
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # another process began a run there meanwhile
                folder.rmdir()


def writable(directory: Path) -> Check:
    """Does all that a run does there: create, write, flush, lock, rename, read back, delete. Leaves nothing."""
    if "://" in str(directory) or ":/" in str(directory):
        return _remote(directory)
    began, first = time.perf_counter(), directory / f"{PREFIX}{uuid.uuid4().hex}"
    second = first.with_name(f"{first.name}.renamed")
    at = "create a file"
    try:
        with first.open("xb") as file:
            at = "write"
            file.write(WORDS)
            file.flush()
            at = "flush to the disk"
            os.fsync(file.fileno())
            at = "lock a file"
            locks = _locks(first)
        at = "rename"
        first.rename(second)
        at = "read back"
        same = second.read_bytes() == WORDS
        at = "delete"
        second.unlink()
    except OSError as error:
        for left in (first, second):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        return Check("folder", "FAIL", f"{directory}: cannot {at} ({error.strerror})", _remedy(directory))
    problems = []
    if not same:
        problems.append(Problem("FAIL", "what is read back differs from what was written", "choose another disk"))
    if not locks:
        told = "locks do not hold: two runs in one folder would not notice each other"
        problems.append(Problem("look", told, "mount it with locks (NFS 4; no nolock), or start each run once"))
    return judge("folder", f"{directory}: written, locked and renamed in {time.perf_counter() - began:.2g} s", problems)


def _locks(file: Path) -> bool:
    """Whether a second lock of a locked file is refused, as `lmeff.train.checkpoint.lock` wants it."""
    with file.open("ab") as one, file.open("ab") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


def _remote(directory: Path) -> Check:
    told = f"{directory} is a URL, and a run writes to folders only; nothing of it was checked"
    return Check(
        "folder", "FAIL", told, "mount the bucket (gcsfuse) or another disk that all hosts see, and set --runs"
    )


def _remedy(directory: Path) -> str:
    there = existing(directory)
    if not there.is_dir():
        return f"{there} is a file; choose another --runs"
    owner = "" if os.access(there, os.W_OK | os.X_OK) else f": {there} belongs to {_owner(there)}"
    return f"set --runs to a folder of your own{owner}"


def _owner(folder: Path) -> str:
    try:
        return folder.owner()
    except (KeyError, OSError):
        return "a user unknown here"


def lock(directory: Path, runs: Path, root: Path = Path("/")) -> Check:
    """Who has the run folder, or, where `directory` is `runs` itself, which runs in it are in use."""
    if directory == runs:
        used = [f"{file.parent.name} by {_holder(file)}" for file in sorted(runs.glob("*/.lock")) if is_locked(file)]
        return Check("run lock", "ok", f"runs in use: {', '.join(used)}" if used else "no run in use")
    file = directory / ".lock"
    if not file.exists() or not is_locked(file):
        return Check("run lock", "ok", f"{directory} is free")
    holder, told = _holder(file), f"{directory} is in use by {_holder(file)}"
    words = holder.split()  # "process 12 on host"
    if len(words) != 4 or words[3] != socket.gethostname():
        return Check("run lock", "FAIL", told, "wait for it, end it there, or choose another --name")
    if (root / "proc" / words[1]).exists():
        return Check(
            "run lock",
            "FAIL",
            f"{told}, which runs",
            f"wait for it, kill {words[1]} if it is yours, or choose another --name",
        )
    told += ", which has ended: something that it started holds the lock"
    return Check("run lock", "FAIL", told, f"end that: lsof {file}")


def is_locked(file: Path) -> bool:
    """Whether another process holds it; asks for a shared lock, so that two that ask do not see each other."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks there, or not ours to read: `writable` tells
    return False


def _holder(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace").strip() or "another process"


def disk_time(directory: Path) -> float:
    """What time the disk says a file was written that is written now, minus what this host says."""
    file = directory / f"{PREFIX}{uuid.uuid4().hex}"
    try:
        before = time.time()
        file.write_bytes(WORDS)
        after, found = time.time(), file.stat().st_mtime
    finally:
        file.unlink(missing_ok=True)
    return found - min(max(found, before), after)


def clock(skew: float | None, jump: float, now: float, installed: float) -> Check:
    """This host's clock.

    skew: of the run folder's disk, None where nothing can be written there. jump: seconds that the wall clock went more than the steady one
    since the doctor began. now, installed: seconds since 1970, and when the newest package was installed.
    """
    told, problems = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)), []
    set_it = "set the clock: sudo timedatectl set-ntp true"
    if now < installed - DAY:
        when = time.strftime("%Y-%m-%d", time.gmtime(installed))
        problems.append(Problem("FAIL", f"it is before {when}, when packages were installed", set_it))
    if abs(jump) > 1:
        problems.append(Problem("look", f"the clock jumped by {jump:+.1f} s while the doctor ran", set_it))
    if skew is not None and abs(skew) > SKEW:
        problems.append(
            Problem("look", f"the run folder's disk is {skew:+.1f} s off", f"{set_it}, here and on the file server")
        )
    alike = skew is not None and abs(skew) <= SKEW
    return judge("clock", told + ", as the run folder's disk" * alike, problems)
