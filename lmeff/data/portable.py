"""lmeff's own tokenizers in the format of the library tokenizers, so that a model that lmeff trained can be used elsewhere with its text."""

import json
from pathlib import Path
from typing import Any

from lmeff.core.extras import require
from lmeff.data.pretrained import Pretrained
from lmeff.data.special import KEPT, ROLES
from lmeff.data.tokenizer import SPECIALS, BpeTokenizer, ByteTokenizer, Tokenizer


def write_portable(tokenizer: BpeTokenizer | ByteTokenizer, folder: Path) -> None:
    """Writes tokenizer.json, with prompts that begin with bos, and tokenizer_config.json."""
    lib = require("tokenizers", extra="text")
    inner = lib.Tokenizer.from_str(tokenizer.inner.to_str()) if isinstance(tokenizer, BpeTokenizer) else _bytes(lib)
    bos = SPECIALS[0]
    inner.post_processor = lib.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos)])
    inner.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIALS, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The keys of a config.json that say them; of a tokenizer that others made those that its files name."""
    if isinstance(tokenizer, Pretrained):
        found = tokenizer.specials._asdict()
        return {f"{role}_token_id": found[role] for role in ROLES if found[role] is not None}
    return {f"{role}_token_id": getattr(tokenizer, role) for role in ROLES}


def carried(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder that its owner knows: all but lmeff's own."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name != KEPT)


def _bytes(lib: Any) -> Any:
    """Bytes as a byte-level BPE without merges: its 256 characters stand for the bytes, in the order of GPT-2's table."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(characters.values()) == set(lib.pre_tokenizers.ByteLevel.alphabet())
    inner = lib.Tokenizer(lib.models.BPE({characters[byte]: byte for byte in range(256)}, []))
    inner.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = lib.decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIALS))
    return inner
