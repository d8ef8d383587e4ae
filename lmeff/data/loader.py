"""Batches as a pure function of (seed, step): the whole state of the data is the step, whatever the number of hosts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError, DataError
from lmeff.data import packing
from lmeff.data.config import DataConfig, vocab_size
from lmeff.data.shards import Shard, Store, building, open_store, write
from lmeff.data.sources import share
from lmeff.data.tokenizer import Tokenizer

THREADS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

Place = tuple[int, int]  # part, and row among the rows of that part


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One split. `batch` and `batches` draw shuffled rows without end, `evaluation` passes once over all documents in order.

    document_bytes: int64 [documents], the UTF-8 bytes of each document.
    document_part:  int64 [documents], the part of the mixture each document is of.
    """

    shards: tuple[Shard, ...]
    rows: tuple[packing.Rows, ...]
    drawn: Any  # grain.MapDataset of the places of each global batch's rows
    sequence: int
    pad: int
    host: slice
    document_bytes: np.ndarray
    document_part: np.ndarray

    def batch(self, step: int) -> Batch:
        """This host's rows of global batch `step`, as NumPy arrays [rows, T]."""
        return self._fill(self.drawn[step])

    def batches(self, start: int) -> Iterator[Batch]:
        """`batch(start), batch(start + 1), ...` without end, made ahead by threads."""
        return iter(self.drawn[start:].map(self._fill).to_iter_dataset(THREADS))

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
        return sum(int(rows.pieces.length.sum()) for rows in self.rows)

    @property
    def fill(self) -> float:
        """The share of positions in the shuffled rows that predict a token."""
        return self.tokens / max(1, sum(len(rows) for rows in self.rows) * self.sequence)

    def _fill(self, places: Sequence[Place]) -> Batch:
        own = places[self.host]
        return self._lay(own, self.rows, len(own))[0]

    def _lay(self, places: Sequence[Place], rows: tuple[packing.Rows, ...], batch: int) -> tuple[Batch, np.ndarray]:
        laid, document_BT = packing.empty(batch, self.sequence, self.pad)
        first = np.cumsum([0, *(len(shard.sizes) for shard in self.shards)])
        for at, (part, row) in enumerate(places):
            packing.lay(self.shards[part].tokens, rows[part], row, laid, document_BT, at)
            document_BT[at][document_BT[at] >= 0] += first[part]
        return laid, document_BT


@dataclass(frozen=True, kw_only=True)
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
        parts = self.manifest["parts"]
        origin = "; ".join(
            f"{name + ': ' if len(parts) > 1 else ''}{part['from']}, {part['documents']:,} documents, {_size(part['bytes'])}{_left_out(part)}"
            for name, part in parts.items()
        )
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        tokens = {name: split.tokens for name, split in splits.items()}
        counts = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        rate = sum(part["bytes"] for part in parts.values()) / sum(tokens.values())
        used = getattr(self.tokenizer, "used", self.vocab)
        vocab = f"{self.vocab}" if used == self.vocab else f"{self.vocab} ({used} in use)"
        return f"{origin}; vocab {vocab}; tokens {counts}; {rate:.2f} bytes/token; fill {100 * self.train.fill:.1f}%"

    @property
    def digest(self) -> str:
        """The same where tokens, documents and tokenizer are the same: for hosts to compare."""
        return "".join(f"{share(str(sorted((n, f['sha256']) for n, f in self.manifest['files'].items()))).hex()}")


def build(
    config: DataConfig,
    directory: Path,
    seed: int,
    *,
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Corpus:
    """Reads, tokenizes and packs the text of `config`, or reads back what `directory` holds of it already.

    batch: rows of the global batch; host `process_index` of `process_count` gets its part of them, in order.
    Raises `DataError` for text that is missing, unreadable, too little or damaged, with nothing written.
    """
    if batch < 1 or batch % process_count or not 0 <= process_index < process_count:
        raise ConfigError(
            f"train.batch: got {batch} rows for host {process_index} of {process_count}, expected a positive multiple of the number of hosts"
        )
    each = batch // process_count
    host = slice(each * process_index, each * (process_index + 1))
    if not directory.exists() or not any(directory.iterdir()):
        with building(directory) as folder:
            write(config, folder)
            _corpus(config, open_store(config, folder), seed, batch, host)
    return _corpus(config, open_store(config, directory), seed, batch, host)


def _corpus(config: DataConfig, store: Store, seed: int, batch: int, host: slice) -> Corpus:
    train, validation, test = (
        _dataset(config, store, split, seed, batch, host) for split in ("train", "validation", "test")
    )
    return Corpus(
        train=train,
        validation=validation,
        test=test,
        tokenizer=store.tokenizer,
        vocab=vocab_size(config),
        manifest=store.manifest,
    )


def _dataset(config: DataConfig, store: Store, split: str, seed: int, batch: int, host: slice) -> Dataset:
    shards = tuple(store.shards[part.name][split] for part in config.parts)
    rows = tuple(packing.pack_dense(packing.cut(shard.starts, config.sequence), config.sequence) for shard in shards)
    for part, shard, packed in zip(config.parts, shards, rows):
        _refuse_too_little(config, store, part.name, split, len(shard.sizes), len(packed), batch)
    return Dataset(
        shards=shards,
        rows=rows,
        drawn=_draw(config, rows, split, seed).batch(batch, batch_fn=list),
        sequence=config.sequence,
        pad=config.pad,
        host=host,
        document_bytes=np.concatenate([shard.sizes for shard in shards]),
        document_part=np.repeat(np.arange(len(shards)), [len(shard.sizes) for shard in shards]),
    )


def _draw(config: DataConfig, rows: tuple[packing.Rows, ...], split: str, seed: int) -> Any:
    """The endless sequence of rows: every part shuffled anew each epoch, parts interleaved by weight."""
    drawn = []
    for index, (part, packed) in enumerate(zip(config.parts, rows)):
        # grain seeds epoch e with seed + e: a hash keeps neighbouring seeds, splits and parts apart.
        own = int(share(f"{seed}/{split}/{part.name}") * 2**32)
        shuffled = grain.MapDataset.range(len(packed)).shuffle(seed=own).repeat()
        drawn.append(shuffled.map(lambda row, index=index: (index, int(row))))
    return drawn[0] if len(drawn) == 1 else grain.MapDataset.mix(drawn, [part.weight for part in config.parts])


def _refuse_too_little(
    config: DataConfig, store: Store, part: str, split: str, documents: int, rows: int, batch: int
) -> None:
    where = f"data, part '{part}'" if len(config.parts) > 1 else "data"
    counted = store.manifest["parts"][part]
    found = f"{counted['documents']} documents, {_size(counted['bytes'])}{_left_out(counted)}"
    needed = math.ceil(batch / len(config.parts)) if split == "train" else 1
    if documents == 0 or rows < needed:
        raise DataError(
            f"{where}: too little text: {found} from {counted['from']}, of which the split '{split}' got {documents} documents in {rows} rows of "
            f"{config.sequence} tokens; expected at least {needed} rows. Add text, raise data.max_bytes, or lower train.batch or data.sequence; for a "
            "held-out split raise data.validation or data.test."
        )


def _left_out(counted: dict[str, Any]) -> str:
    return f" (capped; {counted['left_out']} too large for the cap)" if counted["left_out"] or counted["capped"] else ""


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
