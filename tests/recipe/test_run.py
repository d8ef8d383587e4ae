"""A whole recipe on eight devices: stages, report, resuming, measuring again."""

import json
import math
import shutil

import pytest

from tests.runs import lmeff, lmeff_json, write_config, write_text

NAMES = ["teacher", "student", "shrunk", "composed", "packed"]
REQUIRED = {
    "name",
    "kind",
    "loss",
    "loss_interval",
    "bits_per_byte",
    "parameters",
    "stored_bytes",
    "effective_bits",
    "flops_per_token",
    "ms_per_token",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = write_config(folder, write_text(folder))
    report = lmeff_json("run", config)
    return folder, config, report


def test_report_has_every_artifact_and_field(finished):
    folder, _, report = finished
    on_disk = json.loads((folder / "runs/small/report.json").read_text())
    assert [row["name"] for row in on_disk["artifacts"]] == NAMES
    for row in on_disk["artifacts"]:
        assert row.keys() >= REQUIRED
        low, high = row["loss_interval"]
        assert 0 < low <= row["loss"] <= high < math.log(264) + 1
        assert row["bits_per_byte"] > 0
        assert row["ms_per_token"] > 0
    assert on_disk["artifacts"] == report["artifacts"]
    assert (folder / "runs/small/report.html").stat().st_size > 10_000


def test_rows_say_what_was_made(finished):
    rows = {row["name"]: row for row in finished[2]["artifacts"]}
    assert {name: rows[name]["kind"] for name in NAMES} == {
        "teacher": "dense",
        "student": "distilled",
        "shrunk": "shrunk",
        "composed": "pruned + QAT int8 + quantized activations + distilled",
        "packed": "pruned + packed int8 + quantized activations",
    }
    assert rows["composed"]["parents"] == ["teacher", "teacher"]
    assert rows["shrunk"]["parameters"] < rows["teacher"]["parameters"]
    assert rows["shrunk"]["flops_per_token"] < rows["teacher"]["flops_per_token"]
    assert rows["packed"]["stored_bytes"] < rows["composed"]["stored_bytes"] < rows["teacher"]["stored_bytes"]
    assert rows["composed"]["nonzero_parameters"] < rows["teacher"]["nonzero_parameters"]
    assert rows["teacher"]["effective_bits"] == 32
    assert len(rows["teacher"]["curve"]) == 4
    assert rows["teacher"]["train_tokens"] == 4 * 8 * 32


def test_packed_integers_measure_like_the_fake_quantized_model(finished):
    rows = {row["name"]: row for row in finished[2]["artifacts"]}
    assert abs(rows["packed"]["loss"] - rows["composed"]["loss"]) < 1e-4


def test_claims_are_checked(finished):
    verdicts = finished[2]["verdicts"]
    assert [verdict["passed"] for verdict in verdicts] == [True, True, True]
    assert [verdict["bound"] for verdict in verdicts] == [0.5, 0.5, 1.0]
    assert 0.25 < verdicts[1]["measured"] < 0.5


def test_running_again_reads_back_and_measures_the_same(finished):
    folder, config, report = finished
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs/small/stages").rglob("*") if path.is_file()}
    again = lmeff_json("run", config)
    assert [row["loss"] for row in again["artifacts"]] == [row["loss"] for row in report["artifacts"]]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_stage_lost_is_made_again_alike(finished):
    folder, config, report = finished
    shutil.rmtree(folder / "runs/small/stages/composed")
    again = {row["name"]: row["loss"] for row in lmeff_json("run", config)["artifacts"]}
    assert again == {row["name"]: row["loss"] for row in report["artifacts"]}


def test_eval_measures_artifacts_on_the_run_s_text_and_on_other_text(finished):
    folder, _, report = finished
    rows = {row["name"]: row for row in report["artifacts"]}
    own = lmeff_json("eval", folder / "runs/small", "--artifact", "packed", "teacher")["artifacts"]
    assert [row["name"] for row in own] == ["teacher", "packed"]
    assert [row["loss"] for row in own] == [rows[row["name"]]["loss"] for row in own]
    other = lmeff_json("eval", folder / "runs/small", "--artifact", "teacher", "--text", folder / "text/000.txt")
    assert other["artifacts"][0]["tokens"] == len((folder / "text/000.txt").read_bytes()) + 1


def test_report_is_written_again_from_its_json(finished):
    folder = finished[0]
    page = folder / "runs/small/report.html"
    before = page.read_bytes()
    page.unlink()
    assert lmeff_json("report", folder / "runs/small")["artifacts"][0]["name"] == "teacher"
    assert page.read_bytes() == before


def test_train_makes_one_stage_and_what_it_reads(tmp_path):
    recipe = """
        Stage(name="teacher"),
        Stage(name="int8", start="teacher", compress=(Quantize(),), steps=0, export=True),
        Stage(name="unused"),
        Stage(name="student", model=STUDENT, distill=Distill(teacher="int8")),
    """
    config = write_config(tmp_path, write_text(tmp_path), recipe=recipe, claims="")
    report = lmeff_json("train", config, "--stage", "student", "--train.steps", 1, "--train.eval-every", 1)
    assert [row["name"] for row in report["artifacts"]] == ["teacher", "int8", "student"]
    stages = tmp_path / "runs/small/stages"
    assert sorted(path.name for path in stages.iterdir()) == ["int8", "student", "teacher"]
    (line,) = (stages / "student/metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["eval_loss"] < math.log(264) + 1
    assert json.loads(line)["kl"] >= 0


def test_no_resume_refuses_a_run_that_is_there(finished):
    _, config, _ = finished
    code, _, err = lmeff("run", config, "--no-resume")
    assert code == 5
    assert "holds a run already" in err


def test_another_config_in_the_same_place_is_refused_and_nothing_is_lost(finished):
    folder, config, _ = finished
    before = (folder / "runs/small/config.json").read_bytes()
    code, _, err = lmeff("run", config, "--optim.learning-rate", "0.5")
    assert code == 3
    assert "optim.learning_rate" in err
    assert (folder / "runs/small/config.json").read_bytes() == before


def test_settings_that_change_no_result_may_change(finished):
    _, config, report = finished
    again = lmeff_json("run", config, "--mesh.fsdp", 2, "--train.log-every", 2)
    for now, then in zip(again["artifacts"], report["artifacts"], strict=True):
        assert abs(now["loss"] - then["loss"]) < 1e-4
