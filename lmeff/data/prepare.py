"""From text to token shards: reads the parts, splits them by hash, trains the tokenizer where there is one to train, and writes."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lmeff.core.errors import DataError
from lmeff.data.config import KEPT, DataConfig, Part, is_pretrained
from lmeff.data.pretrained import keep
from lmeff.data.shards import FORMAT, SPLITS, digest, dtype, identity, seal
from lmeff.data.sources import CUT_LONGEST, Document, documents, provenance, share
from lmeff.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, train_bpe

BPE_SAMPLE = 4 << 20  # bytes of training text that BPE merges are learned from
LARGEST_SHARE = 32  # under a cap, no document of more than a page takes more than 1/32 of it: the splits need many
GROUP = 1 << 20  # characters encoded at a time


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
        if limit is not None and size > limit // LARGEST_SHARE and len(document.text) > CUT_LONGEST:
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
    """A tokenizer of lmeff's own, trained where it has to be: on the first `BPE_SAMPLE` bytes of the training split, a share of them from each part."""
    return ByteTokenizer() if config.tokenizer == "bytes" else train_bpe(_sample(config), config.bpe_vocab)


def _sample(config: DataConfig) -> Iterator[str]:
    total = sum(part.weight for part in config.parts)
    for part in config.parts:
        wanted = BPE_SAMPLE * part.weight / total
        for document in read(part, limits(config)[part.name], Count()):
            if split_of(document, part, config) == "train":
                yield document.text
                wanted -= byte_length(document)
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
    tokenizer = keep(Path(config.tokenizer), folder / KEPT) if is_pretrained(config) else make_tokenizer(config)
    if isinstance(tokenizer, BpeTokenizer):
        tokenizer.save(folder / "tokenizer.json")
    counts = {part.name: _write_part(part, config, tokenizer, folder) for part in config.parts}
    files = {path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    body = {
        "format": FORMAT,
        "config": identity(config),
        "dtype": dtype(tokenizer.vocab),
        "files": files,
        "parts": {
            part.name: {"from": provenance(part.source, part.path), **dataclasses.asdict(counts[part.name])}
            for part in config.parts
        },
    }
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": seal(body)}, indent=1) + "\n", encoding="utf-8")


def _write_part(part: Part, config: DataConfig, tokenizer: Tokenizer, folder: Path) -> Count:
    count = Count()
    with ExitStack() as stack:
        writers = {
            split: Writer(
                stack.enter_context(open(folder / f"{part.name}.{split}.tokens", "wb")), dtype(tokenizer.vocab), []
            )
            for split in SPLITS
        }
        for document, ids in encode(read(part, limits(config)[part.name], count), tokenizer):
            writers[split_of(document, part, config)].append(ids, byte_length(document))
    for split, writer in writers.items():
        table = np.array(writer.rows, dtype="<i8").reshape(-1, 2)
        (folder / f"{part.name}.{split}.documents").write_bytes(table.tobytes())
    return count


def encode(found: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Every document with its ids, bos and eos among them; a group at a time, so that the tokenizer may use all cores."""
    for group in _groups(found):
        for document, ids in zip(group, tokenizer.encode_batch([document.text for document in group])):
            yield document, np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]])


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
