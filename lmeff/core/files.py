"""Files and folders that are written whole or not at all."""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmeff.core.errors import CheckpointError, UserError

STALE = 24 * 3600  # seconds after which a folder that was never finished is cleared away

_passing: set[Path] = set()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 next to `path`, flushes it to the disk, then takes its place: a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_asked(option: str, path: Path, text: str) -> None:
    """The same of a file that an option names; raises `UserError` where it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--{option}: cannot write {path}: {error.strerror}; choose a folder of your own") from error


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path) -> None:
    """Raises `CheckpointError` where something is at `path` already."""
    if path.exists():
        raise CheckpointError(f"{path}: exists already, expected a place for a new folder; delete it or choose another")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends, and is removed when it raises; raises `CheckpointError` where `path` exists."""
    refuse_existing(path)
    partial = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    for old in partial.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        if time.time() - old.stat().st_mtime > STALE:
            shutil.rmtree(old, ignore_errors=True)
    try:
        with passing(partial):
            partial.mkdir(parents=True)
            yield partial
            refuse_existing(path)
            partial.rename(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}), expected room and permission; choose another place"
        ) from error


@contextmanager
def passing(folder: Path) -> Iterator[Path]:
    """A folder that is removed when the block ends, unless it was renamed by then."""
    _passing.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _passing.discard(folder)


def clear_passing() -> None:
    """Removes the folders of all open `passing` blocks: for a process that ends without leaving them."""
    for folder in tuple(_passing):
        shutil.rmtree(folder, ignore_errors=True)
