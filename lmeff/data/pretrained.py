"""Tokenizers that others made: one reader for each of their formats, all with the interface of `tokenizer.Tokenizer`.

    tokenizer.json                                    the library tokenizers
    tokenizer.model, or another .model                SentencePiece
    vocab.json + merges.txt, encoder.json + vocab.bpe GPT-2's byte-level BPE
    tokenizer.bin, or another .bin                    llama2.c

Special ids come from the files beside it (`special.py`). Chat templates are not read: a prompt is plain text, and what spells a special token in it is text.
`decode(encode(text)) == text` where the tokenizer does not change text itself; some normalize Unicode or spaces.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmeff.core.errors import ConfigError, DataError
from lmeff.data import special
from lmeff.data.codecs import Codec, read_gpt2, read_json, read_sentencepiece
from lmeff.data.scored_bpe import load_scored_bpe
from lmeff.data.special import Specials
from lmeff.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer that was read. `source` is where from, for messages.

    Without a bos a document begins with eos, which then stands between documents (GPT-2's convention). Without a pad token eos fills rows up: filling has no
    weight in any loss.
    """

    codec: Codec
    specials: Specials
    source: str

    @property
    def vocab(self) -> int:
        """Ids are below this, special ones that its own file lacks among them; a model may have more rows."""
        ids = (*self.specials[:3], *self.specials.stops, *(self.specials.prefix or ()))
        return max(self.codec.vocab, *(i + 1 for i in ids if i is not None), 0)

    @property
    def bos(self) -> int:
        """What a document begins with."""
        return self.eos if self.specials.bos is None else self.specials.bos

    @property
    def eos(self) -> int:
        """What a document ends with; raises `DataError` where no file names one."""
        if self.specials.eos is None:
            raise DataError(
                f"{self.source}: names no eos token, expected one: a document ends with it. Put eos_token into a tokenizer_config.json beside it, "
                "or eos_token_id into a generation_config.json."
            )
        return self.specials.eos

    @property
    def pad(self) -> int:
        """What rows are filled up with."""
        return self.eos if self.specials.pad is None else self.specials.pad

    @property
    def prefix(self) -> tuple[int, ...]:
        """What stands before a prompt; raises `DataError` where no file says."""
        if self.specials.prefix is None:
            raise DataError(
                f"{self.source}: does not say whether a prompt begins with bos, expected add_bos_token in a tokenizer_config.json beside it; "
                "write true or false there, as the model was trained"
            )
        return self.specials.prefix

    @property
    def stops(self) -> tuple[int, ...]:
        """What ends a text; empty where no file names any."""
        return self.specials.stops

    def encode(self, text: str) -> np.ndarray:
        """Ids [N] of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [np.asarray(ids, dtype=np.int32) for ids in self.codec.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; ids that the tokenizer does not have (rows that fill up a model's table) decode to nothing."""
        return self.codec.decode([int(i) for i in ids if 0 <= int(i) < self.codec.vocab])


class Format(NamedTuple):
    """A format's files. names: what they are called in a folder of their own. glob: the first of them in anyone's folder. file: the first given by itself;
    what stands before its name stands before the others' too."""

    names: tuple[str, ...]
    glob: str
    file: str
    read: Callable[..., Codec | Tokenizer]


class Found(NamedTuple):
    """A tokenizer's format and its files, in the order of the format's names."""

    format: Format
    files: tuple[Path, ...]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a folder, or that a file is; raises `DataError` where there is none or it is damaged."""
    found = find(path)
    made = found.format.read(*found.files)
    if not isinstance(made, Codec):
        return made
    folder = found.files[0].parent
    return Pretrained(made, special.kept(folder) or special.find(folder, _id_of(made, folder), made.own), str(path))


def keep(path: Path, folder: Path) -> Tokenizer:
    """Copies a tokenizer's files into `folder`, with its special ids as they were found: the copy needs nothing else. Gives the tokenizer."""
    found, tokenizer = find(path), load_tokenizer(path)
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in zip(found.files, found.format.names, strict=True):
        shutil.copyfile(file, folder / name)
    for name in CARRIED:
        if (found.files[0].parent / name).exists():
            shutil.copyfile(found.files[0].parent / name, folder / name)
    if isinstance(tokenizer, Pretrained):
        text = json.dumps(tokenizer.specials.to_json(), indent=1) + "\n"
        (folder / special.KEPT).write_text(text, encoding="utf-8")
    return tokenizer


