"""The tokenizer.bin of llama2.c: pieces with scores, as SentencePiece trains them, merged best score first (https://github.com/karpathy/llama2.c, run.c).

A text begins with a space that is not its own; a character that is no piece becomes bytes, pieces named `<0xNN>`, or `unk` where there are none.
"""

import heapq
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lmeff.interop.container import refuse, shown

BYTE = re.compile(rb"<0x([0-9A-F]{2})>")
SPACE = b" "
LONGEST = 1 << 16  # bytes of a piece; a longer one is damage
WHOLE = "See that this is the tokenizer.bin of llama2.c, and whole."


@dataclass(frozen=True)
class ScoredBpe:
    """Byte pieces and their scores, by id. Ids `unk`, `bos` and `eos` are control pieces: no text becomes one, and they decode to nothing."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    unk: int = 0
    bos: int = 1
    eos: int = 2

    @property
    def vocab(self) -> int:
        """The number of ids."""
        return len(self.pieces)

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """The byte that an id stands for, of those that do."""
        found = ((i, BYTE.fullmatch(piece)) for i, piece in enumerate(self.pieces))
        return {i: int(match[1], 16) for i, match in found if match}

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """The id of each piece that text may become; of equal pieces the first."""
        closed = {self.unk, self.bos, self.eos, *self._bytes}
        return {piece: i for i, piece in reversed([*enumerate(self.pieces)]) if i not in closed}

    @cached_property
    def _of_byte(self) -> dict[int, int]:
        return {byte: i for i, byte in self._bytes.items()}

    def encode(self, text: str) -> np.ndarray:
        """Ids [N], int32, of a text, without control pieces."""
        if not text:
            return np.zeros(0, np.int32)
        ids: list[int] = []
        for char in (SPACE, *(char.encode(errors="replace") for char in text)):
            known = self._ids.get(char)
            if known is not None:
                ids.append(known)
            else:
                ids += [self._of_byte[byte] for byte in char] if self._of_byte else [self.unk]
        return np.asarray(self._merged(ids), np.int32)

    def _merged(self, ids: list[int]) -> list[int]:
        """Merges the pair whose piece has the best score, of equals the leftmost, until no pair is a piece.

        A heap in place of run.c's search of all pairs for each merge; a pair whose sides have changed since is dropped when its turn comes.
        """
        after = [*range(1, len(ids)), -1]
        before = [*range(-1, len(ids) - 1)]
        heap: list[tuple[float, int, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            merged = self._ids.get(self.pieces[ids[left]] + self.pieces[ids[right]])
            if merged is not None:
                heapq.heappush(heap, (-self.scores[merged], left, ids[left], ids[right], merged))

        for left, right in enumerate(after):
            consider(left, right)
        while heap:
            _, left, left_id, right_id, merged = heapq.heappop(heap)
            right = after[left]
            if right < 0 or (ids[left], ids[right]) != (left_id, right_id):
                continue
            ids[left], ids[right] = merged, -1
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [i for i in ids if i >= 0]

    def decode(self, ids: Iterable[int], *, begins: bool = True) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD. `begins`: the ids begin a text, whose first space is not its own."""
        closed = {self.unk, self.bos, self.eos}
        kept = [int(i) for i in ids if int(i) not in closed and 0 <= i < self.vocab]
        text = b"".join(bytes([self._bytes[i]]) if i in self._bytes else self.pieces[i] for i in kept)
        if begins and kept and kept[0] not in self._bytes:
            text = text.removeprefix(SPACE)
        return text.decode(errors="replace")


def read_tokenizer(file: Path) -> ScoredBpe:
    """Reads a tokenizer.bin: the longest piece's length, then score, length and bytes of each piece. Raises `CheckpointError` where it is damaged."""
    file = Path(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        refuse(file, f"'{error.strerror}'", "a tokenizer.bin", "Check the path.")
    if len(data) < 4:
        refuse(file, f"{len(data)} bytes", "the longest piece's length, and pieces", WHOLE)
    (longest,), at = struct.unpack_from("<I", data), 4
    pieces: list[bytes] = []
    scores: list[float] = []
    while at < len(data):
        if len(data) - at < 8:
            refuse(
                file, f"{len(data) - at} bytes behind piece {len(pieces)}", "score, length and bytes of the next", WHOLE
            )
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= min(longest, LONGEST, len(data) - at) or not np.isfinite(score):
            refuse(
                file,
                f"piece {len(pieces)} of {length} bytes and score {score}",
                f"at most {min(longest, len(data) - at)} bytes and a finite score",
                WHOLE,
            )
        pieces.append(data[at : at + length])
        scores.append(score)
        at += length
    return _checked(file, pieces, scores)


def _checked(file: Path, pieces: Sequence[bytes], scores: Sequence[float]) -> ScoredBpe:
    if len(pieces) < 3:
        refuse(file, f"{len(pieces)} pieces", "at least the three control pieces", WHOLE)
    found = {match[0] for match in map(BYTE.fullmatch, pieces) if match}
    if len(found) not in (0, 256):
        refuse(file, f"{len(found)} pieces of bytes, such as {shown(min(found))}", "all 256 or none", WHOLE)
    return ScoredBpe(tuple(pieces), tuple(scores))
