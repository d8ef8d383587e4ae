"""Batches as a pure function of (seed, step): the whole state of the data is the step, whatever the number of hosts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError, DataError
from lmeff.data import packing
from lmeff.data.config import DataConfig, Part
from lmeff.data.prepare import Count, byte_length, encode, read, write
from lmeff.data.shards import SPLITS, Shard, Store, building, open_store, seal
from lmeff.data.sources import share
from lmeff.data.tokenizer import Tokenizer

THREADS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

Place = tuple[int, int]  # part, and row among the rows of that part


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """One split. `batch` and `batches` draw shuffled rows without end, `evaluation` passes once over all documents in order.

    document_bytes:  int64 [documents], the UTF-8 bytes of each document.
    document_part:   int64 [documents], the part of the mixture it is of.
    """

    shards: tuple[Shard, ...]
    rows: tuple[packing.Rows, ...]
    drawn: Any  # grain.MapDataset of the places of each global batch's rows
    sequence: int
    pad: int
    document_bytes: np.ndarray
    document_part: np.ndarray

    def batch(self, step: int) -> Batch:
        """Global batch `step`, as NumPy arrays [rows, T]."""
        return self._fill(self.drawn[step])

    def batches(self, start: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """`batch(start), batch(start + 1), ...` without end, made ahead by threads; of each only these rows, where some are named."""
        own = slice(None) if rows is None else rows.tolist()
        return iter(self.drawn[start:].map(lambda places: self._fill(_pick(places, own))).to_iter_dataset(THREADS))

    def evaluation(self, batch: int) -> Iterator[tuple[Batch, np.ndarray]]:
        """One pass over all documents in order: global batches of `batch` rows on every host, and for each target its document (index into
        `document_bytes`, -1 where there is none). The last batch is filled up with empty rows."""
        ordered = tuple(packing.pack_ordered(rows.pieces, self.sequence) for rows in self.rows)
        places = [(part, row) for part, rows in enumerate(ordered) for row in range(len(rows))]
        for at in range(0, len(places), batch):
            yield self._lay(places[at : at + batch], ordered, batch)

    @property
    def tokens(self) -> int:
        """Predicted tokens of one epoch."""
        return int(self.document_tokens.sum())

    @property
    def document_tokens(self) -> np.ndarray:
        """Predicted tokens of each document, int64 [documents]: all but bos."""
        return np.concatenate([np.diff(shard.starts) - 1 for shard in self.shards])

    @property
    def fill(self) -> float:
        """The share of positions in the shuffled rows that predict a token."""
        return self.tokens / max(1, sum(len(rows) for rows in self.rows) * self.sequence)

    def _fill(self, places: Sequence[Place]) -> Batch:
        return self._lay(places, self.rows, len(places))[0]

    def _lay(self, places: Sequence[Place], rows: tuple[packing.Rows, ...], batch: int) -> tuple[Batch, np.ndarray]:
        laid, document_BT = packing.empty(batch, self.sequence, self.pad)
        first = np.cumsum([0, *(len(shard.sizes) for shard in self.shards)])
        for at, (part, row) in enumerate(places):
            packing.lay(self.shards[part].tokens, rows[part], row, laid, document_BT, at)
            document_BT[at][document_BT[at] >= 0] += first[part]
        return laid, document_BT


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The three splits and their tokenizer."""

    train: Dataset
    validation: Dataset
    test: Dataset
    tokenizer: Tokenizer
    vocab: int
    manifest: dict[str, Any]

    def describe(self) -> str:
        """One line: where the text is from, how much there is, and how it became tokens and rows."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        tokens = {name: split.tokens for name, split in splits.items()}
        counts = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        rate = sum(part["bytes"] for part in self.manifest["parts"].values()) / sum(tokens.values())
        used = getattr(self.tokenizer, "used", self.vocab)
        vocab = f"{self.vocab}" if used == self.vocab else f"{self.vocab} ({used} in use)"
        fill = f"fill {100 * self.train.fill:.1f}%"
        return f"{_origin(self.manifest)}; vocab {vocab}; tokens {counts}; {rate:.2f} bytes/token; {fill}"

    @property
    def digest(self) -> str:
        """The same where tokens, documents and tokenizer are the same, for hosts to compare."""
        return seal(self.manifest["files"])


def build(config: DataConfig, directory: Path, seed: int, *, batch: int) -> Corpus:
    """Reads, tokenizes and packs the text of `config`, or reads back what `directory` holds of it already.

    batch: rows of the global batch.
    Raises `DataError` for text that is missing, unreadable, too little or damaged, with nothing written.
    """
    if batch < 1:
        raise ConfigError(f"train.batch: got {batch} rows, expected at least 1")
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        with building(directory) as folder:
            write(config, folder)
            _corpus(config, open_store(config, folder), seed, batch)
    return _corpus(config, open_store(config, directory), seed, batch)


def read_text(path: Sequence[str], corpus: Corpus, text_field: str = "text") -> Dataset:
    """Other text to measure on, with the tokenizer and rows of `corpus`: all of its documents, in memory; nothing is written."""
    if not path:
        raise DataError("text: got no path, expected files, folders or URLs")
    part = Part(name="text", path=tuple(path), text_field=text_field)
    found = [(ids, byte_length(doc)) for doc, ids in encode(read(part, None, Count()), corpus.tokenizer)]
    if not found:
        raise DataError(f"text: {', '.join(path)} holds no text but blanks, expected at least one document")
    starts = np.cumsum([0, *(len(ids) for ids, _ in found)])
    shard = Shard(np.concatenate([ids for ids, _ in found]), starts, np.array([size for _, size in found]))
    return _dataset((part,), (shard,), corpus.train.sequence, corpus.tokenizer.pad, "text", 0, 1)


def _corpus(config: DataConfig, store: Store, seed: int, batch: int) -> Corpus:
    pad = store.tokenizer.pad
    splits = {}
    for split in SPLITS:
        shards = tuple(store.shards[part.name][split] for part in config.parts)
        for part, shard in zip(config.parts, shards):
            if not len(shard.sizes):
                raise DataError(
                    _too_little(config, store, f"none of part '{part.name}' falls into the split '{split}'", 1)
                )
        splits[split] = _dataset(config.parts, shards, config.sequence, pad, split, seed, batch)
    count = sum(len(rows) for rows in splits["train"].rows)
    if count < batch:
        raise DataError(
            _too_little(config, store, f"the training split fills {count} rows of {config.sequence} tokens", batch)
        )
    return Corpus(**splits, tokenizer=store.tokenizer, vocab=store.tokenizer.vocab, manifest=store.manifest)


def _too_little(config: DataConfig, store: Store, found: str, needed: int) -> str:
    return (
        f"data: too little text ({_origin(store.manifest)}): {found}, expected at least {needed}. Add text, raise data.max_bytes, data.validation or "
        "data.test, or lower train.batch or data.sequence."
    )


def _dataset(
    parts: tuple[Part, ...],
    shards: tuple[Shard, ...],
    sequence: int,
    pad: int,
    split: str,
    seed: int,
    batch: int,
) -> Dataset:
    rows = tuple(packing.pack_dense(packing.cut(shard.starts, sequence), sequence) for shard in shards)
    return Dataset(
        shards=shards,
        rows=rows,
        drawn=_draw(parts, rows, split, seed).batch(batch, batch_fn=list),
        sequence=sequence,
        pad=pad,
        document_bytes=np.concatenate([shard.sizes for shard in shards]),
        document_part=np.repeat(np.arange(len(shards)), [len(shard.sizes) for shard in shards]),
    )


def _draw(parts: tuple[Part, ...], rows: tuple[packing.Rows, ...], split: str, seed: int) -> Any:
    """The endless sequence of places: every part's rows shuffled anew each epoch, parts interleaved by weight."""
    drawn = []
    for index, (part, packed) in enumerate(zip(parts, rows)):
        # grain seeds epoch e with seed + e: a hash keeps neighbouring seeds, splits and parts apart.
        own = int(share(f"{seed}/{split}/{part.name}") * 2**32)
        shuffled = grain.MapDataset.range(len(packed)).shuffle(seed=own).repeat()
        drawn.append(shuffled.map(lambda row, index=index: (index, int(row))))
    return drawn[0] if len(drawn) == 1 else grain.MapDataset.mix(drawn, [part.weight for part in parts])


def _pick(places: Sequence[Place], rows: slice | list[int]) -> Sequence[Place]:
    return places[rows] if isinstance(rows, slice) else [places[row] for row in rows]


def _origin(manifest: dict[str, Any]) -> str:
    parts = manifest["parts"]
    named = {name: f"{name}: " if len(parts) > 1 else "" for name in parts}
    return "; ".join(
        f"{named[name]}{part['from']}, {part['documents']:,} documents, {_size(part['bytes'])}{_left_out(part)}"
        for name, part in parts.items()
    )


def _left_out(part: dict[str, Any]) -> str:
    return f" (capped; {part['left_out']} too large for the cap)" if part["left_out"] or part["capped"] else ""


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
