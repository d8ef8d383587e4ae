"""Where documents come from: one row of `SOURCES` a kind. A source yields (key, text), always in the same order."""

import codecs
import hashlib
import importlib
import json
import platform
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lmeff.core.errors import DataError
from lmeff.core.extras import require
from lmeff.core.files import passing
from lmeff.data.storage import ENDINGS, File, fetch, find, is_remote, kind_of, opened

# Vendored code, tests, and tables written by programs rather than people.
LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip", "_vendor", "encodings", "__pycache__"}
)
WHOLE_FILES = 100  # from this many text files on, a file is a document; fewer are cut into documents
CUT_LONGEST, CUT_SHORTEST, CUT_DOCUMENTS = 4000, 500, 200
BLOCK = 1 << 20  # bytes of text read at a time
RECORDS = 1024  # ArrayRecords read at a time


class Document(NamedTuple):
    """A document. `key` names its place (for messages, and as what is hashed for the split where the source says so)."""

    key: str
    text: str


Source = Callable[[tuple[str, ...], str], Iterator[Document]]


def documents(source: str, path: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """The documents of a source; with paths and the source "embedded" (the default), the files' endings choose the source."""
    if source == "embedded" and path:
        source = _by_endings(path)
    return SOURCES[source](path, text_field)


def share(key: str) -> float:
    """A stable number in [0, 1) from a string: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def embedded(path: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """The sources of Python's standard library and the texts of `help()`, found wherever Python is; about 11 MB. Ordered by hash, so that any
    prefix is a fair sample."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = find(str(root), leave_out=LEFT_OUT) if root.is_dir() else []
    files = [
        file for file in files if file.name.endswith(".py") and not file.name.startswith(("_sysconfigdata", "config-"))
    ]
    if len(files) < 100:
        raise DataError(
            f"data.source 'embedded': {root} holds {len(files)} .py files of Python's standard library, expected hundreds; this Python came without "
            "its sources. Set data.path to text of your own, or use a Python that has them."
        )
    held: dict[str, File | str] = {file.name: file for file in files}
    if held.pop("pydoc_data/topics.py", None):
        held |= _topics()
    for key in sorted(held, key=share):
        found = held[key]
        yield Document(key, found if isinstance(found, str) else _python_source(found))


def _python_source(file: File) -> str:
    try:
        with tokenize.open(file.path) as lines:
            return lines.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.path}: cannot be read as Python ({error}); the installation of Python is damaged"
        ) from error


def _topics() -> dict[str, str]:
    """The topics of `help()`. They quote each other at length: each paragraph is kept once, so that no split holds what another trains on."""
    topics, seen, kept = importlib.import_module("pydoc_data.topics").topics, set(), {}
    for name in sorted(topics):
        fresh = [paragraph for paragraph in topics[name].strip("\n").split("\n\n") if paragraph not in seen]
        seen.update(fresh)
        kept[f"pydoc_data/topics/{name}"] = "\n\n".join(fresh)
    return kept


