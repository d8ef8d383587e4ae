"""Tensors in safetensors files, read by parts; `TensorWriter` and `write_tensors` (`lmeff.interop.tensor_writer`) write them.

A part of a tensor is read with `pread` into an array of its own, one call for each run of bytes that lie together. Not by a memory map: the pages it
touches count as the process's memory until the kernel wants them back, so an import would seem (to a container's limit, too) to hold the whole checkpoint,
and a file that shrinks meanwhile would kill the process instead of raising an error.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmeff.interop.container import (
    AT_ONCE,
    HEADER_CAP,
    INDEX,
    SINGLE,
    UNPICKLE,
    TensorInfo,
    parse_object,
    read_header,
    refuse,
    shown,
)
from lmeff.interop.tensor_writer import TensorWriter, write_tensors

__all__ = ["TensorInfo", "TensorWriter", "Tensors", "bounds_of", "open_tensors", "write_tensors"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Tensors(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name: what is known of each, and parts of them. Holds no file open.

    metadata: the free texts of the headers.
    """

    def __init__(self, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        """From headers that have been checked: `open_tensors`."""
        self._infos = dict(infos)
        self.metadata = dict(metadata)

    def __getitem__(self, name: str) -> TensorInfo:
        """What is known of a tensor."""
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._infos)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._infos)

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """The part of a tensor at `index`, in its own dtype: a slice (of step 1) for each dim, dims left out are whole. Reads the bytes of the part alone.

        Raises `CheckpointError` where the file has changed since it was opened.
        """
        info = self._infos[name]
        bounds = bounds_of(info.shape, index)
        out = np.empty([stop - start for start, stop in bounds], info.dtype)
        view = out.reshape(-1).view(np.uint8).data
        try:
            with info.file.open("rb", buffering=0) as file:
                for offset, begin, end in _runs(info, bounds):
                    _read_into(file, info, offset, view[begin:end])
        except OSError as error:
            refuse(info.file, f"'{error.strerror}'", f"the bytes of {shown(name)}", "See that the file may be read.")
        if info.dtype == np.bool_ and (out.view(np.uint8) > 1).any():
            refuse(info.file, f"bytes other than 0 and 1 in {shown(name)}", "truth values")
        return out


def bounds_of(shape: Sequence[int], index: Sequence[slice]) -> list[tuple[int, int]]:
    """(start, stop) of each dim."""
    assert len(index) <= len(shape), (index, shape)
    ranges = [range(size)[part] for size, part in zip(shape, [*index, *[slice(None)] * (len(shape) - len(index))])]
    assert all(part.step == 1 for part in ranges), index
    return [(part.start, max(part.start, part.stop)) for part in ranges]


