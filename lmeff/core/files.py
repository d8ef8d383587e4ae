"""Files that are written whole or not at all."""

import os
from pathlib import Path

from lmeff.core.errors import UserError


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
