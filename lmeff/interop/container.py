"""The safetensors container: 8 bytes of length, a JSON header that says where each tensor lies, the bytes. Nothing in it can run.

Format: https://github.com/huggingface/safetensors#format. The library does not tell where in a file a tensor lies, keeps the last of two equal keys, and
names no remedy; so headers are read here, and everything in them is checked before a byte of data is. Its own reader is the oracle of the tests.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from lmeff.core.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AT_ONCE = 1 << 30  # bytes a system call; Linux moves at most 2 GiB
HEADER_CAP = 100_000_000  # bytes; the library's own limit
AGAIN = "The file is damaged or was not written whole: download or export it again."
UNPICKLE = (
    "A pickle can run any code when it is opened, so it is never opened here. Where you trust its source, convert the model once with "
    "transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), then open NEW."
)


class TensorInfo(NamedTuple):
    """A tensor in a file. start: its first byte, counted from the begin of the file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """What a file says of itself: its tensors in the order they lie in, and the free texts of its writer."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def refuse(file: Path, got: str, expected: str, remedy: str = AGAIN) -> NoReturn:
    """Raises the one kind of error of this room."""
    raise CheckpointError(f"{file}: got {got}, expected {expected}. {remedy}")


def shown(text: Any) -> str:
    """A text out of a file, cut and escaped: it may be long, or hold what a terminal obeys."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."


def read_header(file: Path) -> Header:
    """Reads and checks the header of a file; raises `CheckpointError` where it and the file do not agree in every byte."""
    if file.exists() and not file.is_file():  # to open a pipe would wait for a writer
        refuse(file, "no regular file", "a safetensors file", "Check the path.")
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(64)
            if first[8:9] != b"{":  # a header of 640 bytes begins as a pickle does
                refuse_other_kinds(file, first, "a safetensors file")
            if size < 8:
                refuse(
                    file, f"{size} bytes", "a safetensors file, which begins with the 8 bytes of its header's length"
                )
            length = int.from_bytes(first[:8], "little")
            if length > min(HEADER_CAP, size - 8):
                refuse(
                    file,
                    f"a header of {length:,} bytes in a file of {size:,}",
                    f"at most {min(HEADER_CAP, size - 8):,}",
                    "It is no safetensors file or was not written whole: download or export it again.",
                )
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        refuse(file, f"'{error.strerror}'", "a file that can be read", "See that it exists and may be read.")
    entries = parse_object(file, text, "header")
    metadata = _metadata(file, entries.pop("__metadata__", {}))
    tensors = [(name, _info(file, name, entry, 8 + length)) for name, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].nbytes))
    _check_cover(file, tensors, 8 + length, size)
    return Header(dict(tensors), metadata)


def parse_object(file: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object whose keys are all different; raises `CheckpointError`."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                refuse(file, f"the key {shown(name)} twice in its {what}", "each key once")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:  # both of JSON and of UTF-8
        refuse(file, f"a {what} that is no JSON ({str(error)[:80]})", "a JSON object in UTF-8")
    if not isinstance(value, dict):
        refuse(file, f"a {what} that is a JSON {type(value).__name__}", "a JSON object")
    return value


def refuse_other_kinds(file: Path, first: bytes, expected: str) -> None:
    """Refuses what is plainly something else by its first bytes: a pickle, a web page, a pointer."""
    for begins, kind, remedy in OTHER_KINDS:
        if first.lower().startswith(begins):
            refuse(file, kind, expected, remedy)
    # Behind its version stands an opcode, the least of which is "(": a number below 2.6 million that is equal in its first two bytes has less there.
    if first[:1] == b"\x80" and first[1:2] in (b"\2", b"\3", b"\4", b"\5") and first[2:3] >= b"(":
        refuse(file, "a pickle", expected, UNPICKLE)


def _metadata(file: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        refuse(file, f"__metadata__ = {shown(found)}", "an object of texts")
    return found


def _info(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of the header, checked by itself; `data` is where the tensors' bytes begin."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(file, f"{shown(name)} = {shown(entry)}", "an object of dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        refuse(
            file,
            f"{shown(name)} with dtype {shown(code)}",
            f"one of {', '.join(DTYPES)}",
            "Convert the checkpoint to one of these.",
        )
    if not _naturals(shape):
        refuse(file, f"{shown(name)} with shape {shown(shape)}", "a list of whole numbers from 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(
            file, f"{shown(name)} with data_offsets {shown(offsets)}", "two whole numbers from 0, the first not larger"
        )
    info = TensorInfo(tuple(shape), DTYPES[code], file, data + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        refuse(
            file,
            f"{offsets[1] - offsets[0]:,} bytes for {shown(name)}",
            f"{info.nbytes:,} for {code} of shape {shown(shape)}",
        )
    return info


def _naturals(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)


def _check_cover(file: Path, tensors: Iterable[tuple[str, TensorInfo]], data: int, size: int) -> None:
    """Tensors lie one after the other, and the file ends with the last."""
    end = data
    for name, info in tensors:
        if info.start != end:
            what = "overlaps the one before it" if info.start < end else "leaves a hole before it"
            refuse(
                file, f"{shown(name)} at byte {info.start - data:,} of the data, which {what}", f"byte {end - data:,}"
            )
        end = info.start + info.nbytes
    if end != size:
        what = "the file ends before its tensors" if end > size else "bytes behind the last tensor"
        refuse(file, f"{size:,} bytes: {what}", f"{end:,}, as its header says")


def format_header(specs: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of a file whose tensors (anything with shape and dtype) lie one after the other from a multiple of 8 on."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + nbytes_of(spec)
        entries[name] = {"dtype": code_of(spec.dtype), "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def nbytes_of(spec: Any) -> int:
    """Bytes in a file of anything with shape and dtype."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def code_of(dtype: Any) -> str:
    """The format's name of a dtype; raises `CheckpointError` where it has none (int4: pack two in a byte)."""
    for code, own in DTYPES.items():
        if own == np.dtype(dtype):
            return code
    raise CheckpointError(
        f"safetensors: got {np.dtype(dtype).name}, expected one of {', '.join(d.name for d in DTYPES.values())}; "
        "store it as one of these, codes of few bits packed into bytes"
    )


DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}

# What files of this name turn out to be, by their first bytes in lower case.
OTHER_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"pk\x03\x04", "a zip file, as PyTorch writes its pickles", UNPICKLE),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS in place of the file",
        "Fetch the file itself with 'git lfs pull'.",
    ),
    *(
        (begins, "a web page", "The download gave a page, perhaps of an error or a login: download it again.")
        for begins in (b"<!doctype", b"<html", b"<?xml")
    ),
    (b"gguf", "a GGUF file", "Download the model in safetensors form."),
)