def holds_one(folder: Path) -> bool:
    """Whether there is a tokenizer in a folder."""
    return any(any(folder.glob(format.glob)) for format in FORMATS)


def find(path: Path) -> Found:
    """The format and the files of the tokenizer in a folder, or that a file is."""
    if not path.exists():
        raise DataError(f"tokenizer: '{path}' does not exist, expected {EXPECTED}; check its spelling")
    first = _first_in(path) if path.is_dir() else path
    for format in FORMATS:
        match = re.fullmatch(format.file, first.name)
        if match is not None:
            return Found(format, (first, *(_partner(first, match[1] + name) for name in format.names[1:])))
    raise DataError(f"tokenizer: got the file '{path}', expected {EXPECTED}")


def _first_in(folder: Path) -> Path:
    for format in FORMATS:
        found = sorted(folder.glob(format.glob))
        if len(found) > 1:
            raise DataError(
                f"tokenizer: {folder} holds several: {', '.join(file.name for file in found)}; expected one. Name the file itself."
            )
        if found:
            return found[0]
    raise DataError(f"tokenizer: {folder} holds none, expected {EXPECTED}; name the tokenizer's own file or folder")


def is_path(text: str) -> bool:
    """Whether a config's tokenizer is meant as a place and not as a name."""
    return "/" in text or "." in text or Path(text).exists()


def vocab_of(text: str) -> int:
    """Ids of the tokenizer at a place are below this; raises `ConfigError` where there is none."""
    path = Path(text)
    try:
        return _vocab(path, max((file.stat().st_mtime_ns for file in find(path).files), default=0))
    except DataError as error:
        raise ConfigError(f"data.tokenizer: {error}") from error


# Validation asks for the same tokenizer time and again; the time of its files is there to notice another one.
@functools.lru_cache(maxsize=8)
def _vocab(path: Path, changed: int) -> int:
    return load_tokenizer(path).vocab


def _partner(file: Path, name: str) -> Path:
    partner = file.with_name(name)
    if not partner.exists():
        raise DataError(
            f"tokenizer: {file} is half of one: {partner.name} is missing beside it, expected both; fetch it too"
        )
    return partner


def _id_of(codec: Codec, folder: Path) -> Callable[[str], int | None]:
    """The id of a token by its name, special ones that other files add among them."""
    added = added_special(codec, folder)
    return lambda token: codec.id_of(token) if codec.id_of(token) is not None else added.get(token)


def added_special(codec: Codec, folder: Path) -> dict[str, int]:
    """Special tokens that the files beside a vocabulary add to it; refuses others, which would change how text is cut."""
    known = special.special_names(folder)
    added = {token: i for token, i in special.added_tokens(folder).items() if codec.id_of(token) is None}
    others = [token for token in added if token not in known]
    if others:
        raise DataError(
            f"tokenizer: files in {folder} add {len(others)} tokens to its vocabulary that are not special, such as {others[0]!r}; expected them in a "
            "tokenizer.json. Save the tokenizer in that format with the library that made it."
        )
    return added


# What is copied from beside a tokenizer; templates of chats are not read here, but an export carries them along.
CARRIED = (*special.NAMED, "generation_config.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")

# In the order in which they are looked for in a folder.
FORMATS: tuple[Format, ...] = (
    Format(("tokenizer.json",), "tokenizer.json", r"(.*)(?<!vocab)(?<!encoder)\.json", read_json),
    Format(("tokenizer.model",), "*.model", r"(.*)\.model", read_sentencepiece),
    Format(("vocab.json", "merges.txt"), "vocab.json", r"(.*)vocab\.json", read_gpt2),
    Format(("encoder.json", "vocab.bpe"), "encoder.json", r"(.*)encoder\.json", read_gpt2),
    Format(("tokenizer.bin",), "tokenizer.bin", r"(.*)\.bin", load_scored_bpe),
)
EXPECTED = "a tokenizer.json, a SentencePiece .model, GPT-2's vocab.json with merges.txt, a .bin of llama2.c, or a folder with one of them"
