"""Safetensors in and out: the library is the oracle, and every damage is one error that names the file and what to do."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError
from lmeff.interop import container, tensor_writer
from lmeff.interop.tensors import Tensors, TensorWriter, open_tensors, write_tensors

safetensors = pytest.importorskip("safetensors")

RNG = np.random.default_rng(0)
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def values(dtype, shape=(3, 5)):
    """Random bits, which are numbers of any dtype but truth values."""
    if dtype == np.bool_:
        return RNG.random(shape) < 0.5
    return RNG.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


def raw(header, data: bytes = bytes(24), *, length: int | None = None) -> bytes:
    """A file by hand; `header` is JSON or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def put(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def refused(path: Path, *words: str) -> str:
    """Opens, expects the error, and that it is one paragraph of where, got, expected and remedy."""
    with pytest.raises(CheckpointError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert ": got " in message
    assert ", expected " in message
    assert message.endswith(".")
    for word in (path.name, *words):
        assert word in message, (word, message)
    return message


@pytest.fixture
def bytes_read(monkeypatch):
    """(offset, count) of every read of data."""
    reads = []

    def preadv(descriptor, buffers, offset):
        count = os_preadv(descriptor, buffers, offset)
        reads.append((offset, count))
        return count

    os_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    return reads


class TestRoundTrip:
    @pytest.mark.parametrize("code", container.DTYPES)
    def test_every_dtype_comes_back_bit_for_bit_and_as_the_library_reads_it(self, tmp_path, code):
        dtype = container.DTYPES[code]
        tensors = {"a": values(dtype), "none": values(dtype, (0, 4)), "one": values(dtype, ())}
        write_tensors(tmp_path / "m", tensors, tensors.__getitem__)
        found = open_tensors(tmp_path / "m")
        assert all(same_bits(found.read(name), value) for name, value in tensors.items())
        library = dict(safetensors.deserialize((tmp_path / "m/model.safetensors").read_bytes()))
        assert {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in library.items()} == {
            name: (code, list(value.shape), value.tobytes()) for name, value in tensors.items()
        }

    def test_a_file_of_the_library_is_read(self, tmp_path):
        from safetensors.numpy import save_file

        tensors = {f"t{i}": values(dtype) for i, dtype in enumerate((np.float32, np.int8, np.float16, np.int64))}
        save_file(tensors, tmp_path / "x.safetensors", metadata={"by": "library"})
        found = open_tensors(tmp_path / "x.safetensors")
        assert found.metadata == {"by": "library"}
        assert set(found) == set(tensors)
        assert all(same_bits(found.read(name), value) for name, value in tensors.items())

    @pytest.mark.parametrize(
        "index",
        [
            (slice(1, 3),),
            (slice(None), slice(2, 5)),
            (slice(1, 2), slice(None), slice(3, 4)),
            (slice(0, 4), slice(1, 1)),
            (slice(2, 4), slice(0, 6), slice(0, 5)),
        ],
        ids=["rows", "middle", "row and column", "nothing", "rows, the rest whole"],
    )
    def test_a_part_reads_its_own_bytes_alone_and_each_once(self, tmp_path, bytes_read, index):
        whole = values(np.float32, (4, 6, 5))
        write_tensors(tmp_path / "m", {"other": whole, "a": whole}, lambda name: whole)
        part = open_tensors(tmp_path / "m").read("a", index)
        assert same_bits(part, whole[index])
        covered = [offset + i for offset, count in bytes_read for i in range(count)]
        assert len(covered) == len(set(covered)) == part.nbytes

    def test_what_lies_together_is_one_read(self, tmp_path, bytes_read):
        write_tensors(tmp_path / "m", {"a": (whole := values(np.float32, (8, 6, 5)))}, lambda name: whole)
        open_tensors(tmp_path / "m").read("a", (slice(2, 7),))
        assert len(bytes_read) == 1

    def test_shards_are_filled_in_order_up_to_their_size_in_any_order_of_writing(self, tmp_path):
        tensors = {f"t{i}": values(dtype, (4, 5)) for i, dtype in enumerate([np.float32, np.int8, np.float64] * 3)}
        tensors["large"] = values(np.float32, (100,))
        with TensorWriter(tmp_path / "m", tensors, shard_bytes=300) as writer:
            for name in reversed(tensors):
                writer.write(name, tensors[name])
        index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        names = [index["weight_map"][name] for name in tensors]
        assert names == sorted(names)
        assert names[0] == "model-00001-of-00004.safetensors"
        assert names.count(names[-1]) == 1
        for file in set(names):
            with safetensors.safe_open(tmp_path / "m" / file, "numpy") as opened:
                assert opened.metadata() == {"format": "pt"}
                sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118 -- not a dict
            assert sum(sizes) <= 300 or len(sizes) == 1
        assert all(same_bits(open_tensors(tmp_path / "m").read(name), t) for name, t in tensors.items())

    def test_every_tensor_is_aligned_to_its_dtype(self, tmp_path):
        tensors = {"a": values(np.int8, (3,)), "b": values(np.float64, (3,)), "c": values(np.float16, (3,))}
        write_tensors(tmp_path / "m", tensors, tensors.__getitem__)
        assert all(info.start % info.dtype.itemsize == 0 for info in open_tensors(tmp_path / "m").values())

    @pytest.mark.parametrize("copied", [1 << 20, 40, 1], ids=["at once", "some rows", "a row"])
    def test_arrays_of_jax_and_turned_ones_are_written_in_order(self, tmp_path, monkeypatch, copied):
        monkeypatch.setattr(tensor_writer, "COPY_BYTES", copied)
        turned = values(np.int32, (3, 5)).T
        specs = {"a": jax.ShapeDtypeStruct((5, 3), np.int32), "b": jax.ShapeDtypeStruct((5, 3), np.int32)}
        with TensorWriter(tmp_path / "m", specs) as writer:
            writer.write("a", turned)
            writer.write("b", jax.numpy.asarray(turned))
        found = open_tensors(tmp_path / "m")
        assert same_bits(found.read("a"), np.ascontiguousarray(turned))
        assert same_bits(found.read("b"), np.ascontiguousarray(turned))

    def test_opening_reads_no_data(self, tmp_path, bytes_read):
        write_tensors(tmp_path / "m", {"a": (a := values(np.float32))}, lambda name: a)
        found = open_tensors(tmp_path / "m")
        assert isinstance(found, Tensors)
        assert len(found) == 1
        assert found["a"].shape == (3, 5)
        assert not bytes_read


class TestDamagedFile:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", ["0 bytes", "8 bytes"]),
            (b"\x10\0\0", ["3 bytes"]),
            (raw({}, length=100_000_001), ["header of 100,000,001 bytes"]),
            (raw({}, length=2**63), ["header of 9,223,372,036,854,775,808 bytes"]),
            (raw({"a": ENTRY}, length=5000), ["header of 5,000 bytes"]),
            (raw(b"not JSON at all"), ["no JSON"]),
            (raw(b"\xff\xfe{}"), ["no JSON"]),
            (raw(b"[" * 100_000), ["no JSON"]),
            (raw([1, 2]), ["JSON list"]),
            (raw(b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2)), ["'a' twice"]),
            (raw(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}'), ["'dtype' twice"]),
            (raw({"a": {**ENTRY, "data_offsets": [0, 4000]}}), ["4,000 bytes for 'a'"]),
            (raw({"a": {**ENTRY, "data_offsets": [24, 0]}}), ["data_offsets"]),
            (raw({"a": {**ENTRY, "data_offsets": [-24, 0]}}), ["data_offsets"]),
            (raw({"a": {**ENTRY, "data_offsets": [0, 24, 48]}}), ["data_offsets"]),
            (raw({"a": {**ENTRY, "data_offsets": [0.0, 24.0]}}), ["data_offsets"]),
            (raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 36]}}, bytes(36)), ["'b' at byte 12", "overlaps"]),
            (raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [28, 52]}}, bytes(52)), ["'b' at byte 28", "hole"]),
            (raw({"a": {**ENTRY, "data_offsets": [8, 32]}}, bytes(32)), ["'a' at byte 8", "hole"]),
            (raw({"a": {**ENTRY, "dtype": "F7"}}), ["dtype 'F7'", "BF16"]),
            (raw({"a": {**ENTRY, "dtype": ["F32"]}}), ["dtype"]),
            (raw({"a": {**ENTRY, "dtype": "F4"}}), ["dtype 'F4'"]),
            (raw({"a": {**ENTRY, "shape": [2, 4]}}), ["24 bytes for 'a'", "32 for F32"]),
            (raw({"a": {**ENTRY, "shape": [-2, -3]}}), ["shape"]),
            (raw({"a": {**ENTRY, "shape": [True, 6]}}), ["shape"]),
            (raw({"a": {**ENTRY, "shape": 6}}), ["shape"]),
            (raw({"a": {**ENTRY, "shape": [2**40, 2**40]}}), ["24 bytes for 'a'"]),
            (raw({"a": {"dtype": "F32", "shape": [6]}}), ["dtype, shape and data_offsets"]),
            (raw({"a": {**ENTRY, "more": 1}}), ["dtype, shape and data_offsets"]),
            (raw({"a": 3}), ["'a' = 3"]),
            (raw({"__metadata__": {"x": 1}, "a": ENTRY}), ["__metadata__"]),
            (raw({"a": ENTRY}, bytes(25)), ["bytes behind the last tensor"]),
            (raw({"a": ENTRY}, bytes(23)), ["ends before its tensors"]),
            (raw({"\x1b[2Jevil\n" + "x" * 500: 3}), ["\\x1b"]),
            (b"PK\x03\x04" + bytes(100), ["pickles", "save_pretrained"]),
            (b"\x80\x02}q\x00." + bytes(100), ["a pickle", "save_pretrained"]),
            (b"<!DOCTYPE html><html>", ["web page", "again"]),
            (b"<HTML><body>401</body>", ["web page"]),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ["Git LFS", "git lfs pull"]),
            (b"GGUF" + bytes(100), ["GGUF"]),
        ],
        ids=[
            *("empty", "no length", "header over the cap", "length of 2**63", "header longer than the file"),
            *("no JSON", "no UTF-8", "deep JSON", "a list", "name twice", "key twice"),
            *("offsets out of range", "offsets reversed", "offsets negative", "three offsets", "offsets of floats"),
            *("overlap", "hole", "hole at the begin"),
            *("unknown dtype", "dtype of a list", "dtype of 4 bits"),
            *("shape of more bytes", "shape negative", "shape of a bool", "shape a number", "shape that overflows"),
            *("key absent", "key too many", "no object", "metadata of numbers", "bytes behind", "cut off"),
            "escapes in a name",
            *("zip pickle", "pickle", "web page", "web page in capitals", "LFS pointer", "GGUF"),
        ],
    )
    def test_is_refused_in_one_paragraph(self, tmp_path, content, words):
        message = refused(put(tmp_path, "model.safetensors", content), *words)
        assert message.isprintable()

    def test_the_library_takes_what_is_taken_here(self):
        """The hand-made file of these tests is right but for the damage."""
        assert dict(safetensors.deserialize(raw({"a": ENTRY})))["a"]["shape"] == [2, 3]

    def test_a_file_that_shrinks_after_it_was_opened(self, tmp_path):
        file = put(tmp_path, "model.safetensors", raw({"a": ENTRY}))
        found = open_tensors(file)
        os.truncate(file, file.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="its end at byte"):
            found.read("a")

    def test_a_file_that_is_gone_after_it_was_opened(self, tmp_path):
        file = put(tmp_path, "model.safetensors", raw({"a": ENTRY}))
        found = open_tensors(file)
        file.unlink()
        with pytest.raises(CheckpointError, match="No such file"):
            found.read("a")

    def test_bytes_that_are_no_truth_values(self, tmp_path):
        header = {"a": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
        found = open_tensors(put(tmp_path, "model.safetensors", raw(header, b"\0\1\2\1")))
        with pytest.raises(CheckpointError, match="other than 0 and 1"):
            found.read("a")

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "model.safetensors")
        refused(tmp_path / "model.safetensors", "no regular file")

    @pytest.mark.parametrize("length", [640, 896, 1152, 1408])
    def test_a_header_whose_length_begins_as_a_pickle_does(self, tmp_path, length):
        text = json.dumps({"x": ENTRY}).encode().ljust(length)
        assert raw(text)[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
        assert open_tensors(put(tmp_path, "model.safetensors", raw(text)))["x"].shape == (2, 3)

    def test_what_is_not_there_and_what_is_a_pickle(self, tmp_path):
        refused(tmp_path / "absent", "nothing there")
        put(tmp_path, "pytorch_model.bin", b"\x80\x02")
        refused(tmp_path / "pytorch_model.bin", "save_pretrained", "never opened")


def sharded(folder: Path, **changes: object) -> Path:
    """Two shards and their index; changes of the weight map, None removes a name."""
    put(folder, "one.safetensors", raw({"a": ENTRY}))
    put(folder, "two.safetensors", raw({"b": ENTRY, "c": {**ENTRY, "data_offsets": [24, 48]}}, bytes(48)))
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"} | changes
    kept = {name: shard for name, shard in weight_map.items() if shard is not None}
    put(folder, "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": kept}).encode())
    return folder


