"""Tensors written as a stream into a folder of safetensors files that appears whole or not at all.

The library's `serialize` wants all tensors of a file at once. Here the header is written first, from shapes and dtypes alone, and each tensor goes to its place
when it comes, in any order: one tensor is in memory at a time. It is the same container, and the library reads it.
"""

import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from lmeff.core.errors import CheckpointError
from lmeff.interop.container import AT_ONCE, INDEX, SINGLE, TensorInfo, code_of, format_header, nbytes_of, refuse
from lmeff.interop.strips import fill

SHARD_BYTES = 5_000_000_000
COPY_BYTES = 16 << 20  # of a tensor whose values do not lie in order, copied at a time


class TensorWriter:
    """Writes tensors one at a time into the shards of a new folder, which takes its name when all are there: a context manager.

    Until then everything lies in a hidden folder beside it (`folder`: put config.json and the like there, too). An error removes that, and what a kill has left
    is removed by the next writer of the same name. On a pod one process writes.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, Any],
        *,
        shard_bytes: int = SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Makes nothing yet; raises `CheckpointError` where it could not.

        specs: shape and dtype (`jax.ShapeDtypeStruct`, or whatever has both) of every tensor by name.
        shard_bytes: the most data in a file; a larger tensor has a file to itself. One file alone has no index.
        metadata: free texts; by default {"format": "pt"}, without which transformers refuses a file.
        """
        self.path = Path(path).absolute()
        self.folder = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._shards = _name_shards(_cut_shards(specs, shard_bytes))
        self._missing = dict(specs)
        self._places: dict[str, TensorInfo] = {}
        self._lock = -1
        try:
            taken = self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))
        except OSError as error:
            self._fail(error)
        if taken:
            refuse(self.path, "something there already", "a new folder", "Choose another place, or remove it.")

    def __enter__(self) -> "TensorWriter":
        """Itself, with headers written and room for the tensors."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.path)
            needed, free = sum(map(nbytes_of, self._missing.values())), shutil.disk_usage(self.path.parent).free
            if needed > free:
                refuse(
                    self.path, f"{free:,} bytes free on its disk", f"{needed:,}", "Make room, or choose another place."
                )
            self.folder.mkdir()
            self._lock = _lock(self.folder)
            for name, specs in self._shards.items():
                self._places |= _begin(self.folder / name, specs, self._metadata)
        except OSError as error:
            self._abandon()
            self._fail(error)
        return self

    def write(self, name: str, value: Any) -> None:
        """Writes a tensor (anything NumPy takes), once, in the shape and dtype that were declared."""
        spec = self._missing.pop(name)
        array = np.asarray(value)
        wanted, got = (tuple(spec.shape), np.dtype(spec.dtype)), (array.shape, array.dtype)
        assert got == wanted, f"{name}: got {got}, declared {wanted}"
        place = self._places[name]
        try:
            with place.file.open("r+b", buffering=0) as file:
                file.seek(place.start)
                for rows in _in_order(array):
                    view = rows.reshape(-1).view(np.uint8).data
                    while view:
                        view = view[os.write(file.fileno(), view[:AT_ONCE]) :]
        except OSError as error:
            self._fail(error)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Puts the folder in its place; with an error, removes it."""
        try:
            if error is None:
                assert not self._missing, f"{self.path}: not written: {[*self._missing][:3]}"
                self._finish()
        except OSError as failed:
            self._fail(failed)
        finally:
            self._abandon()

    def _finish(self) -> None:
        if len(self._shards) > 1:
            weight_map = {name: place.file.name for name, place in self._places.items()}
            total = sum(nbytes_of(place) for place in self._places.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in self.folder.rglob("*"):
            _flush(file)
        self.folder.rename(self.path)
        _flush(self.path.parent)

    def _abandon(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already where it has its name
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _fail(self, error: OSError) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: could not be written ({error.strerror}); nothing is left of it. See that its disk has room and may be written."
        ) from error


def write_tensors(path: Path, specs: Mapping[str, Any], read: Callable[[str], Any], **options: Any) -> None:
    """Writes every tensor of `specs`, each asked for with `read(name)` when its turn comes; options as of `TensorWriter`."""
    with TensorWriter(path, specs, **options) as writer:
        for name in specs:
            writer.write(name, read(name))


def _cut_shards(specs: Mapping[str, Any], shard_bytes: int) -> list[dict[str, Any]]:
    """Runs of tensors, in order, of at most so many bytes."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, spec in specs.items():
        code_of(spec.dtype)
        if shards[-1] and size + nbytes_of(spec) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += nbytes_of(spec)
    return shards


def _name_shards(shards: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    count = len(shards)
    return {SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _begin(file: Path, specs: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """A file with its header and room for its tensors, wide dtypes first so that each is aligned; gives their places."""
    ordered = dict(sorted(specs.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize))
    header = format_header(ordered, metadata)
    places, end = {}, len(header)
    for name, spec in ordered.items():
        places[name] = TensorInfo(tuple(spec.shape), np.dtype(spec.dtype), file, end)
        end += nbytes_of(spec)
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(end)
    return places


def _in_order(array: np.ndarray) -> Iterator[np.ndarray]:
    """Its numbers as they are stored, as it is or in copies of some rows at a time."""
    if array.flags.c_contiguous:
        yield array
        return
    rows = max(1, COPY_BYTES * len(array) // array.nbytes)
    for begin in range(0, len(array), rows):
        part = array[begin : begin + rows]
        copy = np.empty(part.shape, part.dtype)
        fill(copy, part)
        yield copy


def _sweep(path: Path) -> None:
    """Removes what killed writers of this name left: those that live hold a lock."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        lock = _lock(found)
        if lock >= 0:
            shutil.rmtree(found, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock; -1 where another has it, or the disk knows no locks."""
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor >= 0:
            os.close(descriptor)
        return -1
    return descriptor


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
