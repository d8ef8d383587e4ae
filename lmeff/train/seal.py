"""A checkpoint's files sealed with SHA-256 sums, so that one flipped bit anywhere in them is noticed.

The sums stand in the format of the `sha256sum` tool: `cd STEP && sha256sum -c SHA256SUMS` checks a checkpoint by hand.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmeff.core.files import write_text

NAME = "SHA256SUMS"
THREADS = 4


def seal(directory: Path) -> None:
    """Writes the sums of all files below `directory`; complete or not at all."""
    write_text(directory / NAME, "".join(f"{value}  {path}\n" for path, value in _sums(directory).items()))


def broken(directory: Path) -> str | None:
    """What does not match the seal, in words; None where all does. A directory that was never sealed matches."""
    file = directory / NAME
    if not file.exists():
        return None
    found = _sums(directory)
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError:
        return f"{NAME} cannot be read"
    for line in lines:
        _, _, path = line.rstrip("\n").partition("  ")
        if path not in found:
            return f"{path!r} is listed in {NAME} and missing"
        if line != f"{found.pop(path)}  {path}\n":
            return f"{path!r} does not match its sum in {NAME}"
    return f"{next(iter(found))!r} is not listed in {NAME}" if found else None


def _sums(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / NAME)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip((p.relative_to(directory).as_posix() for p in files), pool.map(_sum, files), strict=True))


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
