"""The vocabulary of a GGUF file: read by the package `gguf` from the files of a tokenizer, and made as long as the model's."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.extras import require
from lmeff.models.config import ModelConfig

PAD = "[PAD{}]"  # what fills a vocabulary that the model has made larger than its tokenizer's


def add_tokenizer(
    gguf: ModuleType, writer: Any, cfg: ModelConfig, folder: Path | None, pretokenizer: str | None
) -> None:
    """Tokens, scores or merges, kinds and special ids from a folder; "no_vocab" without one. Raises before anything is written."""
    if folder is None:
        writer.add_tokenizer_model("no_vocab")
        return
    vocab = _vocab(gguf, folder)
    byte_level = vocab.tokenizer_model == "gpt2"
    if byte_level and pretokenizer is None:
        raise ConfigError(
            f"GGUF: {folder} has a byte-level tokenizer, and architectures of this name cut text in several ways before they merge it; name the one it "
            "was made with by `pretokenizer`, such as 'llama-bpe' (Llama 3), 'gpt-2' or 'qwen2'."
        )
    tokens, scores, kinds = zip(*_entries(gguf, vocab, folder), strict=True)
    if len(tokens) > cfg.vocab:
        raise ConfigError(f"GGUF: {folder} has {len(tokens)} tokens, expected at most model.vocab = {cfg.vocab}")
    missing = range(len(tokens), cfg.vocab)
    writer.add_tokenizer_model(vocab.tokenizer_model)
    if byte_level:
        writer.add_tokenizer_pre(pretokenizer)
    else:
        writer.add_token_scores([*scores, *(-1000.0 for _ in missing)])
    writer.add_token_list([*tokens, *(PAD.format(i).encode() for i in missing)])
    writer.add_token_types([*kinds, *(gguf.TokenType.UNUSED for _ in missing)])
    gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=cfg.vocab).add_to_gguf(writer, quiet=True)


def _vocab(gguf: ModuleType, folder: Path) -> Any:
    """The package's reader of what the folder has."""
    try:
        if (folder / "tokenizer.model").is_file():
            require("sentencepiece", extra="text")
            return gguf.SentencePieceVocab(folder)
        return gguf.BpeVocab(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: got no tokenizer that GGUF knows ({error}), expected tokenizer.model (SentencePiece) or tokenizer.json (byte-level BPE); "
            "give another folder, or none for a file without a vocabulary"
        ) from error


def _entries(gguf: ModuleType, vocab: Any, folder: Path) -> Iterator[tuple[bytes, float, int]]:
    """(text, score, kind) of every token; the package takes all added ones of a byte-level tokenizer for control tokens, their file tells which are."""
    special = _special(folder)
    for text, score, kind in vocab.all_tokens():
        raw = text.encode() if isinstance(text, str) else bytes(text)
        if vocab.tokenizer_model == "gpt2" and raw in special:
            kind = gguf.TokenType.CONTROL if special[raw] else gguf.TokenType.USER_DEFINED
        yield raw, score, kind


def _special(folder: Path) -> dict[bytes, bool]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or ()
    return {entry["content"].encode(): bool(entry.get("special")) for entry in added}
