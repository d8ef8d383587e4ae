"""Token shards on disk: built once, whole or not at all, and read back only if every byte is what was written.

    manifest.json          config, digests of all files, documents and bytes read
    tokenizer.json         where the tokenizer was trained
    PART.SPLIT.tokens      uint16 or uint32 (little endian): every document as bos, its tokens, eos
    PART.SPLIT.documents   int64 [documents, 2]: tokens and UTF-8 bytes of each

The folder belongs to its config: text that changes afterwards is not seen until the folder is deleted.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lmeff.core.errors import DataError
from lmeff.data.config import DataConfig, Part, vocab_size
from lmeff.data.sources import Document, documents, provenance, share
from lmeff.data.tokenizer import ByteTokenizer, Tokenizer, load_bpe, train_bpe

FORMAT = 1
SPLITS = ("train", "validation", "test")
BPE_SAMPLE = 4 << 20  # bytes of training text that BPE merges are learned from
LARGEST_SHARE = 32  # under a cap, no document takes more than this fraction of it
GROUP = 1 << 20  # characters encoded at a time
STALE = 24 * 3600  # seconds after which a build that was cut off is cleared away


class Shard(NamedTuple):
    """The documents of one part and one split. `starts` [documents + 1] are offsets into `tokens`; `sizes` their UTF-8 bytes."""

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


class Store(NamedTuple):
    """What a folder holds: `shards[part][split]`, the tokenizer, and the manifest."""

    shards: dict[str, dict[str, Shard]]
    tokenizer: Tokenizer
    manifest: dict[str, Any]


# Building.


@dataclass
class Count:
    """What reading a part came to; documents left out are too large for the cap."""

    documents: int = 0
    bytes: int = 0
    left_out: int = 0
    capped: bool = False


def read(part: Part, limit: int | None, count: Count) -> Iterator[Document]:
    """The documents of a part up to `limit` bytes, blank ones passed over; `count` is filled on the way."""
    for document in documents(part.source, part.path, part.text_field):
        if not document.text.strip():
            continue
        size = byte_length(document)
        if limit is not None and size > max(limit // LARGEST_SHARE, 1):
            count.left_out += 1
            continue
        if limit is not None and count.bytes + size > limit:
            count.capped = True
            return
        count.documents += 1
        count.bytes += size
        yield document


def byte_length(document: Document) -> int:
    """UTF-8 bytes of a document."""
    try:
        return len(document.text.encode())
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.key}: has the lone surrogate {document.text[error.start]!r} at character {error.start}, which is no text; expected Unicode. "
            "Repair or remove that document."
        ) from error


def split_of(document: Document, part: Part, config: DataConfig) -> str:
    """The split of a document, by a stable hash: of its path for the embedded text, of the text itself for all others, so that equal documents
    are never in two splits."""
    by_path = part.source == "embedded" and not part.path
    number = share("split:" + (document.key if by_path else document.text))
    if number < config.test:
        return "test"
    return "validation" if number < config.test + config.validation else "train"


def limits(config: DataConfig) -> dict[str, int | None]:
    """The cap in bytes of every part: `max_bytes` by weight."""
    total = sum(part.weight for part in config.parts)
    return {
        part.name: None if config.max_bytes is None else int(config.max_bytes * part.weight / total)
        for part in config.parts
    }


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer, trained where it has to be: on the first `BPE_SAMPLE` bytes of the training split, a share of them from each part."""
    return ByteTokenizer() if config.tokenizer == "bytes" else train_bpe(_sample(config), config.bpe_vocab)


def _sample(config: DataConfig) -> Iterator[str]:
    total = sum(part.weight for part in config.parts)
    for part in config.parts:
        wanted = BPE_SAMPLE * part.weight / total
        for document in read(part, limits(config)[part.name], Count()):
            if split_of(document, part, config) == "train":
                yield document.text
                wanted -= len(document.text.encode())
            if wanted <= 0:
                break


@dataclass
class Writer:
    """Appends documents to one shard."""

    file: BinaryIO
    dtype: str
    rows: list[tuple[int, int]]

    def append(self, tokens: np.ndarray, size: int) -> None:
        """One document: its ids with bos and eos, and its UTF-8 bytes."""
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.rows.append((len(tokens), size))


def write(config: DataConfig, folder: Path) -> None:
    """Reads, splits, tokenizes and writes everything into `folder`, an empty one."""
    tokenizer = make_tokenizer(config)
    if config.tokenizer == "bpe":
        tokenizer.inner.save(str(folder / "tokenizer.json"))  # type: ignore[attr-defined]
    counts = {part.name: _write_part(part, config, tokenizer, folder) for part in config.parts}
    files = {path.name: digest(path) for path in sorted(folder.iterdir())}
    body = {
        "format": FORMAT,
        "config": describe(config),
        "dtype": dtype(config),
        "files": files,
        "parts": {
            part.name: {"from": provenance(part.source, part.path), **dataclasses.asdict(counts[part.name])}
            for part in config.parts
        },
    }
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": seal(body)}, indent=1) + "\n", encoding="utf-8")


