"""Text comes back as it went in, whatever it holds; training is deterministic, in this process and in others."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest

from lmeff.core.errors import DataError
from lmeff.data.tokenizer import ByteTokenizer, load_bpe, train_bpe

ODD = [
    "",
    " leading and trailing  ",
    "tabs\tand\r\nlines\n\n\n",
    "nul \x00, bell \x07, bom \ufeff, last \U0010ffff, noncharacter \ufffe",
    "e\u0301 é ﬁ ǆ ẞ ſ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 日本語 العربية ไทย",
    "<|bos|> <|eos|> <|pad|> <|endoftext|> Ġ Ċ ▁",
    "def f(x):\n    return x ** 2  # naïve\n",
    "a" * 3000,
]
LESSON = ["def function(argument):\n    return argument\n"] * 50 + ODD


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(LESSON, 300)


def texts():
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    return ODD + ["".join(map(chr, rng.choices(points, k=40))) for _ in range(200)]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_round_trip(kind, bpe):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    for text, ids in zip(texts(), tokenizer.encode_batch(texts())):
        assert tokenizer.decode(ids) == text
        assert np.array_equal(ids, tokenizer.encode(text))
        assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids.tolist())
        assert all(0 <= i < tokenizer.vocab for i in ids)
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad, tokenizer.vocab - 1][:-1]) == text


def test_ids_that_no_text_has_decode_to_nothing_or_to_the_replacement(bpe):
    assert ByteTokenizer().decode([104, 105, 263, 255]) == "hi\ufffd"
    unused = train_bpe(["ab"], 1000)
    assert unused.vocab == 1000
    assert unused.used == 260  # 256 bytes, 3 special tokens, one merge
    assert unused.decode([*unused.encode("ab"), 999]) == "ab"


def test_bytes_are_utf8():
    assert ByteTokenizer().encode("né").tolist() == list("né".encode())


def test_bpe_compresses_what_it_was_trained_on(bpe):
    text = LESSON[0]
    assert len(bpe.encode(text)) < len(text) / 2


def test_training_is_deterministic_in_every_process(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    here = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    code = (
        "import sys, hashlib, ast; from lmeff.data.tokenizer import train_bpe\n"
        "train_bpe(ast.literal_eval(sys.stdin.read()), 300).save(sys.argv[1])"
    )
    for seed in ("1", "2"):
        there = tmp_path / f"{seed}.json"
        subprocess.run(
            [sys.executable, "-c", code, str(there)],
            input=repr(LESSON),
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )
        assert hashlib.sha256(there.read_bytes()).hexdigest() == here


def test_saved_and_loaded_is_the_same(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    loaded = load_bpe(tmp_path / "tokenizer.json", 300)
    for text in texts():
        assert np.array_equal(loaded.encode(text), bpe.encode(text))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json.*delete"):
        load_bpe(tmp_path / "tokenizer.json", 300)