def text(path: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """Plain UTF-8 files. A hundred files or more are a document each; fewer are cut at blank lines into some hundreds of documents."""
    files = _files("text", path)
    if len(files) >= WHOLE_FILES:
        for file in sorted(files, key=lambda file: share(file.name)):
            yield Document(file.path, "".join(_decoded(file)))
        return
    longest = min(CUT_LONGEST, max(CUT_SHORTEST, sum(file.size for file in files) // CUT_DOCUMENTS))
    for file in files:
        for number, piece in enumerate(_cut(_decoded(file), longest)):
            yield Document(f"{file.path}#{number}", piece)


def _decoded(file: File) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    at = 0
    with opened(file.path) as raw:
        while True:
            block = raw.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file.path}: byte {at - pending + error.start} is no UTF-8 ({error.reason}), expected UTF-8 text; convert the file, for "
                    f"example with 'iconv -f latin1 -t utf8', or leave it out"
                ) from error
            at += len(block)
            if not block:
                return


def _cut(blocks: Iterator[str], longest: int) -> Iterator[str]:
    """Pieces of at most `longest` characters that join to the whole, cut after the last blank line that leaves more than half of that."""
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > longest:
            end = start + longest
            marks = ((mark, rest.rfind(mark, start + longest // 2, end)) for mark in ("\n\n", "\n\r\n", "\n", " "))
            cut = next((found + len(mark) for mark, found in marks if found >= 0), end)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def jsonl(path: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """A JSON object a line, its text in `text_field`. Blank lines are passed over."""
    for file in _files("jsonl", path):
        with opened(file.path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(f"{file.path}:{number}", _json_text(f"{file.path}, line {number}", line, text_field))


def _json_text(where: str, line: bytes, text_field: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{where}: got {line[:60]!r}, which is no JSON ({error}); expected one JSON object a line"
        ) from error
    return _field(where, row, text_field)


def _field(where: str, row: Any, text_field: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: got a JSON {type(row).__name__}, expected an object with the field '{text_field}'")
    if text_field not in row:
        raise DataError(
            f"{where}: has the fields {sorted(row)}, expected '{text_field}' among them; set data.text_field"
        )
    if not isinstance(row[text_field], str):
        raise DataError(
            f"{where}: field '{text_field}' holds {type(row[text_field]).__name__}, expected text; set data.text_field"
        )
    return row[text_field]


def parquet(path: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """Parquet files with a column of text."""
    arrow = require("pyarrow", extra="parquet")
    reader = require("pyarrow.parquet", extra="parquet")
    for file in _files("parquet", path):
        number = 0
        with opened(file.path) as raw:
            try:
                table = reader.ParquetFile(raw)
                if text_field not in table.schema_arrow.names:
                    raise DataError(
                        f"{file.path}: has the columns {table.schema_arrow.names}, expected '{text_field}' among them; set data.text_field"
                    )
                for batch in table.iter_batches(columns=[text_field]):
                    for value in batch.column(0).to_pylist():
                        yield Document(
                            f"{file.path}:{number}",
                            _field(f"{file.path}, row {number}", {text_field: value}, text_field),
                        )
                        number += 1
            except (arrow.ArrowException, UnicodeDecodeError) as error:
                raise DataError(
                    f"{file.path}: is no readable parquet file ({error}); write it again or leave it out"
                ) from error


def array_record(path: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """ArrayRecord files whose records are UTF-8 text."""
    module = importlib.import_module("array_record.python.array_record_module")  # comes with grain
    for file in _files("array_record", path):
        with tempfile.TemporaryDirectory() as folder, passing(Path(folder)):
            local = file.path
            if is_remote(file.path):
                local = str(Path(folder, "records"))
                fetch(file.path, local)
            yield from _records(module, local, file.path)


def _records(module: Any, local: str, shown: str) -> Iterator[Document]:
    reader = module.ArrayRecordReader(local)
    count = reader.num_records()
    for first in range(0, max(1, count), RECORDS):  # a damaged file may claim to be empty: reading nothing of it tells
        try:
            found = reader.read(list(range(first, min(first + RECORDS, count))))
        except RuntimeError as error:
            raise DataError(f"{shown}: is damaged ({error}); write it again or leave it out") from error
        for number, record in enumerate(found, first):
            try:
                yield Document(f"{shown}:{number}", record.decode())
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{shown}, record {number}: is no UTF-8 text ({error}), expected records of plain text"
                ) from error
    reader.close()


def hf(path: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """The "train" split of a Hugging Face dataset: (name,), (name, configuration), or a folder written by `save_to_disk` or holding data files."""
    lib = require("datasets", extra="hf")
    try:
        rows = _open_hf(lib, path)
        for number, row in enumerate(rows):
            yield Document(f"{path[0]}:{number}", _field(f"hf dataset {path[0]}, row {number}", row, text_field))
    except DataError:
        raise
    except Exception as error:  # the library and its network layers raise many kinds
        raise DataError(
            f"hf dataset {path}: cannot be read ({type(error).__name__}: {error}); expected a name on the hub, or a folder; check the name, the "
            "network, and that it has a split 'train'"
        ) from error


def _open_hf(lib: Any, path: tuple[str, ...]) -> Any:
    saved = (
        {file.name.split("/")[-1] for file in find(path[0])} if is_remote(path[0]) or Path(path[0]).exists() else set()
    )
    if {"dataset_dict.json", "state.json"} & saved:
        rows = lib.load_from_disk(path[0])
        return rows["train"] if isinstance(rows, dict) else rows
    return lib.load_dataset(*path, split="train", streaming=True)


def _files(source: str, path: tuple[str, ...]) -> list[File]:
    """The files of a source below the paths. A file that is named is taken whatever its ending; of a folder, those with the source's endings."""
    found = []
    for root in path:
        files = find(root)
        named = len(files) == 1 and files[0].name == root.rstrip("/").rsplit("/", 1)[-1]
        kept = files if named else [file for file in files if kind_of(file.name) == source]
        if not kept:
            raise DataError(
                f"data.path: folder '{root}' holds {len(files)} files, none that ends like {ENDINGS[source]}; expected files for source '{source}'"
            )
        found += kept
    return found


def _by_endings(path: tuple[str, ...]) -> str:
    names = [file.name for root in path for file in find(root)]
    kinds = sorted({kind for kind in map(kind_of, names) if kind is not None})
    if len(kinds) == 1:
        return kinds[0]
    found = (
        f"files of the kinds {kinds}" if kinds else f"{len(names)} files {names[:3]}, of no kind known by its ending"
    )
    raise DataError(
        f"data.path: {', '.join(path)} holds {found}; expected one of {sorted(ENDINGS)}. Set data.source, or for several kinds data.mixture, a part "
        "for each."
    )


def provenance(source: str, path: tuple[str, ...]) -> str:
    """Where the text came from, in words."""
    if source == "embedded" and not path:
        return f"standard library of Python {platform.python_version()}"
    return ", ".join(path[:2]) + (", ..." if len(path) > 2 else "")


SOURCES: dict[str, Source] = {
    "embedded": embedded,
    "text": text,
    "jsonl": jsonl,
    "parquet": parquet,
    "array_record": array_record,
    "hf": hf,
}
