"""Readers of the formats in which others keep tokenizers, each down to the few functions that they differ in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmeff.core.errors import DataError
from lmeff.core.extras import require
from lmeff.data import special
from lmeff.data.special import Specials

PROBE = "a b"
END = "<|endoftext|>"  # in every vocabulary of GPT-2's format: before and after a document
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
BOS_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer", "GemmaTokenizerFast")


class Codec(NamedTuple):
    """What the formats differ in. vocab: ids are below this. id_of: the id of a token by its name. own: special ids that its own file gives."""

    vocab: int
    encode: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    id_of: Callable[[str], int | None]
    own: Specials


def read_json(file: Path) -> Codec:
    """A tokenizer.json of the library tokenizers."""
    lib = require("tokenizers", extra="text")
    try:
        inner = lib.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file}: is no tokenizer of the library tokenizers ({error}); fetch it again") from error
    inner.no_truncation()
    inner.no_padding()
    return _codec(inner, Specials(prefix=_put_before(inner)))


def _codec(inner: Any, own: Specials) -> Codec:
    inner.encode_special_tokens = True  # text that spells a special token is text; the setting is not kept in the file

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in inner.encode_batch_fast(texts, add_special_tokens=False)]

    vocab = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    return Codec(vocab, encode, lambda ids: inner.decode(ids, skip_special_tokens=True), inner.token_to_id, own)


def _put_before(inner: Any) -> tuple[int, ...]:
    """The ids that its post-processor puts before a text; what it puts after one would end a prompt."""
    plain = inner.encode(PROBE, add_special_tokens=False).ids
    dressed = inner.encode(PROBE, add_special_tokens=True).ids
    for at in range(len(dressed) - len(plain) + 1):
        if dressed[at : at + len(plain)] == plain:
            return tuple(dressed[:at])
    raise DataError(
        "tokenizer.json: its post-processor changes the ids of a text, expected one that puts special tokens around them; this model's prompts cannot be made"
    )


def read_gpt2(vocabulary: Path, merges: Path) -> Codec:
    """GPT-2's byte-level BPE (Radford et al. 2019)."""
    _refuse_other_classes(vocabulary)
    lib = require("tokenizers", extra="text")
    try:
        inner = lib.Tokenizer(lib.models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{vocabulary}, {merges.name}: are no byte-level BPE ({error}), expected GPT-2's vocabulary and merges; fetch them again"
        ) from error
    missing = [byte for byte in lib.pre_tokenizers.ByteLevel.alphabet() if inner.token_to_id(byte) is None]
    if missing:
        raise DataError(
            f"{vocabulary}: lacks {len(missing)} of the 256 byte tokens, expected all: it is a vocabulary of another kind than GPT-2's"
        )
    inner.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = lib.decoders.ByteLevel()
    end = inner.token_to_id(END)
    if end is not None:
        inner.add_special_tokens([END])
    return _codec(inner, Specials(bos=end, eos=end, stops=() if end is None else (end,), prefix=()))


def _refuse_other_classes(vocabulary: Path) -> None:
    """Other models keep their vocabulary in the same two files and cut text by other rules."""
    file = vocabulary.parent / "tokenizer_config.json"
    name = special.read_object(file).get("tokenizer_class") if file.exists() else None
    if name is not None and name not in GPT2_CLASSES:
        raise DataError(
            f"{file}: is of {name}, whose rules for cutting text are not in {vocabulary.name}; expected a tokenizer.json. "
            "Save the tokenizer in that format with the library that made it."
        )


def read_sentencepiece(file: Path) -> Codec:
    """A SentencePiece model (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226)."""
    lib = require("sentencepiece", extra="text")
    try:
        inner = lib.SentencePieceProcessor(model_file=str(file))
    except Exception as error:  # the library raises several
        raise DataError(f"{file}: is no SentencePiece model ({error}); fetch it again") from error
    ids = [i if i >= 0 else None for i in (inner.bos_id(), inner.eos_id(), inner.pad_id())]
    stops = () if ids[1] is None else (ids[1],)
    own = Specials(*ids, stops=stops, prefix=_prefix_of_class(file.parent, ids[0]))
    known = {inner.id_to_piece(i): i for i in range(inner.get_piece_size())}
    return Codec(inner.get_piece_size(), inner.encode, inner.decode, known.get, own)


def _prefix_of_class(folder: Path, bos: int | None) -> tuple[int, ...] | None:
    """A SentencePiece model does not say whether prompts begin with bos; these classes of transformers put it there unless told otherwise."""
    file = folder / "tokenizer_config.json"
    named = special.read_object(file).get("tokenizer_class") if file.exists() else None
    return (bos,) if named in BOS_CLASSES and bos is not None else None