def _write_part(part: Part, config: DataConfig, tokenizer: Tokenizer, folder: Path) -> Count:
    count = Count()
    files = [open(folder / f"{part.name}.{split}.tokens", "wb") for split in SPLITS]  # noqa: SIM115
    try:
        writers = {split: Writer(file, dtype(config), []) for split, file in zip(SPLITS, files)}
        for group in _groups(read(part, limits(config)[part.name], count)):
            for document, ids in zip(group, tokenizer.encode_batch([document.text for document in group])):
                whole = np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]])
                writers[split_of(document, part, config)].append(whole, len(document.text.encode()))
    finally:
        for file in files:
            file.close()
    for split, writer in writers.items():
        table = np.array(writer.rows, dtype="<i8").reshape(-1, 2)
        (folder / f"{part.name}.{split}.documents").write_bytes(table.tobytes())
    return count


def _groups(found: Iterable[Document]) -> Iterator[list[Document]]:
    group, length = [], 0
    for document in found:
        group.append(document)
        length += len(document.text)
        if length >= GROUP:
            yield group
            group, length = [], 0
    if group:
        yield group


def dtype(config: DataConfig) -> str:
    """How ids are stored."""
    return "<u2" if vocab_size(config) <= 1 << 16 else "<u4"


@contextmanager
def building(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its place when the block ends, and is removed without a trace when it raises. Another process may
    publish first: then its folder stays, and this one is removed."""
    missing = [parent for parent in directory.absolute().parents if not parent.exists()]
    folder = directory.with_name(f".{directory.name}.building-{uuid.uuid4().hex[:12]}")
    folder.mkdir(parents=True)
    published = False
    try:
        _clear_stale(directory)
        yield folder
        _publish(folder, directory)
        published = True
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in () if published else missing:
            if not any(parent.iterdir()):
                parent.rmdir()


def _publish(folder: Path, directory: Path) -> None:
    try:
        os.rename(folder, directory)
    except OSError:
        if not (directory / "manifest.json").exists():
            raise


def _clear_stale(directory: Path) -> None:
    for old in directory.parent.glob(f".{directory.name}.building-*"):
        if time.time() - old.stat().st_mtime > STALE:
            shutil.rmtree(old, ignore_errors=True)


# Reading back.


def describe(config: DataConfig) -> dict[str, Any]:
    """What the tokens depend on: the config without the length of rows, which is chosen when they are packed."""
    found = dataclasses.asdict(config)
    kept = {
        name: value
        for name, value in found.items()
        if name not in ("sequence", "mixture", "source", "path", "text_field")
    }
    return json.loads(json.dumps(kept | {"parts": [dataclasses.asdict(part) for part in config.parts]}))


def seal(body: dict[str, Any]) -> str:
    """The digest of a manifest without its own."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def open_store(config: DataConfig, directory: Path) -> Store:
    """Opens a folder that holds the tokens of this very config, undamaged; refuses any other."""
    manifest = _manifest(directory)
    _refuse_other_config(manifest, config, directory)
    for name, expected in manifest["files"].items():
        _refuse_damage(directory / name, expected)
    tokenizer = (
        ByteTokenizer() if config.tokenizer == "bytes" else load_bpe(directory / "tokenizer.json", config.bpe_vocab)
    )
    shards = {
        part.name: {split: _open_shard(directory / f"{part.name}.{split}", manifest["dtype"]) for split in SPLITS}
        for part in config.parts
    }
    return Store(shards, tokenizer, manifest)


def _open_shard(stem: Path, dtype: str) -> Shard:
    table = np.frombuffer(Path(f"{stem}.documents").read_bytes(), dtype="<i8").reshape(-1, 2)
    file = Path(f"{stem}.tokens")
    tokens = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype)
    return Shard(tokens, np.concatenate([[0], np.cumsum(table[:, 0])]), table[:, 1])


def _manifest(directory: Path) -> dict[str, Any]:
    file = directory / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{directory}: holds no readable manifest.json ({error!r}), expected an empty or absent folder, or one that lmeff built; delete it to "
            "build it again, or choose another place"
        ) from error
    if seal(manifest) != expected:
        raise DataError(
            f"{file}: is damaged: sha256 {seal(manifest)}, expected {expected}; delete {directory} to build it again"
        )
    return manifest


def _refuse_other_config(manifest: dict[str, Any], config: DataConfig, directory: Path) -> None:
    if manifest["format"] != FORMAT:
        raise DataError(f"{directory}: has format {manifest['format']}, expected {FORMAT}; delete it to build it again")
    got, expected = manifest["config"], describe(config)
    differ = [
        f"{name} {got.get(name)!r} (expected {value!r})" for name, value in expected.items() if got.get(name) != value
    ]
    if differ:
        raise DataError(
            f"{directory}: holds the tokens of another config: {'; '.join(differ)}. Choose another folder or run name, or delete this one."
        )


def _refuse_damage(path: Path, expected: dict[str, Any]) -> None:
    if not path.exists():
        raise DataError(
            f"{path}: is missing, expected {expected['bytes']} bytes; delete {path.parent} to build it again"
        )
    got = digest(path)
    if got != expected:
        raise DataError(
            f"{path}: is damaged: {got['bytes']} bytes with sha256 {got['sha256']}, expected {expected['bytes']} bytes with sha256 "
            f"{expected['sha256']}; delete {path.parent} to build it again"
        )