class TestDamagedFolder:
    def test_a_sound_one_opens(self, tmp_path):
        assert set(open_tensors(sharded(tmp_path))) == {"a", "b", "c"}

    @pytest.mark.parametrize(
        "name",
        [
            "../one.safetensors",
            "sub/one.safetensors",
            "/etc/one.safetensors",
            "..",
            "",
            ".hidden.safetensors",
            "a\\b.safetensors",
            3,
        ],
        ids=["parent", "subfolder", "absolute", "dots", "empty", "hidden", "backslash", "number"],
    )
    def test_a_shard_name_that_is_no_plain_name(self, tmp_path, name):
        put(tmp_path, "one.safetensors", raw({"a": ENTRY}))
        refused(sharded(tmp_path / "m", a=name), "model.safetensors.index.json", "plain name")

    def test_a_shard_that_is_a_pickle_by_name(self, tmp_path):
        put(tmp_path, "pytorch_model-00001.bin", b"\x80\x02")
        refused(sharded(tmp_path, a="pytorch_model-00001.bin"), "end in .safetensors", "save_pretrained")

    def test_a_shard_that_is_missing(self, tmp_path):
        folder = sharded(tmp_path)
        (folder / "two.safetensors").unlink()
        refused(folder, "1 of 2 shards", "'two.safetensors' is missing")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"b": "one.safetensors"}, ["two.safetensors", "'b', which", "'one.safetensors'"]),
            ({"d": "one.safetensors"}, ["'d' in 'one.safetensors', which does not hold it"]),
            ({"c": None}, ["two.safetensors", "'c', which", "does not list"]),
        ],
        ids=["listed in the wrong shard", "listed and in no shard", "in a shard and not listed"],
    )
    def test_index_and_shards_that_differ(self, tmp_path, changes, words):
        refused(sharded(tmp_path, **changes), *words)

    @pytest.mark.parametrize(
        "text",
        [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": "x", "a": "y"}}'],
        ids=["cut off", "a list", "no map", "map a list", "map empty", "name twice"],
    )
    def test_an_index_that_is_none(self, tmp_path, text):
        put(sharded(tmp_path), "model.safetensors.index.json", text)
        refused(tmp_path, "model.safetensors.index.json")

    def test_an_index_over_the_cap(self, tmp_path):
        os.truncate(sharded(tmp_path) / "model.safetensors.index.json", container.HEADER_CAP + 1)
        refused(tmp_path, "model.safetensors.index.json", "100,000,001 bytes")

    def test_a_shard_that_is_a_folder(self, tmp_path):
        (sharded(tmp_path) / "two.safetensors").unlink()
        (tmp_path / "two.safetensors").mkdir()
        refused(tmp_path, "two.safetensors", "no regular file")

    def test_a_damaged_shard_is_named(self, tmp_path):
        put(sharded(tmp_path), "two.safetensors", b"<html>")
        refused(tmp_path, "two.safetensors", "web page")

    @pytest.mark.parametrize("name", ["one.safetensors", "model.safetensors.index.json", "model.safetensors"])
    def test_a_link_out_of_the_folder(self, tmp_path, name):
        outside = sharded(tmp_path / "outside")
        (outside / "model.safetensors").write_bytes(raw({"a": ENTRY}))
        folder = sharded(tmp_path / "m") if name != "model.safetensors" else tmp_path / "m"
        folder.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / name)
        refused(folder, "a link to", "in its folder")

    def test_the_cache_of_the_hub_is_links_to_its_blobs(self, tmp_path):
        blob = put(tmp_path / "models--x/blobs", "0123", raw({"a": ENTRY}))
        snapshot = tmp_path / "models--x/snapshots/rev"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
        assert set(open_tensors(snapshot)) == {"a"}

    def test_a_link_within_the_folder(self, tmp_path):
        put(tmp_path, "real.safetensors", raw({"a": ENTRY}))
        (tmp_path / "model.safetensors").symlink_to("real.safetensors")
        assert set(open_tensors(tmp_path)) == {"a"}

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ([], ["no file model.safetensors"]),
            (["pytorch_model.bin"], ["only 'pytorch_model.bin'", "save_pretrained", "never opened"]),
            (["adapter.safetensors"], ["'adapter.safetensors' by its own path"]),
        ],
        ids=["empty", "a pickle alone", "another file"],
    )
    def test_a_folder_without_a_model(self, tmp_path, files, words):
        for name in files:
            put(tmp_path, name, b"\x80\x02")
        refused(tmp_path, *words)

    def test_two_models_in_one_folder(self, tmp_path):
        put(sharded(tmp_path), "model.safetensors", raw({"a": ENTRY}))
        refused(tmp_path, "both model.safetensors and an index")


