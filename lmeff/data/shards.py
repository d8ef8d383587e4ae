"""Token shards on disk: built once, whole or not at all, and read back only if every byte is what was written.

    manifest.json          config, digests of all files, documents and bytes read
    tokenizer.json         where the tokenizer was trained
    tokenizer/             where it is one that others made: a copy of its files
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.errors import DataError
from lmeff.core.files import passing
from lmeff.data.config import KEPT, DataConfig, is_pretrained
from lmeff.data.pretrained import load_tokenizer
from lmeff.data.tokenizer import ByteTokenizer, Tokenizer, load_bpe

FORMAT = 1
SPLITS = ("train", "validation", "test")
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


def dtype(vocab: int) -> str:
    """How ids below `vocab` are stored."""
    return "<u2" if vocab <= 1 << 16 else "<u4"


@contextmanager
def building(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its place when the block ends, and is removed without a trace when it raises. Another process may
    publish first: then its folder stays, and this one is removed."""
    missing = [parent for parent in directory.absolute().parents if not parent.exists()]
    folder = directory.with_name(f".{directory.name}.building-{uuid.uuid4().hex[:12]}")
    published = False
    try:
        with passing(folder):
            folder.mkdir(parents=True)
            _clear_stale(directory)
            yield folder
            _publish(folder, directory)
            published = True
    except OSError as error:
        raise DataError(
            f"{directory}: cannot be written ({error}), expected room and permission; choose another place"
        ) from error
    finally:
        for parent in () if published else missing:
            if parent.is_dir() and not any(parent.iterdir()):
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


def identity(config: DataConfig) -> dict[str, Any]:
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
    tokenizer = open_tokenizer(config, directory)
    shards = {
        part.name: {split: _open_shard(directory / f"{part.name}.{split}", manifest["dtype"]) for split in SPLITS}
        for part in config.parts
    }
    return Store(shards, tokenizer, manifest)


def open_tokenizer(config: DataConfig, directory: Path) -> Tokenizer:
    """The tokenizer of the tokens in a folder; that they are there and undamaged is not looked at."""
    if is_pretrained(config):
        return load_tokenizer(directory / KEPT)
    return ByteTokenizer() if config.tokenizer == "bytes" else load_bpe(directory / "tokenizer.json", config.bpe_vocab)


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
    got, expected = manifest["config"], identity(config)
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
