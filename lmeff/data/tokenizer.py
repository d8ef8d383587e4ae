"""Text to ids and back: bytes, or byte-level BPE trained on the training split. `decode(encode(text)) == text` for both.

Tokenizers that others made are in `pretrained.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmeff.core.errors import DataError
from lmeff.core.extras import require

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")


class Tokenizer(Protocol):
    """A document is `bos, *encode(text), eos`, a prompt `*prefix, *encode(text)`; what is generated ends at one of `stops`.

    Special tokens never come from text, whatever it spells, and decode to nothing.
    """

    @property
    def vocab(self) -> int: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def prefix(self) -> tuple[int, ...]: ...
    @property
    def stops(self) -> tuple[int, ...]: ...
    def encode(self, text: str) -> np.ndarray: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class Ids(NamedTuple):
    """What is known of a kind of tokenizer before it exists. `vocab` None: the config sets it."""

    vocab: int | None
    bos: int
    eos: int
    pad: int


# Bytes come first so that an id below 256 is the byte itself; eight special ids, five of them unused, so that 264 rows divide over 2, 4 or 8 devices.
BYTES = Ids(264, bos=256, eos=257, pad=258)
BPE = Ids(None, bos=0, eos=1, pad=2)
TOKENIZERS: dict[str, Ids] = {"bytes": BYTES, "bpe": BPE}


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes: an id below 256 is the byte."""

    vocab: int = 264
    bos: int = BYTES.bos
    eos: int = BYTES.eos
    pad: int = BYTES.pad

    @property
    def prefix(self) -> tuple[int, ...]:
        """A prompt begins as a document does."""
        return (self.bos,)

    @property
    def stops(self) -> tuple[int, ...]:
        """What ends a text."""
        return (self.eos,)

    def encode(self, text: str) -> np.ndarray:
        """Ids [N] of a text, without special tokens."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 (a model may write them) become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")


@dataclass(frozen=True)
class BpeTokenizer:
    """Byte-level BPE (Radford et al. 2019): 256 bytes, merges, and the special tokens as ids 0, 1, 2.

    vocab: as configured; `used` ids exist, fewer where the text ran out of pairs to merge.
    """

    inner: Any
    vocab: int
    bos: int = BPE.bos
    eos: int = BPE.eos
    pad: int = BPE.pad

    @property
    def prefix(self) -> tuple[int, ...]:
        """A prompt begins as a document does."""
        return (self.bos,)

    @property
    def stops(self) -> tuple[int, ...]:
        """What ends a text."""
        return (self.eos,)

    @property
    def used(self) -> int:
        """Ids that some text can have."""
        return self.inner.get_vocab_size()

    def save(self, file: Path) -> None:
        """Writes tokenizer.json, in the format of the library."""
        self.inner.save(str(file))

    def encode(self, text: str) -> np.ndarray:
        """Ids [N] of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel."""
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 (a model may write them) become U+FFFD."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)


def train_bpe(texts: Iterable[str], vocab: int) -> BpeTokenizer:
    """Trains a tokenizer; the same texts give the same bytes of tokenizer.json."""
    lib = require("tokenizers", extra="text")
    inner = lib.Tokenizer(lib.models.BPE())
    inner.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return _bpe(inner, vocab)


def load_bpe(file: Path, vocab: int) -> BpeTokenizer:
    """Reads a tokenizer.json back."""
    lib = require("tokenizers", extra="text")
    try:
        return _bpe(lib.Tokenizer.from_file(str(file)), vocab)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file}: is no tokenizer ({error}); delete its folder to build it again") from error


def _bpe(inner: Any, vocab: int) -> BpeTokenizer:
    inner.encode_special_tokens = True  # text that spells a special token is text; the setting is not kept in the file
    return BpeTokenizer(inner, vocab)


def prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids [N] of a text that is to be continued."""
    return np.concatenate([np.asarray(tokenizer.prefix, np.int32), tokenizer.encode(text)])


def continuing(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Ids to text that goes on from other text: `decode` alone takes ids for the beginning of a text, where SentencePiece leaves out a space."""
    before = tokenizer.encode("a").tolist()
    known = len(tokenizer.decode(before))
    return lambda ids: tokenizer.decode([*before, *ids])[known:]