def _runs(info: TensorInfo, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(offset in the file, begin, end in the part) of each run of bytes that lie together in both."""
    strides = [info.dtype.itemsize * math.prod(info.shape[dim + 1 :]) for dim in range(len(bounds))]
    cut = [dim for dim, (start, stop) in enumerate(bounds) if stop - start < info.shape[dim]]
    last = cut[-1] if cut else 0  # all dims behind it are whole
    outer = [range(start, stop) for start, stop in bounds[:last]]
    length = (bounds[last][1] - bounds[last][0]) * strides[last] if bounds else info.dtype.itemsize
    first = info.start + (bounds[last][0] * strides[last] if bounds else 0)
    if not length:
        return
    for count, at in enumerate(np.ndindex(*(len(part) for part in outer))):
        offset = sum((part[i]) * stride for part, i, stride in zip(outer, at, strides))
        yield first + offset, count * length, (count + 1) * length


def _read_into(file: BinaryIO, info: TensorInfo, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(file.fileno(), [view[:AT_ONCE]], offset)
        if not count:
            refuse(info.file, f"its end at byte {offset:,}", "the bytes that its header names")
        offset, view = offset + count, view[count:]


def open_tensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file, or of a folder with model.safetensors or with shards and model.safetensors.index.json.

    Every header is read and checked, no data. Raises `CheckpointError` where something is missing, damaged, or not what its name says.
    """
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:
        refuse(
            path, f"'{error.strerror}'", "a .safetensors file or a folder that can be read", "See that it may be read."
        )


def _open(path: Path) -> Tensors:
    if not path.exists():
        refuse(path, "nothing there", "a .safetensors file or a folder with one", "Check the path.")
    if not path.is_dir():
        if path.suffix in PICKLES:
            refuse(path, f"a file of kind {path.suffix}", "a .safetensors file", UNPICKLE)
        return Tensors(*read_header(path))
    if not (path / INDEX).exists():
        return Tensors(*read_header(_inside(path, _only_file(path))))
    return _open_shards(path)


def _only_file(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    if SINGLE in names:
        return SINGLE
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles and not others:
        refuse(folder, f"only {shown(pickles[0])}", f"{SINGLE}, or {INDEX} and its shards", UNPICKLE)
    remedy = f"Open {shown(others[0])} by its own path." if others else "Check the path, or download the model again."
    refuse(folder, f"no file {SINGLE} and no {INDEX}", "one of them", remedy)


def _open_shards(folder: Path) -> Tensors:
    """The shards that an index names. What the index says and what the shards hold must be the same."""
    index = folder / INDEX
    size = _inside(folder, INDEX).stat().st_size
    if size > HEADER_CAP:
        refuse(index, f"{size:,} bytes", f"at most {HEADER_CAP:,}")
    weight_map = parse_object(index, index.read_bytes(), "text").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(index, f"weight_map = {shown(weight_map)}", "an object: the name of each tensor, the name of its shard")
    shards = sorted({_shard_name(index, name) for name in weight_map.values()})
    if (folder / SINGLE).exists() and SINGLE not in shards:
        refuse(
            folder, f"both {SINGLE} and an index of other files", "one of them", "Remove the one that is not the model."
        )
    absent = [name for name in shards if not (folder / name).exists()]
    if absent:
        refuse(
            folder,
            f"{len(shards) - len(absent)} of {len(shards)} shards: {shown(absent[0])} is missing",
            f"every file that {INDEX} names",
            "Download the missing ones.",
        )
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        header = read_header(_inside(folder, shard))
        _check_listed(folder / shard, header.tensors, weight_map)
        infos |= header.tensors
        metadata |= header.metadata
    absent = [name for name in weight_map if name not in infos]
    if absent:
        refuse(
            index, f"{shown(absent[0])} in {shown(weight_map[absent[0]])}, which does not hold it", "shards as listed"
        )
    return Tensors(infos, metadata)


def _shard_name(index: Path, name: Any) -> str:
    """A name that stays in its folder: an index comes from strangers and must not choose what else is opened."""
    plain = isinstance(name, str) and bool(name) and name == os.path.basename(name)
    if not plain or set(name) & {"\\", "\0"} or name.startswith("."):
        refuse(
            index, f"the shard {shown(name)}", "the plain name of a file in its folder", "Do not trust this checkpoint."
        )
    if not name.endswith(".safetensors"):
        refuse(index, f"the shard {shown(name)}", "names that end in .safetensors", UNPICKLE)
    return name


def _check_listed(file: Path, tensors: Mapping[str, TensorInfo], weight_map: Mapping[str, Any]) -> None:
    for name in tensors:
        if name not in weight_map:
            refuse(file, f"{shown(name)}, which {INDEX} does not list", "the tensors that it lists")
        if weight_map[name] != file.name:
            refuse(
                file, f"{shown(name)}, which {INDEX} says is in {shown(weight_map[name])}", "the tensors listed for it"
            )


def _inside(folder: Path, name: str) -> Path:
    """The file, unless it is a link that leads out of its folder. The cache of Hugging Face's hub keeps all files of a snapshot as links to its blobs."""
    file, home = (folder / name).resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not file.is_relative_to(home) and file.parent != blobs:
        refuse(
            folder / name, f"a link to {file}", "a file in its folder", "Copy the file here if it belongs to the model."
        )
    return folder / name
