"""The report on disk: what is written is read, and damage is noticed."""

import contextlib
import json
import math
import re

import numpy as np
import pytest

from lmeff.core.errors import CheckpointError, DataError
from lmeff.report.schema import ArtifactRow, Comparison, Report, config_rows
from tests.report.report_sample import make_report

ROW = {
    "name": "a", "kind": "dense", "loss": 2.0, "loss_interval": (1.9, 2.1), "bits_per_byte": 1.0, "parameters": 10, "nonzero_parameters": 9,
    "stored_bytes": 40, "effective_bits": 32.0, "flops_per_token": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return make_report()


def tiny(**changes):
    return Report(name="r", created="2026-01-01", artifacts=(ArtifactRow(**(ROW | changes)),))


def test_round_trip(report, tmp_path):
    path = tmp_path / "new" / "report.json"
    report.write(path)
    assert Report.read(path) == report
    first = path.read_bytes()
    Report.read(path).write(path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_artifacts_have_the_promised_keys(report, tmp_path):
    report.write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    promised = {
        "name", "kind", "loss", "loss_interval", "bits_per_byte", "parameters", "stored_bytes", "effective_bits", "flops_per_token", "ms_per_token"
    }  # fmt: skip
    assert len(content["artifacts"]) == 8
    for row in content["artifacts"]:
        assert promised <= row.keys()
        assert row["loss_interval"][0] < row["loss"] < row["loss_interval"][1]


def test_numbers_that_are_not_finite_are_strict_json(tmp_path):
    path = tmp_path / "report.json"
    tiny(loss=math.inf, loss_interval=(math.nan, math.nan)).write(path)
    json.loads(path.read_text(), parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    row = Report.read(path).base
    assert math.isnan(row.loss)
    assert all(map(math.isnan, row.loss_interval))
    assert row.ms_per_token is None


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    path = tmp_path / "report.json"
    tiny(loss=np.float32(2.5), parameters=np.int64(7)).write(path)
    assert (Report.read(path).base.loss, Report.read(path).base.parameters) == (2.5, 7)


def test_what_is_not_json_is_a_bug_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    tiny().write(path)
    with pytest.raises(TypeError, match="JSON values"):
        tiny(note=object()).write(path)
    assert Report.read(path) == tiny()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    tiny().write(path)
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tiny(loss=9.0).write(path)
    assert Report.read(path) == tiny()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"report\.json: there is no report here"):
        Report.read(tmp_path / "report.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Report.read(tmp_path)


def test_every_kind_of_damage_is_told(tmp_path):
    path = tmp_path / "report.json"
    tiny().write(path)
    good = path.read_text()
    assert '"loss": 2.0' in good
    damage = {
        "cut off": good[: len(good) // 2],
        "empty": "",
        "a list": "[]",
        "a flipped digit": good.replace('"loss": 2.0', '"loss": 3.0'),
        "another format": good.replace("lmeff-report/1", "lmeff-report/9"),
        "no digest": re.sub(r' "digest".*\n', "", good),
        "binary": "\x00\x01",
    }
    for kind, text in damage.items():
        assert text != good, kind
        path.write_text(text)
        with pytest.raises(CheckpointError, match="damaged") as caught:
            Report.read(path)
        assert str(path) in str(caught.value), kind
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="damaged"):
        Report.read(path)


def test_any_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "report.json"
    tiny().write(path)
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ (1 << position % 7)]) + good[position + 1 :])
        with contextlib.suppress(CheckpointError):
            assert Report.read(path) == tiny(), position  # a flip in white space changes nothing


SHAPES = {
    "required field missing .*artifacts.0..loss": lambda c: c["artifacts"][0].pop("loss"),
    "extra fields found .colour": lambda c: c["artifacts"][0].update(colour="red"),
    "expected int": lambda c: c["artifacts"][0].update(parameters="many"),
    "expected float": lambda c: c["artifacts"][0].update(loss="low"),
    "loss_interval": lambda c: c["artifacts"][0].update(loss_interval=[1.0]),
    "expected a mapping": lambda c: c.update(config=[]),
    "at least one": lambda c: c.update(artifacts=[]),
}


@pytest.mark.parametrize("told", SHAPES)
def test_wrong_shapes_are_told_even_with_a_good_digest(told, tmp_path):
    from lmeff.report.schema import _digest

    path = tmp_path / "report.json"
    tiny().write(path)
    content = json.loads(path.read_text())
    del content["digest"]
    SHAPES[told](content)
    body = {key: value for key, value in content.items() if key != "format"}
    path.write_text(json.dumps(content | {"digest": _digest(body)}))
    with pytest.raises(CheckpointError, match=told):
        Report.read(path)


def test_reports_that_contradict_themselves_are_refused():
    row = ArtifactRow(**ROW)
    with pytest.raises(DataError, match="no artifact"):
        Report(name="r", created="", artifacts=())
    with pytest.raises(DataError, match="must differ"):
        Report(name="r", created="", artifacts=(row, row))
    lost = Comparison(a="a", b="gone", difference=0.0, interval=(0.0, 0.0))
    with pytest.raises(DataError, match="gone"):
        Report(name="r", created="", artifacts=(row,), comparisons=(lost,))
    with pytest.raises(DataError, match="other"):
        Report(name="r", created="", artifacts=(row,), baseline="other")


def test_config_rows_keep_values_and_origins():
    config = {"a": {"b": {"value": [1, 2], "origin": "flag"}, "c": 3}, "d": {}, "e": None, "f": "text"}
    assert config_rows(config) == [
        ("a.b", "[1, 2]", "flag"),
        ("a.c", "3", ""),
        ("d", "{}", ""),
        ("e", "null", ""),
        ("f", "text", ""),
    ]
