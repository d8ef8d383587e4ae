"""lmeff's own tokenizers in the format of others: the same ids, in lmeff's reader and in transformers."""

import random

import pytest

from lmeff.data.portable import carried, special_ids, write_portable
from lmeff.data.pretrained import load_tokenizer
from lmeff.data.tokenizer import ByteTokenizer, prompt, train_bpe

TEXTS = ["", " a  b ", "naïve 日本 👩‍👩‍👧\n\n\tx", "<|bos|> <|eos|>", "\x00\x7f\x80 end "]


def own(kind):
    return ByteTokenizer() if kind == "bytes" else train_bpe(["def f(x):\n    return x ** 2\n"] * 20, 300)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_read_back_it_is_the_same(kind, tmp_path):
    tokenizer = own(kind)
    write_portable(tokenizer, tmp_path)
    back = load_tokenizer(tmp_path)
    rng = random.Random(0)
    drawn = ["".join(map(chr, rng.choices(range(1, 0xD800), k=30))) for _ in range(30)]
    for text in TEXTS + drawn:
        assert back.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert back.decode(back.encode(text)) == text
    assert prompt(back, "x").tolist() == prompt(tokenizer, "x").tolist()
    assert (back.bos, back.eos, back.pad, back.stops) == (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.stops)
    assert special_ids(back) == special_ids(tokenizer)
    assert [file.name for file in carried(tmp_path)] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_opens_it(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = own(kind)
    write_portable(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("naïve 日本\n\n x", " def f(x): return  x"):
        assert theirs(text)["input_ids"] == prompt(tokenizer, text).tolist()
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
    )
