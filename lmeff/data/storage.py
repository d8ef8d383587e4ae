"""Files, local or behind a URL (`gs://`, `s3://`, `memory://`, ... through fsspec): listed, opened, and refused by name."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lmeff.core.errors import DataError, MissingExtra
from lmeff.core.extras import require

ENDINGS: dict[str, str] = {
    "text": r"\.(txt|md|py|rst)$",
    "jsonl": r"\.jsonl$",
    "parquet": r"\.parquet$",
    "array_record": r"\.array_?record(-\d+-of-\d+)?$",
}


class File(NamedTuple):
    """A file that was found. `name` is its path below the folder it was found in; `size` in bytes."""

    path: str
    name: str
    size: int


def is_remote(path: str) -> bool:
    """Whether `path` is a URL."""
    return "://" in path


def kind_of(path: str) -> str | None:
    """The source that a file's ending names, or None."""
    return next((kind for kind, ending in ENDINGS.items() if re.search(ending, path)), None)


def resolve(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    return require("fsspec", extra="remote").core.url_to_fs(url)


def find(path: str, leave_out: frozenset[str] = frozenset()) -> list[File]:
    """The file at `path`, or all files below the folder `path` in order of name; hidden ones and local folders named in `leave_out` are not.
    Absent: `DataError`."""
    try:
        found = _find_remote(path) if is_remote(path) else _find_local(Path(path).expanduser(), leave_out)
    except MissingExtra:
        raise
    except Exception as error:  # every remote file system has errors of its own
        raise DataError(
            f"'{path}' cannot be listed ({error}), expected a readable file, folder or URL; check it and your access to it"
        ) from error
    if found is None:
        raise DataError(
            f"'{path}' does not exist, expected a file, a folder or a URL; check its spelling (a relative path starts at {os.getcwd()})"
        )
    return sorted(found, key=lambda file: file.name)


def _find_local(root: Path, leave_out: frozenset[str]) -> list[File] | None:
    if root.is_file():
        return [File(str(root), root.name, root.stat().st_size)]
    if not root.is_dir():
        return None
    found = []
    for folder, below, names in os.walk(root, onerror=_raise):
        below[:] = [name for name in below if not name.startswith(".") and name not in leave_out]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [File(str(p), p.relative_to(root).as_posix(), p.stat().st_size) for p in paths if p.is_file()]
    return found


def _raise(error: OSError) -> None:
    raise error


def _find_remote(url: str) -> list[File] | None:
    fs, root = resolve(url)
    if not fs.exists(root):
        return None
    if fs.isfile(root):
        return [File(url, root.rsplit("/", 1)[-1], fs.info(root)["size"])]
    found = fs.find(root, detail=True)
    named = {path: path[len(root) :].lstrip("/") for path in found}
    seen = {path: name for path, name in named.items() if not any(p.startswith(".") for p in name.split("/"))}
    return [File(fs.unstrip_protocol(path), name, found[path]["size"]) for path, name in seen.items()]


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file at `path`, open for reading bytes. What storage says against it becomes a `DataError` that names the file."""
    try:
        with _open(path) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected a readable file. Mend it or leave it out."
        ) from error


def _open(path: str) -> BinaryIO:
    if not is_remote(path):
        return open(path, "rb")
    fs, inner = resolve(path)
    return fs.open(inner, "rb")


def fetch(path: str, local: str) -> None:
    """Copies a remote file to a local one."""
    with opened(path) as source, open(local, "wb") as target:
        shutil.copyfileobj(source, target)
