"""Tokenizers that others made give the ids that their own libraries give; their special ids are read and never guessed."""

import json
import random
import struct

import pytest

from lmeff.core.errors import ConfigError, DataError
from lmeff.data.config import DataConfig, vocab_size
from lmeff.data.loader import build
from lmeff.data.pretrained import keep, load_tokenizer
from lmeff.data.tokenizer import ByteTokenizer, continuing, prompt, train_bpe
from lmeff.infer.stream import TextStream

LESSON = [
    "The café's bells ring; 日本語, naïve 👩‍👩‍👧 people listen.\n",
    "def f(x):\n    return x ** 2\n",
    "<s> </s> <|endoftext|> <0x41> ",
] * 20
TEXTS = ["", " a  b ", *LESSON[:3], "ring ring\n\nbells", "\u0411\u0435\u043b\u043b \U0001f600", "a" * 50]
SENTENCEPIECE = {
    "vocab_size": 420,
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "minloglevel": 2,
}


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A SentencePiece model as Llama has it, and the library's own processor."""
    lib = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sp")
    lib.SentencePieceTrainer.train(
        sentence_iterator=iter(LESSON), model_prefix=str(folder / "tokenizer"), pad_id=-1, **SENTENCEPIECE
    )
    (folder / "tokenizer.vocab").unlink()
    return folder, lib.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def llama2c(sentencepiece, tmp_path_factory):
    """The same pieces as llama2.c keeps them."""
    _, inner = sentencepiece
    pieces = [inner.id_to_piece(i).replace("▁", " ").encode() for i in range(inner.get_piece_size())]
    pieces[1], pieces[2] = b"\n<s>\n", b"\n</s>\n"
    body = b"".join(struct.pack("<fi", inner.get_score(i), len(p)) + p for i, p in enumerate(pieces))
    file = tmp_path_factory.mktemp("bin") / "tok420.bin"
    file.write_bytes(struct.pack("<i", max(map(len, pieces))) + body)
    return file


def library_bpe(folder, *, dressed, ends=()):
    """A tokenizer.json of a byte-level BPE, dressed with bos by its post-processor where asked."""
    lib = pytest.importorskip("tokenizers")
    inner = train_bpe(LESSON, 320).inner
    if dressed:
        inner.post_processor = lib.processors.TemplateProcessing(
            single=f"<|bos|> $A{''.join(' ' + end for end in ends)}",
            special_tokens=[(name, inner.token_to_id(name)) for name in ("<|bos|>", *ends)],
        )
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return lib.Tokenizer.from_file(str(folder / "tokenizer.json"))


def gpt2_files(folder, names):
    """GPT-2's two files, from the merges of a trained tokenizer; also that tokenizer with the same ids."""
    lib = pytest.importorskip("tokenizers")
    trained = json.loads(train_bpe(LESSON, 320).inner.to_str())["model"]
    order = [*sorted(trained["vocab"], key=trained["vocab"].get)[3:], "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(order)}
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in trained["merges"]) + "\n")
    inner = lib.Tokenizer(lib.models.BPE(vocab, [tuple(pair) for pair in trained["merges"]]))
    inner.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return inner


def write(folder, name, **values):
    (folder / name).write_text(json.dumps(values))