class TestAtomic:
    """Nothing partial is left, whatever ends the writing."""

    SPECS = {name: jax.ShapeDtypeStruct((4, 4), np.float32) for name in "abc"}  # noqa: RUF012
    VALUE = np.ones((4, 4), np.float32)

    @pytest.mark.parametrize(
        "value",
        [np.ones((4, 5), np.float32), np.ones((4, 4), np.float64), RuntimeError("of the caller")],
        ids=["shape", "dtype", "error of the caller"],
    )
    def test_an_error_leaves_nothing(self, tmp_path, value):
        def read(name):
            if name == "b" and isinstance(value, RuntimeError):
                raise value
            return value if name == "b" else self.VALUE

        with pytest.raises((AssertionError, RuntimeError)):
            write_tensors(tmp_path / "m", self.SPECS, read, shard_bytes=64)
        assert [*tmp_path.iterdir()] == []

    def test_a_tensor_left_out_is_an_error(self, tmp_path):
        def leave_out():
            with TensorWriter(tmp_path / "m", self.SPECS) as writer:
                writer.write("a", self.VALUE)
                writer.write("b", self.VALUE)

        with pytest.raises(AssertionError, match="not written: \\['c'\\]"):
            leave_out()
        assert [*tmp_path.iterdir()] == []

    def test_a_full_disk_is_told(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"m: could not be written \(No space left on device\)"):
            write_tensors(tmp_path / "m", self.SPECS, lambda name: self.VALUE)
        assert [*tmp_path.iterdir()] == []

    def test_too_little_room_is_told_before_anything_is_written(self, tmp_path):
        specs = {"a": jax.ShapeDtypeStruct((1 << 50,), np.float32)}
        with pytest.raises(CheckpointError, match="bytes free on its disk, expected 4,503,599,627,370,496"):
            write_tensors(tmp_path / "m", specs, lambda name: pytest.fail("asked for data"))
        assert [*tmp_path.iterdir()] == []

    def test_a_dtype_that_the_format_has_not(self, tmp_path):
        with pytest.raises(CheckpointError, match="got int4, expected one of"):
            TensorWriter(tmp_path / "m", {"a": jax.ShapeDtypeStruct((4,), jax.numpy.int4)})

    def test_what_is_there_is_kept(self, tmp_path):
        put(tmp_path / "m", "precious", b"1")
        with pytest.raises(CheckpointError, match="something there already"):
            write_tensors(tmp_path / "m", self.SPECS, lambda name: self.VALUE)
        assert [file.name for file in tmp_path.rglob("*")] == ["m", "precious"]

    def test_an_empty_folder_is_taken_and_other_files_come_along(self, tmp_path):
        (tmp_path / "m").mkdir()
        with TensorWriter(tmp_path / "m", self.SPECS) as writer:
            (writer.folder / "config.json").write_text("{}")
            assert not (tmp_path / "m/config.json").exists()
            for name in self.SPECS:
                writer.write(name, self.VALUE)
        assert sorted(file.name for file in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
        assert [file.name for file in tmp_path.iterdir()] == ["m"]

    def test_one_tensor_is_asked_for_at_a_time_and_written_before_the_next(self, tmp_path):
        alive = []

        class Counted(np.ndarray):
            def __del__(self):
                alive.pop()

        def read(name):
            assert not alive
            alive.append(name)
            return np.ones((4, 4), np.float32).view(Counted)

        write_tensors(tmp_path / "m", self.SPECS, read)
        assert len(open_tensors(tmp_path / "m")) == 3

    def test_a_kill_leaves_no_folder_of_that_name_and_the_next_writer_sweeps(self, tmp_path):
        code = """
            import sys, time, numpy as np
            from lmeff.interop.tensors import TensorWriter
            spec = np.ones((4, 4), np.float32)
            with TensorWriter(sys.argv[1], {"a": spec, "b": spec}) as writer:
                writer.write("a", spec)
                print("half", flush=True)
                time.sleep(600)
        """
        target = tmp_path / "m"
        root = str(Path(tensor_writer.__file__).parents[2])
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(target)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": root},
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        # One that lives is let be.
        write_tensors(tmp_path / "m", self.SPECS, lambda name: self.VALUE)
        (target / "model.safetensors").unlink()
        target.rmdir()
        assert len([*tmp_path.glob(".m.*.partial")]) == 1
        writer.kill()
        writer.wait()
        writer.stdout.close()
        assert not target.exists()
        write_tensors(target, self.SPECS, lambda name: self.VALUE)
        assert [file.name for file in tmp_path.iterdir()] == ["m"]
