"""Who has the accelerators of this machine, and libtpu's lock file, before JAX looks.

libtpu lets one process on a host take the TPU: it locks /tmp/libtpu_lockfile with lockf, and gives up where it cannot open the file, which belongs to
who made it (https://github.com/openxla/xla/blob/main/xla/stream_executor/tpu/tpu_initialize_util.cc; https://github.com/jax-ml/jax/issues/10192).
"""

import fcntl
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from lmeff.core.accelerators import DEVICES
from lmeff.doctor.check import Check

FLOCK = "hhqqi"  # struct flock: type, whence, start, length, process
LOCKFILE = "tmp/libtpu_lockfile"


def holders(root: Path = Path("/"), own: int | None = None) -> dict[str, dict[int, str]]:
    """By kind, the processes that have an accelerator open: `{pid: command}`. Those of other users are seen by root alone."""
    found: dict[str, dict[int, str]] = {}
    for process in (root / "proc").glob("[0-9]*"):
        if int(process.name) == (os.getpid() if own is None else own):
            continue
        for kind in _open_kinds(process):
            found.setdefault(kind, {})[int(process.name)] = _command(process)
    return found


def _open_kinds(process: Path) -> set[str]:
    kinds = set()
    try:
        for file in (process / "fd").iterdir():
            target = os.readlink(file)
            kinds |= {kind for kind, name in DEVICES.items() if re.fullmatch(name, target)}
    except OSError:
        pass  # it has ended, or belongs to someone else
    return kinds


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return "?"
    return " ".join(filter(None, words))[:60] or "?"


def in_use(there: Mapping[str, int], found: Mapping[str, Mapping[int, str]]) -> Check:
    """Whether another process has the accelerators. A TPU serves one process; GPUs are shared, and their memory with them."""
    if not there:
        return Check("accelerators", "ok", "none on this machine")
    told = ", ".join(f"{count} x {kind}" for kind, count in there.items())
    used = {kind: found[kind] for kind in there if found.get(kind)}
    if not used:
        return Check("accelerators", "ok", f"{told}, in use by nobody that can be seen")
    names = "; ".join(f"process {pid} ({command})" for kind in used.values() for pid, command in kind.items())
    pids = " ".join(str(pid) for kind in used.values() for pid in kind)
    level = "FAIL" if "TPU" in used else "look"
    return Check(
        "accelerators",
        level,
        f"{told}, {' and '.join(used)} in use by {names}",
        f"wait for it; if it is yours: kill {pids}",
    )


def tpu_lock(there: Mapping[str, int], variables: Mapping[str, str], root: Path = Path("/")) -> Check:
    """libtpu's lock file: free, held by a living process, or left over."""
    file = root / LOCKFILE
    if not file.exists():
        return Check("TPU lock", "ok", "no lock file of libtpu")
    status = file.stat()
    pid = _locked_by(file, root)
    if pid is not None:
        by = f"process {pid} ({_command(root / 'proc' / str(pid))})" if pid > 0 else "a process of another container"
        told = f"{file} is held by {by}"
        if variables.get("ALLOW_MULTIPLE_LIBTPU_LOAD", "0") not in ("0", "false", ""):
            return Check("TPU lock", "ok", f"{told}; ALLOW_MULTIPLE_LIBTPU_LOAD passes over it")
        if not there.get("TPU"):
            return Check("TPU lock", "ok", f"{told}, which matters where there is a TPU")
        remedy = f"wait for it; if it is yours: kill {pid}" if pid > 0 else "wait for it, or end it there"
        return Check("TPU lock", "FAIL", told, remedy)
    if not there.get("TPU"):
        return Check("TPU lock", "ok", f"{file} is left over, which matters where there is a TPU")
    remedy = f"sudo rm -f {file}"
    if os.access(file, os.R_OK | os.W_OK):
        return Check("TPU lock", "look", f"{file} is left over from a process that has ended", remedy)
    told = f"{file} belongs to user {status.st_uid}, nobody holds it, and libtpu cannot open it"
    return Check("TPU lock", "FAIL", told, remedy)


def _locked_by(file: Path, root: Path) -> int | None:
    """The process that holds a lock on the file, 0 or less where it is in another container; None where nobody does."""
    try:
        with file.open("r+b") as opened:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(opened, fcntl.F_GETLK, asked))
            return None if kind == fcntl.F_UNLCK else pid
    except OSError:  # not ours to open
        return _listed(file.stat(), root)


def _listed(status: os.stat_result, root: Path) -> int | None:
    """The same from /proc/locks, whose rows are like "1: POSIX ADVISORY WRITE 3568 fd:00:2531452 0 EOF"."""
    try:
        rows = (root / "proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for words in map(str.split, rows):
        if "->" in words or len(words) < 6:
            continue  # waits for a lock
        major, minor, inode = words[5].split(":")
        if int(inode) == status.st_ino and os.makedev(int(major, 16), int(minor, 16)) == status.st_dev:
            return int(words[4])
    return None