def test_tokenizer_json_gives_the_library_s_ids(tmp_path):
    inner = library_bpe(tmp_path, dressed=True)
    got = load_tokenizer(tmp_path)
    for text, ids in zip(TEXTS, got.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == inner.encode(text, add_special_tokens=False).ids
        assert got.decode(ids) == text
    assert got.vocab == inner.get_vocab_size()
    assert prompt(got, "bells").tolist() == inner.encode("bells").ids
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("x").tolist() == got.encode("x").tolist()
    spelled = got.encode("<|bos|>x<|eos|>")
    assert not {0, 1, 2} & set(spelled.tolist())
    assert got.decode([0, *spelled, 1, 5000]) == "<|bos|>x<|eos|>"


@pytest.mark.parametrize(
    ("dressed", "ends", "config", "prefix"),
    [
        (False, (), {}, ()),
        (True, (), {}, (0,)),
        (True, ("<|eos|>",), {}, (0,)),
        (True, (), {"bos_token": "<|bos|>", "add_bos_token": False}, ()),
        (False, (), {"bos_token": {"content": "<|bos|>"}, "add_bos_token": True}, (0,)),
    ],
    ids=["plain", "post-processor", "eos after the text", "told not to", "told to"],
)
def test_what_stands_before_a_prompt_is_read(tmp_path, dressed, ends, config, prefix):
    library_bpe(tmp_path, dressed=dressed, ends=ends)
    write(tmp_path, "tokenizer_config.json", **config)
    assert load_tokenizer(tmp_path).prefix == prefix


def test_special_ids_come_from_the_files_in_order(tmp_path):
    library_bpe(tmp_path, dressed=False)
    with pytest.raises(DataError, match=r"names no eos token.*eos_token_id"):
        _ = load_tokenizer(tmp_path).eos
    assert load_tokenizer(tmp_path).stops == ()
    write(tmp_path, "config.json", bos_token_id=7, eos_token_id=8, pad_token_id=-1)
    got = load_tokenizer(tmp_path)
    assert (got.bos, got.eos, got.pad, got.stops) == (7, 8, 8, (8,))
    write(tmp_path, "generation_config.json", eos_token_id=[9, 1], pad_token_id=2)
    got = load_tokenizer(tmp_path)
    assert (got.bos, got.eos, got.pad, got.stops) == (7, 9, 2, (9, 1, 8))
    write(tmp_path, "special_tokens_map.json", eos_token="<|eos|>")
    write(tmp_path, "tokenizer_config.json", bos_token={"content": "<|bos|>"}, eos_token=None)
    got = load_tokenizer(tmp_path)
    assert (got.bos, got.eos, got.stops) == (0, 1, (1, 9, 8))


def test_without_bos_a_document_begins_with_eos(tmp_path):
    library_bpe(tmp_path, dressed=False)
    write(tmp_path, "tokenizer_config.json", eos_token="<|eos|>")
    assert load_tokenizer(tmp_path).bos == 1


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")], ids=["new", "old"])
def test_gpt2_files_give_the_library_s_ids(tmp_path, names):
    inner = gpt2_files(tmp_path, names)
    got = load_tokenizer(tmp_path)
    end = inner.token_to_id("<|endoftext|>")
    for text, ids in zip(TEXTS, got.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == inner.encode(text).ids
        assert got.decode([end, *ids, end]) == text
    assert (got.bos, got.eos, got.pad, got.stops, got.prefix) == (end, end, end, (end,), ())


def test_files_with_a_name_before_theirs(tmp_path):
    gpt2_files(tmp_path, ("small-encoder.json", "small-vocab.bpe"))
    got = load_tokenizer(tmp_path / "small-encoder.json")
    keep(tmp_path / "small-encoder.json", tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == [
        "encoder.json",
        "special_ids.json",
        "vocab.bpe",
    ]
    assert load_tokenizer(tmp_path / "copy").encode(TEXTS[2]).tolist() == got.encode(TEXTS[2]).tolist()


def test_sentencepiece_gives_the_library_s_ids(sentencepiece):
    folder, inner = sentencepiece
    got = load_tokenizer(folder)
    for text, ids in zip(TEXTS, got.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == inner.encode(text)
        assert got.decode([1, *ids, 2, 5000]) == text
    assert (got.vocab, got.bos, got.eos, got.stops) == (420, 1, 2, (2,))
    with pytest.raises(DataError, match=r"add_bos_token"):
        _ = got.prefix


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, (1,)),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, ()),
        ({"add_bos_token": True}, (1,)),
    ],
    ids=["class", "class told not to", "told to"],
)
def test_sentencepiece_and_bos(sentencepiece, tmp_path, config, prefix):
    keep(sentencepiece[0], tmp_path)
    (tmp_path / "special_ids.json").unlink()
    write(tmp_path, "tokenizer_config.json", **config)
    assert load_tokenizer(tmp_path).prefix == prefix


def test_special_tokens_beside_sentencepiece(sentencepiece, tmp_path):
    keep(sentencepiece[0], tmp_path)
    (tmp_path / "special_ids.json").unlink()
    write(tmp_path, "added_tokens.json", **{"<pad>": 420})
    with pytest.raises(DataError, match=r"1 tokens.*'<pad>'.*tokenizer.json"):
        load_tokenizer(tmp_path)
    write(tmp_path, "special_tokens_map.json", pad_token="<pad>")
    got = load_tokenizer(tmp_path)
    assert (got.pad, got.vocab) == (420, 421)
    assert got.decode([*got.encode("bells"), 420]) == "bells"


def test_llama2c_gives_sentencepiece_s_ids(llama2c, sentencepiece):
    got, (_, inner) = load_tokenizer(llama2c), sentencepiece
    rng = random.Random(1)
    drawn = ["".join(rng.choices("abcdefil nrst\n日é👩<>0x41/", k=rng.randrange(60))) for _ in range(150)]
    for text in (*TEXTS, *drawn):
        assert got.encode(text).tolist() == inner.encode(text), text
        assert got.decode([1, *got.encode(text), 2]) == text
    assert (got.vocab, got.bos, got.eos, got.prefix) == (420, 1, 2, (1,))


