"""`lmeff data`: the tokens of a run, made before it."""

from tests.runs import lmeff, lmeff_json, write_config, write_text


def test_a_run_finds_the_tokens_that_were_made_before(tmp_path):
    config = write_config(tmp_path, write_text(tmp_path), recipe='Stage(name="model", steps=1),', claims="")
    made = lmeff_json("data", config, "--mesh.fsdp", "16", "--train.batch", "16")
    folder = tmp_path / "runs/small/data"
    assert made["directory"] == str(folder)
    assert made["tokens"]["train"] > made["tokens"]["test"] > 0
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert lmeff_json("data", config, "--train.batch", "16") == made
    assert not (tmp_path / "runs/small/config.json").exists()  # no run has begun
    lmeff_json("run", config, "--train.batch", "16")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == files


def test_what_is_wrong_is_told_before_anything_is_made(tmp_path):
    config = write_config(tmp_path, write_text(tmp_path), recipe='Stage(name="model"),', claims="")
    code, _, err = lmeff("data", config, "--data.path", tmp_path / "absent")
    assert (code, err.count("\n")) == (4, 1)
    code, _, err = lmeff("data", config, "--mesh.fsdp", "3")
    assert (code, err.count("\n")) == (3, 1)
    assert not (tmp_path / "runs").exists()
