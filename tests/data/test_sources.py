"""Every source gives the documents that are there, in a stable order, and names the place of what it cannot read."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lmeff.core.errors import DataError, MissingExtra
from lmeff.data.sources import CUT_LONGEST, SOURCES, documents, share

TEXTS = [f"document {i}: naïve {'x' * i} 日本\n" for i in range(30)]


def texts(source, path, field="text"):
    return [document.text for document in documents(source, tuple(map(str, path)), field)]


def write_jsonl(file, field="text"):
    file.write_text("".join(json.dumps({field: text, "other": 1}) + "\n" for text in TEXTS), encoding="utf-8")


def write_parquet(file, field="text"):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'parquet'")
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({field: TEXTS, "other": list(range(len(TEXTS)))}), file, row_group_size=7
    )


def write_array_record(file, field="text"):
    module = pytest.importorskip(
        "array_record.python.array_record_module", reason="array_record is not built for this platform"
    )
    writer = module.ArrayRecordWriter(str(file), "group_size:4")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "array_record": write_array_record}


# The embedded text.


def test_embedded_is_the_library_without_tests_and_tables():
    found = list(SOURCES["embedded"]((), "text"))
    keys = [document.key for document in found]
    assert len(set(keys)) == len(keys) > 400
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(keys)
    folders = {folder for key in keys for folder in key.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    assert 5e6 < sum(len(document.text) for document in found) < 20e6
    decoder = next(document for document in found if document.key == "json/decoder.py")
    assert decoder.text == Path(sysconfig.get_paths()["stdlib"], "json", "decoder.py").read_text(encoding="utf-8")
    assert keys == sorted(keys, key=share)


def test_help_topics_repeat_no_paragraph():
    topics = [document for document in SOURCES["embedded"]((), "text") if document.key.startswith("pydoc_data/topics/")]
    assert len(topics) > 50
    paragraphs = [(p, topic.key) for topic in topics for p in topic.text.split("\n\n")]
    owners = {}
    assert all(owners.setdefault(p, key) == key for p, key in paragraphs)


def test_embedded_missing_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(DataError, match=r"python311.zip holds 0 .*expected hundreds.*Set data.path"):
        next(SOURCES["embedded"]((), "text"))


def test_shares_are_the_same_in_every_process():
    code = "from lmeff.data.sources import share; print(share('argparse.py'))"
    env = {"PYTHONHASHSEED": "5", "PYTHONPATH": ":".join(sys.path)}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert float(there) == share("argparse.py") == pytest.approx(0.7861274, abs=1e-6)


# Text.


def test_few_files_are_cut_and_join_to_the_whole(notes):
    whole = notes.read_text(encoding="utf-8")
    pieces = texts("text", [notes])
    assert "".join(pieces) == whole
    assert 150 < len(pieces) < 400
    assert all(piece.endswith("\n\n") for piece in pieces)


@pytest.mark.parametrize(
    "whole",
    [
        "x" * 50_000,
        "word " * 9000,
        "line\n" * 9000,
        "a\r\n\r\nb c\r\n" * 3000,
        "é" * 3000 + "\n\n" + "日本 " * 9000,
        "one",
    ],
)
def test_any_text_is_cut_without_loss(whole, tmp_path):
    (tmp_path / "a.txt").write_bytes(whole.encode())
    pieces = texts("text", [tmp_path / "a.txt"])
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= CUT_LONGEST


def test_blocks_may_end_within_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr("lmeff.data.sources.BLOCK", 7)
    whole = "日本語 naïve 👩‍👩‍👧\n\n" * 40
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + whole.encode())
    assert "".join(texts("text", [tmp_path / "a.txt"])) == whole
    (tmp_path / "b.txt").write_bytes("日本".encode() * 5 + b"\xff and more")
    with pytest.raises(DataError, match=r"b.txt: byte 30 is no UTF-8"):
        texts("text", [tmp_path / "b.txt"])


def test_many_files_are_a_document_each(tmp_path):
    for i in range(120):
        (tmp_path / f"{i}.md").write_text(f"file {i}\n\n" * 1000)
    (tmp_path / ".hidden.md").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\xff\xd8")
    assert sorted(texts("text", [tmp_path])) == sorted(f"file {i}\n\n" * 1000 for i in range(120))


# Records.


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("remote", [False, True])
def test_records(kind, remote, tmp_path, request):
    folder = tmp_path / "in"
    folder.mkdir()
    WRITERS[kind](folder / f"b.{kind}")
    root, path = folder, folder / f"b.{kind}"
    if remote:
        fs = pytest.importorskip("fsspec", reason="needs the extra 'remote'").filesystem("memory")
        root = f"memory://{request.node.name}/in"
        path = f"{root}/b.{kind}"
        fs.pipe(path, (folder / f"b.{kind}").read_bytes())
        fs.pipe(f"{root}/.hidden.{kind}", b"damaged")
        fs.pipe(f"{root}/README", b"about")
    assert texts(kind, [path]) == TEXTS
    assert texts(kind, [root]) == TEXTS
    assert texts("embedded", [path]) == TEXTS  # by its ending
    assert texts("embedded", [root]) == TEXTS
    with pytest.raises(DataError, match="does not exist"):
        texts(kind, [f"{root}/absent.{kind}"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_another_field(kind, tmp_path):
    WRITERS[kind](tmp_path / f"a.{kind}", field="content")
    assert texts(kind, [tmp_path / f"a.{kind}"], "content") == TEXTS
    with pytest.raises(DataError, match=rf"a.{kind}.*'content'.*expected 'text' among them; set data.text_field"):
        texts(kind, [tmp_path / f"a.{kind}"])


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_damaged_files_are_named(kind, tmp_path):
    pytest.importorskip({"parquet": "pyarrow", "array_record": "array_record"}[kind])
    (tmp_path / f"a.{kind}").write_bytes(b"no such thing " * 100)
    with pytest.raises(DataError, match=rf"a.{kind}: is (no readable|damaged)"):
        texts(kind, [tmp_path / f"a.{kind}"])


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_flipped_bits_and_lost_ends_are_found(kind, tmp_path):
    WRITERS[kind](tmp_path / f"a.{kind}")
    whole = (tmp_path / f"a.{kind}").read_bytes()
    at = whole.index(b"document") if kind == "parquet" else 110
    for damaged in (whole[:-200], whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :]):
        (tmp_path / f"a.{kind}").write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a.{kind}: is "):
            texts(kind, [tmp_path / f"a.{kind}"])


def test_records_that_are_no_text_are_named(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (b"one", b"two", b"\xff\xfe"):
        writer.write(record)
    writer.close()
    with pytest.raises(DataError, match=r"a.array_record, record 2: is no UTF-8"):
        texts("array_record", [tmp_path / "a.array_record"])


def test_tfds_names_of_array_records(tmp_path):
    write_array_record(tmp_path / "c4-train.array_record-00000-of-00002")
    assert texts("embedded", [tmp_path]) == TEXTS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{not json}\n", "line 3: got b'{not json}.*is no JSON"),
        (b'"text"\n', "line 3: got a JSON str, expected an object"),
        (b'{"body": 1}\n', r"line 3: has the fields \['body'\], expected 'text'"),
        (b'{"text": null}\n', "line 3: field 'text' holds NoneType"),
        (b'{"text": "\xff"}\n', "line 3: got .*is no JSON"),
    ],
)
def test_bad_json_lines_are_named(line, said, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + line)
    with pytest.raises(DataError, match=rf"a.jsonl, {said}"):
        texts("jsonl", [tmp_path / "a.jsonl"])


def test_hf(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    made = datasets.Dataset.from_dict({"text": TEXTS})
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl")
    for name in ("one", "splits", "files"):
        assert texts("hf", [tmp_path / name]) == TEXTS
    with pytest.raises(DataError, match=r"row 0: has the fields .*expected 'content'"):
        texts("hf", [tmp_path / "one"], "content")
    with pytest.raises(DataError, match=r"hf dataset .*cannot be read.*check the name"):
        texts("hf", [tmp_path / "absent"])


# What cannot be read.


def test_missing_empty_and_mixed_places_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent.txt' does not exist.*relative path starts at"):
        texts("embedded", ["absent.txt"])
    with pytest.raises(DataError, match=r"holds 0 files .*no kind known.*expected one of"):
        texts("embedded", [tmp_path])
    with pytest.raises(DataError, match=r"holds 0 files, none that ends like"):
        texts("jsonl", [tmp_path])
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"kinds \['jsonl', 'text'\]; expected one"):
        texts("embedded", [tmp_path])
    assert texts("text", [tmp_path]) == ["a"]


def test_a_url_of_no_known_kind_is_refused():
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match=r"nosuch://bucket/x.txt' cannot be listed"):
        texts("text", ["nosuch://bucket/x.txt"])


@pytest.mark.parametrize(
    ("kind", "path", "module", "extra"),
    [
        ("text", "memory://a.txt", "fsspec", "remote"),
        ("parquet", "a.parquet", "pyarrow", "parquet"),
        ("hf", "x", "datasets", "hf"),
    ],
)
def test_missing_packages_are_named(kind, path, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"'{module}'.*pip install 'lmeff\[{extra}\]'"):
        texts(kind, [path])