def test_a_copy_needs_nothing_else(tmp_path):
    library_bpe(tmp_path / "model", dressed=True)
    write(tmp_path / "model", "config.json", eos_token_id=[1, 9], model_type="llama")
    got = load_tokenizer(tmp_path / "model")
    keep(tmp_path / "model", tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == ["special_ids.json", "tokenizer.json"]
    again = load_tokenizer(tmp_path / "copy")
    assert (again.stops, again.prefix, again.eos) == (got.stops, got.prefix, got.eos) == ((1, 9), (0,), 1)


@pytest.mark.parametrize("kind", ["bytes", "json", "sentencepiece", "llama2c"])
def test_text_that_goes_on_keeps_its_first_space(kind, tmp_path, sentencepiece, llama2c):
    if kind == "json":
        library_bpe(tmp_path, dressed=True)
        write(tmp_path, "config.json", eos_token_id=1)
    places = {"json": tmp_path, "sentencepiece": sentencepiece[0], "llama2c": llama2c}
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(places[kind])
    ids = tokenizer.encode("The bells ring; 日本語, naïve people").tolist()
    cut = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]) == "The bells")
    stream = TextStream(decoder=continuing(tokenizer))
    pieces = [stream.add(i) for i in (*ids[cut:], tokenizer.eos)]
    assert "".join(pieces) + stream.finish() == " ring; 日本語, naïve people"
    assert not any(piece.endswith("\ufffd") for piece in pieces)


BROKEN = {
    "absent": ({}, "", ["does not exist", "tokenizer.json"]),
    "an empty folder": ({"x.txt": ""}, "", ["holds none", "SentencePiece"]),
    "a file of another kind": ({"x.txt": ""}, "x.txt", ["got the file", "tokenizer.json"]),
    "a damaged tokenizer.json": ({"tokenizer.json": "{}"}, "", ["tokenizer.json", "fetch it again"]),
    "a damaged model": ({"tokenizer.model": "no model"}, "", ["SentencePiece model", "fetch it again"]),
    "several models": ({"a.model": "", "b.model": ""}, "", ["several", "a.model, b.model"]),
    "half of GPT-2": ({"vocab.json": "{}"}, "", ["merges.txt", "missing"]),
    "a damaged vocabulary": ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}, "", ["256 byte tokens"]),
    "merges of other pieces": (
        {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nx y\n"},
        "",
        ["byte-level BPE"],
    ),
    "a damaged .bin": ({"tok.bin": "abcdefgh"}, "tok.bin", ["llama2.c", "score, length"]),
    "rules of another class": (
        {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
        "",
        ["Qwen2Tokenizer", "tokenizer.json"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_tokenizer_is_refused(name, tmp_path):
    files, path, words = BROKEN[name]
    place = tmp_path / "place"
    if files:
        place.mkdir()
    for file, content in files.items():
        (place / file).write_text(content)
    with pytest.raises(DataError, match=r"expected|is no") as caught:
        load_tokenizer(place / path if path else place)
    assert all(word in str(caught.value) for word in words), caught.value
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        vocab_size(DataConfig(tokenizer=str(place / path if path else place)))


BESIDE = {
    "a token that is not there": (
        "tokenizer_config.json",
        {"eos_token": "</s>"},
        ["eos_token '</s>'", "does not have"],
    ),
    "bos without one": ("tokenizer_config.json", {"add_bos_token": True}, ["add_bos_token", "bos_token"]),
    "an id that is none": ("config.json", {"eos_token_id": "2"}, ["special id '2'", "number"]),
    "no object": ("generation_config.json", [1], ["list", "JSON object"]),
}


@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_it_that_are_wrong_are_refused(name, tmp_path):
    file, content, words = BESIDE[name]
    library_bpe(tmp_path, dressed=False)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match="expected") as caught:
        load_tokenizer(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_run_s_data_keep_their_own_copy(tmp_path, notes):
    library_bpe(tmp_path / "model", dressed=True)
    write(tmp_path / "model", "generation_config.json", eos_token_id=[1, 9])
    config = DataConfig(path=(str(notes),), tokenizer=str(tmp_path / "model"), sequence=32)
    vocab = train_bpe(LESSON, 320).used
    assert vocab_size(config) == vocab
    corpus = build(config, tmp_path / "data", 0, batch=2)
    (tmp_path / "model").rename(tmp_path / "moved")
    again = build(config, tmp_path / "data", 0, batch=2)
    assert vocab_size(config, tmp_path / "data") == again.vocab == vocab
    assert again.digest == corpus.digest
    shard = corpus.train.shards[0]
    first = shard.tokens[shard.starts[0] : shard.starts[1]]
    assert (first[0], first[-1]) == (1, 1)  # no bos is named
    assert corpus.tokenizer.decode(first).strip()
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*does not exist"):
        vocab_size(config, tmp_path / "elsewhere")
    (tmp_path / "data/tokenizer/special_ids.json").write_text("{}")
    with pytest.raises(DataError, match=r"special_ids.json: is damaged"):
        build(config, tmp_path / "data", 0, batch=2)
