"""The tokenizer of llama2.c against a plain search of all pairs."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

from lmeff.core.errors import DataError
from lmeff.data.scored_bpe import ScoredBpe, load_scored_bpe


def changed(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


BYTES = [b"<0x%02X>" % byte for byte in range(256)]
WORDS = [
    b" ",
    b"a",
    b"b",
    b"c",
    b"<",
    b"0",
    b"x",
    b"4",
    b"1",
    b">",
    "é".encode(),
    b"ab",
    b" a",
    b"abc",
    b"bc",
    b" ab",
    b"aa",
    b"aaaa",
]
PIECES = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *BYTES, *WORDS]


def put_tokenizer(path: Path, pieces=PIECES, longest: int = 8) -> Path:
    """A tokenizer.bin; scores fall with the id but for one tie."""
    data = struct.pack("<I", longest)
    for i, piece in enumerate(pieces):
        score = -float(len(pieces) - 5 if piece in (b"aa", b"bc") else i)
        data += struct.pack("<fi", score, len(piece)) + piece
    path.write_bytes(data)
    return path


def searched(tokenizer: ScoredBpe, text: str) -> list[int]:
    """Ids by run.c's rule told plainly: of all neighbours whose piece exists, merge the best, the first of equals; again until there is none."""
    closed = {0, 1, 2, *range(3, 259)}
    ids = {piece: i for i, piece in enumerate(tokenizer.pieces) if i not in closed}
    out = [ids[b" "]]
    for char in text:
        piece = char.encode()
        out += [ids[piece]] if piece in ids else [byte + 3 for byte in piece]
    while True:
        pairs = [
            (ids.get(tokenizer.pieces[a] + tokenizer.pieces[b]), i) for i, (a, b) in enumerate(itertools.pairwise(out))
        ]
        found = [(-tokenizer.scores[merged], i, merged) for merged, i in pairs if merged is not None]
        if not found:
            return out
        _, at, merged = min(found)
        out[at : at + 2] = [merged]


class TestTokenizer:
    @pytest.fixture
    def tokenizer(self, tmp_path):
        return load_scored_bpe(put_tokenizer(tmp_path / "tok.bin"))

    def test_reads_pieces_and_scores(self, tokenizer):
        assert tokenizer.vocab == len(PIECES)
        assert tokenizer.pieces == tuple(PIECES)
        assert tokenizer.scores[5] == -5.0
        assert (tokenizer.bos, tokenizer.eos) == (1, 2)

    @pytest.mark.parametrize("seed", range(5))
    def test_merges_as_a_search_of_all_pairs_does(self, tokenizer, seed):
        text = "".join(np.random.default_rng(seed).choice([*"aaabbc <0x41>é", "日"], 200))
        assert tokenizer.encode(text).tolist() == searched(tokenizer, text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "  ab  ",
            "abc",
            "aaaaaaa",
            "é日😀",
            "\n",
            "<0x41>",
            "\n<s>\n",
            "\0",
        ],
    )
    def test_text_comes_back(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text

    def test_control_pieces_and_bytes_never_come_from_text_that_spells_them(self, tokenizer):
        assert not {0, 1, 2} & set(tokenizer.encode("<unk>\n<s>\n\n</s>\n").tolist())
        assert ord("A") + 3 not in tokenizer.encode("<0x41>")

    def test_bytes_stand_for_what_no_piece_spells(self, tokenizer):
        assert tokenizer.encode("日").tolist() == [PIECES.index(b" "), *(byte + 3 for byte in "日".encode())]
        assert tokenizer.decode([byte + 3 for byte in b"\xe6\x97"]) == "\ufffd"

    def test_only_the_first_space_of_a_text_is_not_its_own(self, tokenizer):
        word = PIECES.index(b" ab")
        assert tokenizer.decode([word, word]) == "ab ab"

    def test_a_long_text_is_no_square(self, tokenizer):
        """run.c's search would take minutes."""
        text = "abc aa " * 20_000
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda b: b[:-1], "a piece of 4 bytes"),
            (lambda b: b[:2], "is no tokenizer"),
            (lambda b: b + b"\0\0", "is no tokenizer"),
            (lambda b: changed(b, 8, struct.pack("<i", -1)), "a piece of -1 bytes"),
            (lambda b: changed(b, 8, struct.pack("<i", 9)), "a piece of 9 bytes"),
            (lambda b: changed(b, 4, struct.pack("<f", np.nan)), "a score of nan"),
            (lambda b: b[:17], "1 pieces, expected at least 259"),
            (lambda b: b.replace(b"<0x07>", b"<0x7.>"), "expected <0x07>"),
        ],
        ids=[
            "cut off",
            "empty",
            "bytes behind",
            "negative length",
            "longer than the longest",
            "no number",
            "one piece",
            "a byte of another name",
        ],
    )
    def test_damage_is_told(self, tmp_path, damage, words):
        file = put_tokenizer(tmp_path / "tok.bin")
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(DataError, match=words):
            load_scored_bpe(file)
