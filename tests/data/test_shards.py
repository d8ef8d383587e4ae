"""A folder of tokens is built whole or not at all, belongs to one config, and is refused when any byte of it changed."""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest

from lmeff.core.errors import DataError
from lmeff.data import loader, shards
from lmeff.data.config import DataConfig, Part
from lmeff.data.loader import build
from lmeff.data.prepare import Count, byte_length, read, split_of
from lmeff.data.sources import Document, documents


def config_of(notes, **changes):
    return DataConfig(**{"path": (str(notes),), "sequence": 32, **changes})


def snapshot(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_same_config_reads_back(small, monkeypatch):
    corpus, folder, config = small
    before = snapshot(folder)
    monkeypatch.setattr(loader, "write", lambda *_: pytest.fail("built again"))
    again = build(config, folder, 7, batch=4)
    assert snapshot(folder) == before
    assert again.describe() == corpus.describe()
    assert again.digest == corpus.digest


def test_two_builds_are_equal_byte_for_byte(notes, tmp_path):
    config = config_of(notes, tokenizer="bpe", bpe_vocab=300)
    found = []
    for name in ("a", "b"):
        build(config, tmp_path / name, 0, batch=2)
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
    assert "tokenizer.json" in found[0]


def test_another_length_of_rows_needs_no_new_tokens(small):
    _, folder, config = small
    assert build(dataclasses.replace(config, sequence=100), folder, 0, batch=2).train.batch(0).tokens.shape == (2, 100)


@pytest.mark.parametrize(
    "change",
    [{"max_bytes": 300_000}, {"test": 0.2}, {"tokenizer": "bpe"}, {"mixture": (Part(name="a"), Part(name="b"))}],
)
def test_another_config_is_refused_and_nothing_changes(small, change):
    _, folder, config = small
    before = snapshot(folder)
    with pytest.raises(DataError, match=r"another config: .*expected.*Choose another folder"):
        build(dataclasses.replace(config, **change), folder, 7, batch=4)
    assert snapshot(folder) == before


def damage_flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def damage_cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def damage_delete(file):
    file.unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_delete])
def test_every_damaged_file_is_named(damage, notes, tmp_path):
    config = config_of(notes, tokenizer="bpe", bpe_vocab=300)
    build(config, tmp_path / "whole", 0, batch=2)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) == 8
    for name in names:
        folder = tmp_path / f"{damage.__name__}-{name}"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / name)
        with pytest.raises(DataError, match="delete") as caught:
            build(config, folder, 0, batch=2)
        assert name in str(caught.value)
        if damage is damage_flip and name != "manifest.json":
            expected = json.loads((tmp_path / "whole" / "manifest.json").read_text())["files"][name]["sha256"]
            assert expected in str(caught.value)
            assert shards.digest(folder / name)["sha256"] in str(caught.value)


def test_a_manifest_with_a_changed_number_is_damaged(notes, tmp_path):
    build(config_of(notes), tmp_path / "data", 0, batch=2)
    file = tmp_path / "data" / "manifest.json"
    file.write_text(file.read_text().replace('"documents": ', '"documents": 1'))
    with pytest.raises(DataError, match=r"manifest.json: is damaged: sha256 \w{64}, expected \w{64}"):
        build(config_of(notes), tmp_path / "data", 0, batch=2)


def test_a_folder_of_other_things_is_left_alone(notes, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("dear")
    with pytest.raises(DataError, match="holds no readable manifest"):
        build(config_of(notes), tmp_path / "data", 0, batch=2)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match="holds no readable manifest"):
        build(config_of(notes), tmp_path / "data" / "thesis.tex", 0, batch=2)


