"""Bad configs are refused before anything is read, with where, got, expected and remedy; the vocabulary is known before too."""

import dataclasses

import pytest
import tyro

from lmeff.core.errors import ConfigError
from lmeff.data.config import DataConfig, Part, vocab_size

BAD = {
    "data.tokenizer": {"tokenizer": "words"},
    "data.bpe_vocab": {"bpe_vocab": 258},
    "data.sequence": {"sequence": 1},
    "data.max_bytes": {"max_bytes": 0},
    "data.validation": {"validation": 0.0},
    "data.validation, data.test": {"validation": 0.5, "test": 0.5},
    "data.source": {"source": "csv", "path": ("a",)},
    "source 'jsonl' has no path": {"source": "jsonl"},
    "expected a tuple": {"path": "notes.txt"},
    "several kinds": {"path": ("a.txt", "b.jsonl")},
    "one or the other": {"path": ("a.txt",), "mixture": (Part(name="x"),)},
    "each name once": {"mixture": (Part(name="x"), Part(name="x", path=("a.txt",)))},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_values_are_refused(said):
    with pytest.raises(ConfigError, match="expected") as caught:
        DataConfig(**BAD[said])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "a/b"},
        {"name": "a", "weight": 0.0},
        {"name": "a", "weight": float("nan")},
        {"name": "a", "source": "text"},
    ],
)
def test_bad_parts_are_refused(bad):
    with pytest.raises(ConfigError, match="expected"):
        Part(**bad)


def test_vocabulary_is_known_before_any_text():
    assert vocab_size(DataConfig(source="text", path=("absent.txt",))) == 264
    assert vocab_size(DataConfig(tokenizer="bpe", bpe_vocab=777)) == 777


def test_the_command_line_can_set_it():
    mixed = DataConfig(mixture=(Part(name="code", weight=0.7), Part(name="notes", path=("notes/",), weight=0.3)))
    got = tyro.cli(DataConfig, default=mixed, args=["--mixture.1.weight", "0.5", "--max-bytes", "1000"])
    parts = (mixed.mixture[0], dataclasses.replace(mixed.mixture[1], weight=0.5))
    assert got == dataclasses.replace(mixed, mixture=parts, max_bytes=1000)
    assert tyro.cli(DataConfig, args=["--path", "a.txt", "b.md"]).path == ("a.txt", "b.md")
