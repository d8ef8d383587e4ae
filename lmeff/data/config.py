"""What to read and how: the config of the data, refused where it is wrong before anything is read."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from lmeff.core.errors import ConfigError
from lmeff.data.pretrained import is_path, vocab_of
from lmeff.data.sources import SOURCES
from lmeff.data.storage import kind_of
from lmeff.data.tokenizer import SPECIALS, TOKENIZERS

KEPT = "tokenizer"  # the folder beside the tokens in which a tokenizer that others made is kept
BPE_SMALLEST = 256 + len(SPECIALS)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One named source of a mixture.

    Attributes:
        name: names the part in files and messages: letters, digits, - and _.
        source: a row of `SOURCES`; with a path and the default source, the files' endings choose.
        path: files, folders or URLs; for "hf" a dataset (and, second, its configuration) or a folder.
        text_field: the field that holds the text, for jsonl, parquet and hf.
        weight: share of the training rows, relative to the other parts.
    """

    name: str
    source: str = "embedded"
    path: tuple[str, ...] = ()
    text_field: str = "text"
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuses a part that cannot be read or drawn from."""
        where = f"data.mixture, part '{self.name}'"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ConfigError(f"data.mixture: got a part named '{self.name}', expected letters, digits, '-' or '_'")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"{where}: got weight {self.weight}, expected a number above 0; leave the part out to not use it"
            )
        check_source(where, self.source, self.path)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, its tokens, and the rows made of them.

    Attributes:
        source: where the text comes from: embedded (Python's standard library, on every machine), text, jsonl, parquet, array_record or hf; with a
            path and the default source, the files' endings choose.
        path: files, folders or URLs of your own; for "hf" a dataset (and, second, its configuration) or a folder.
        tokenizer: "bytes" (no dependency), "bpe" (byte-level, trained on the first 4 MB of the training split; needs the extra text), or a file or
            folder with the tokenizer of a model, such as a tokenizer.json; the run keeps a copy of it.
        bpe_vocab: the vocabulary of "bpe", three special tokens among it.
        sequence: tokens a row.
        text_field: the field that holds the text, for jsonl, parquet and hf.
        mixture: several sources with weights, in place of source and path.
        max_bytes: read no more UTF-8 bytes than this; documents above 1/32 of it (and a page) are then left out.
        validation: share of the documents held out for validation, drawn by a stable hash.
        test: share of the documents held out for the report, drawn by the same hash.
    """

    source: str = "embedded"
    path: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    bpe_vocab: int = 4096
    sequence: int = 256
    text_field: str = "text"
    mixture: tuple[Part, ...] = ()
    max_bytes: int | None = None
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        """Refuses what no data could satisfy."""
        if self.tokenizer not in TOKENIZERS and not is_path(self.tokenizer):
            raise ConfigError(
                f"data.tokenizer: got '{self.tokenizer}', expected one of {sorted(TOKENIZERS)}, or a file or folder with a tokenizer"
            )
        if self.bpe_vocab < BPE_SMALLEST:
            raise ConfigError(
                f"data.bpe_vocab: got {self.bpe_vocab}, expected at least {BPE_SMALLEST} (256 bytes and {len(SPECIALS)} special tokens)"
            )
        if self.sequence < 2:
            raise ConfigError(f"data.sequence: got {self.sequence}, expected at least 2 tokens a row")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"data.max_bytes: got {self.max_bytes}, expected at least 1, or None to read everything")
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise ConfigError(
                f"data.validation, data.test: got {self.validation} and {self.test}, expected shares above 0 that leave some text to train on"
            )
        check_source("data.source", self.source, self.path)
        _check_mixture(self)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the mixture; a config without one is a mixture of one."""
        if self.mixture:
            return self.mixture
        return (Part(name="text", source=self.source, path=self.path, text_field=self.text_field),)


def is_pretrained(config: DataConfig) -> bool:
    """Whether the tokenizer is one that others made, named by its place."""
    return config.tokenizer not in TOKENIZERS


def vocab_size(config: DataConfig, built: Path | None = None) -> int:
    """Ids are below this; known before any text is read, so that a model can be checked against it.

    built: a folder that may hold the tokens of this config already; of a tokenizer by its place the copy in it counts, even where the original is gone.
    """
    if is_pretrained(config):
        copy = None if built is None else built / KEPT
        return vocab_of(str(copy) if copy is not None and copy.is_dir() else config.tokenizer)
    return TOKENIZERS[config.tokenizer].vocab or config.bpe_vocab


def check_source(where: str, source: str, path: tuple[str, ...]) -> None:
    """Refuses an unknown source, a source without its path, and file endings that say nothing."""
    if source not in SOURCES:
        raise ConfigError(f"{where}: got source '{source}', expected one of {sorted(SOURCES)}")
    if isinstance(path, str):
        raise ConfigError(f"{where}: got path '{path}', expected a tuple of paths; write ('{path}',)")
    if source != "embedded" and not path:
        raise ConfigError(f"{where}: source '{source}' has no path, expected files, folders or URLs; set path")
    if source == "embedded" and path:
        kinds = {kind_of(name) for name in path if re.search(r"\.\w+$", name) and not name.endswith("/")} - {None}
        if len(kinds) > 1:
            raise ConfigError(
                f"{where}: the paths are of several kinds {sorted(map(str, kinds))}, expected one; use data.mixture, a part for each"
            )


def _check_mixture(config: DataConfig) -> None:
    if not config.mixture:
        return
    if config.path or config.source != "embedded":
        raise ConfigError(
            f"data.mixture: got a mixture and also source '{config.source}' with path {config.path}, expected one or the other; "
            "make that source a part of the mixture"
        )
    names = [part.name for part in config.mixture]
    if len(set(names)) < len(names):
        raise ConfigError(f"data.mixture: got parts named {names}, expected each name once")