BAD_INPUTS = {
    "absent": lambda folder: DataConfig(path=(str(folder / "absent.txt"),)),
    "late bad line": lambda folder: DataConfig(path=(str(folder / "late.jsonl"),), sequence=8),
    "late bad bytes": lambda folder: DataConfig(path=(str(folder / "late.txt"),), sequence=8),
    "lone surrogate": lambda folder: DataConfig(path=(str(folder / "surrogate.jsonl"),), sequence=8),
    "too little": lambda folder: DataConfig(path=(str(folder / "little.txt"),), sequence=8),
    "blank": lambda folder: DataConfig(path=(str(folder / "blank.txt"),), sequence=8),
    "too few rows": lambda folder: DataConfig(path=(str(folder / "some.txt"),), sequence=4096),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_leaves_no_trace(bad, tmp_path):
    lines = "".join(f'{{"text": "some line {i}"}}\n' for i in range(500))
    (tmp_path / "late.jsonl").write_text(lines + "{oh no\n")
    (tmp_path / "surrogate.jsonl").write_text(lines + '{"text": "half \\ud83d"}\n')
    (tmp_path / "late.txt").write_bytes(b"some text\n\n" * 5000 + b"\xff")
    (tmp_path / "little.txt").write_text("One paragraph.")
    (tmp_path / "some.txt").write_text("".join(f"Paragraph {i}.\n\n" for i in range(2000)))
    (tmp_path / "blank.txt").write_text(" \n\n" * 5000)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="expected"):
        build(BAD_INPUTS[bad](tmp_path), tmp_path / "run" / "deeper" / "data", 0, batch=64)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_crash_while_writing_leaves_no_trace(notes, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmeff.data.prepare.Writer.append", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left"):
        build(config_of(notes), tmp_path / "run" / "data", 0, batch=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_processes_may_build_at_once(notes, tmp_path, monkeypatch):
    config, folder = config_of(notes), tmp_path / "data"
    write = loader.write

    def slow(*arguments):
        write(*arguments)
        if not folder.exists():  # the other host gets there first
            monkeypatch.setattr(loader, "write", write)
            build(config, folder, 0, batch=2)

    monkeypatch.setattr(loader, "write", slow)
    corpus = build(config, folder, 0, batch=2)
    assert corpus.train.batch(0).tokens.shape == (2, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "notes.txt"]


def test_what_a_killed_build_left_is_cleared_a_day_later(notes, tmp_path):
    for name, age in (("old", 2 * shards.STALE), ("new", 60)):
        left = tmp_path / f".data.building-{name}"
        left.mkdir()
        os.utime(left, (time.time() - age,) * 2)
    build(config_of(notes), tmp_path / "data", 0, batch=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.building-new", "data", "notes.txt"]


def test_splits_are_disjoint_stable_and_of_the_asked_shares():
    config = DataConfig()
    part = config.parts[0]
    splits = {document.key: split_of(document, part, config) for document in documents("embedded", (), "text")}
    shares = {split: sum(s == split for s in splits.values()) / len(splits) for split in shards.SPLITS}
    assert shares["train"] == pytest.approx(0.8, abs=0.05)
    assert shares["test"] == pytest.approx(0.1, abs=0.04)
    known = {"argparse.py": splits["argparse.py"], "json/decoder.py": splits["json/decoder.py"]}
    assert known == {"argparse.py": "train", "json/decoder.py": "train"}


def test_equal_documents_share_a_split_wherever_they_are(tmp_path):
    config = DataConfig(path=("x",))
    part = config.parts[0]
    for text in map(str, range(100)):
        assert split_of(Document("here", text), part, config) == split_of(Document("there", text), part, config)


def test_shards_hold_bos_text_eos_and_the_sizes(small):
    corpus, _, config = small
    tokenizer = corpus.tokenizer
    expected = {split: [] for split in shards.SPLITS}
    part = config.parts[0]
    for document in read(part, config.max_bytes, Count()):
        expected[split_of(document, part, config)].append(document)
    for split in shards.SPLITS:
        shard = getattr(corpus, split).shards[0]
        got = [np.asarray(shard.tokens[a:b]) for a, b in zip(shard.starts, shard.starts[1:])]
        assert [tokenizer.decode(ids) for ids in got] == [document.text for document in expected[split]]
        assert all(ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos for ids in got)
        assert shard.sizes.tolist() == [byte_length(document) for document in expected[split]]
        assert shard.tokens.dtype == np.uint16


def test_large_vocabularies_take_four_bytes():
    assert shards.dtype(65_536) == "<u2"
    assert shards.dtype(65_537) == "<u4"


def test_the_cap_is_kept_and_leaves_out_the_largest(small):
    corpus = small.corpus
    found = corpus.manifest["parts"]["text"]
    assert 0.9 * 400_000 < found["bytes"] <= 400_000
    assert found["capped"]
    assert found["left_out"] > 0
    sizes = np.concatenate([split.document_bytes for split in (corpus.train, corpus.validation, corpus.test)])
    assert sizes.max() <= 400_000 // 32
    assert sizes.sum() == found["bytes"]
