"""The tokenizer of llama2.c: pieces with scores, joined from characters by the best score first, with bytes where no piece fits.

The format (https://github.com/karpathy/llama2.c, tokenizer.py and run.c) is little endian: the longest piece in bytes (int32), then for every id its score
(float32), its length (int32) and its bytes. It is SentencePiece's BPE: ids 0, 1, 2 are unknown, bos and eos, 3 to 258 the bytes, and a text begins with a
space of its own.
"""

import heapq
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmeff.core.errors import DataError

FIRST_BYTE = 3
PIECES = FIRST_BYTE + 256  # the first id that is neither special nor a byte


@dataclass(frozen=True)
class ScoredBpe:
    """Pieces by id, their scores, and the id of each piece that text can have.

    A text that spells a special token or a byte's name is text: those ids are not looked up.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    ids: Mapping[bytes, int]
    bos: int = 1
    eos: int = 2
    pad: int = 0

    @property
    def vocab(self) -> int:
        """Number of ids."""
        return len(self.pieces)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Prompts begin with bos."""
        return (self.bos,)

    @property
    def stops(self) -> tuple[int, ...]:
        """Documents of its models are set apart by bos, so it ends a text as eos does."""
        return (self.bos, self.eos)

    def encode(self, text: str) -> np.ndarray:
        """Ids [N] of a text, without special tokens."""
        if not text:
            return np.zeros(0, np.int32)
        return np.asarray(self._merged(self._characters(" " + text)), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 (a model may write them) become U+FFFD."""
        found = b"".join(self._bytes(int(i)) for i in ids)
        return found.removeprefix(b" ").decode(errors="replace")

    def _bytes(self, i: int) -> bytes:
        if FIRST_BYTE <= i < PIECES:
            return bytes([i - FIRST_BYTE])
        return self.pieces[i] if PIECES <= i < len(self.pieces) else b""

    def _characters(self, text: str) -> list[int]:
        found: list[int] = []
        for character in text:
            raw = character.encode(errors="replace")  # half of a surrogate pair is no character
            whole = self.ids.get(raw)
            found += [FIRST_BYTE + byte for byte in raw] if whole is None else [whole]
        return found

    def _merged(self, ids: list[int]) -> list[int]:
        """Joins neighbours while their concatenation is a piece, the best score first and of equals the leftmost.

        A heap of candidates over a linked list: a candidate whose ids are no longer those it was made of is out of date.
        """
        after = [*range(1, len(ids)), -1]
        before = [-1, *range(len(ids) - 1)]
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(left: int) -> None:
            right = after[left] if left >= 0 else -1
            if right < 0:
                return
            joined = self.ids.get(self.pieces[ids[left]] + self.pieces[ids[right]])
            if joined is not None:
                heapq.heappush(heap, (-self.scores[joined], left, ids[left], ids[right], joined))

        for left in range(len(ids) - 1):
            offer(left)
        while heap:
            _, left, first, second, joined = heapq.heappop(heap)
            right = after[left]
            if right < 0 or ids[left] != first or ids[right] != second:
                continue
            ids[left], ids[right], after[left] = joined, -1, after[right]
            if after[right] >= 0:
                before[after[right]] = left
            after[right] = -1
            offer(before[left])
            offer(left)
        return [i for i in ids if i >= 0]


def load_scored_bpe(file: Path) -> ScoredBpe:
    """Reads a tokenizer of llama2.c; raises `DataError` for a file that is none."""
    pieces, scores = [], []
    try:
        data = file.read_bytes()
        (longest,) = struct.unpack_from("<i", data)
        at = 4
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not math.isfinite(score):
                raise ValueError(f"a score of {score} before byte {at}")
            if not 0 <= length <= longest or at + length > len(data):
                raise ValueError(f"a piece of {length} bytes at byte {at}, the longest should have {longest}")
            pieces.append(data[at : at + length])
            scores.append(score)
            at += length
    except (OSError, struct.error, ValueError) as error:
        raise DataError(
            f"{file}: is no tokenizer of llama2.c ({error}), expected its tokenizer.bin: the longest piece, then score, length and bytes of every id"
        ) from error
    if len(pieces) < PIECES:
        raise DataError(
            f"{file}: has {len(pieces)} pieces, expected at least {PIECES}: three special ids and all bytes come first"
        )
    wrong = next((i for i in range(256) if pieces[FIRST_BYTE + i] != b"<0x%02X>" % i), None)
    if wrong is not None:
        raise DataError(
            f"{file}: got {ascii(pieces[FIRST_BYTE + wrong])[:80]} as piece {FIRST_BYTE + wrong}, expected <0x{wrong:02X}>: bytes come in order behind three "
            "special ids; see that it is a tokenizer.bin of llama2.c"
        )
    ids: dict[bytes, int] = {}
    for i, piece in enumerate(pieces[PIECES:], PIECES):
        ids.setdefault(piece, i)
    return ScoredBpe(tuple(pieces), tuple(scores), ids)
