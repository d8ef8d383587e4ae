"""From someone else's model to a smaller one and out again, as one config: load, distil with quantization, pack, export."""

import json
import shutil

import jax
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError
from lmeff.core.numerics import materialize
from lmeff.core.tree import flatten
from lmeff.recipe.open import open_model
from tests.recipe.pretrained_model import CFG, RECIPE, write_huggingface
from tests.runs import lmeff, lmeff_json, write_config, write_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_huggingface(folder / "hf")
    config = write_config(folder, write_text(folder), recipe=RECIPE.format(load=str(folder / "hf")), claims="")
    report = lmeff_json("run", config, "--data.tokenizer", folder / "hf")
    return folder, config, report


def again(finished, *options):
    """The same command for the first stage alone, which is done."""
    folder, config, _ = finished
    return lmeff("train", config, "--stage", "teacher", "--data.tokenizer", folder / "hf", *options)


def test_the_report_says_where_it_came_from(finished):
    folder, _, report = finished
    rows = {row["name"]: row for row in report["artifacts"]}
    assert rows["teacher"]["note"] == f"loaded from {folder / 'hf'} (llama, a Hugging Face folder)"
    assert rows["qat"]["kind"] == "QAT int8 + distilled"
    assert rows["packed"]["kind"] == "packed int8"
    assert rows["packed"]["stored_bytes"] < rows["teacher"]["stored_bytes"]
    assert abs(rows["packed"]["loss"] - rows["qat"]["loss"]) < 1e-4
    assert rows["teacher"]["train_tokens"] == 0
    assert abs(rows["teacher"]["loss"] - np.log(CFG.vocab)) < 0.5


def test_the_weights_are_the_file_s(finished):
    folder = finished[0]
    loaded = open_model(folder / "runs/small", artifact="teacher")
    there = flatten(open_model(folder / "hf").served.params)
    for path, x in flatten(loaded.served.params).items():
        np.testing.assert_array_equal(x, there[path], err_msg=path)
    assert loaded.tokenizer.stops == (1, 2)
    assert loaded.tokenizer.vocab == 300
    assert loaded.family == "llama"


def test_the_last_artifact_is_opened_and_exported(finished, tmp_path):
    folder = finished[0]
    opened = open_model(folder / "runs/small")
    assert "'packed'" in opened.source
    answer = lmeff_json("export", folder / "runs/small", tmp_path / "out")
    assert (answer["family"], answer["activation_formats_left_out"]) == ("llama", [])
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} == set(answer["tokenizer_files"])
    back = open_model(tmp_path / "out")
    values = flatten(jax.jit(materialize)(opened.served.params))
    for path, x in flatten(back.served.params).items():
        np.testing.assert_array_equal(x, values[path], err_msg=path)
    assert back.tokenizer.encode("small").tolist() == opened.tokenizer.encode("small").tolist()
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 1


def test_a_run_of_lmeff_s_own_is_exported_with_its_tokenizer(tmp_path):
    recipe = 'Stage(name="one", steps=0),'
    config = write_config(tmp_path, write_text(tmp_path), recipe=recipe, claims="")
    lmeff_json("run", config)
    lmeff_json("export", tmp_path / "runs/small", tmp_path / "out")
    back, own = open_model(tmp_path / "out"), open_model(tmp_path / "runs/small")
    text = "naïve\x00 <|bos|>\n 日本"
    assert back.tokenizer.encode(text).tolist() == own.tokenizer.encode(text).tolist()
    assert back.tokenizer.decode(back.tokenizer.encode(text)) == text
    assert back.tokenizer.prefix == own.tokenizer.prefix == (256,)
    assert back.tokenizer.stops == own.tokenizer.stops == (257,)
    assert back.family is not None


def test_it_goes_on_without_the_original_and_only_with_the_same(finished):
    folder, _, report = finished
    losses = [row["loss"] for row in report["artifacts"]]
    shutil.move(folder / "hf", folder / "moved")
    code, out, err = again(finished, "--json")
    assert code == 0, err
    assert [row["loss"] for row in json.loads(out)["artifacts"]] == losses[:1]
    rows = lmeff_json("eval", folder / "runs/small", "--artifact", "teacher")["artifacts"]
    assert rows[0]["loss"] == losses[0]
    shutil.move(write_huggingface(folder / "other", seed=1), folder / "hf")
    code, _, err = again(finished)
    assert code == 3
    assert "stage 'teacher'.load" in err
    assert "another model" in err
    shutil.rmtree(folder / "hf")
    shutil.move(folder / "moved", folder / "hf")
    assert again(finished)[0] == 0


def test_the_same_model_may_lie_elsewhere_and_another_may_not(finished):
    folder = finished[0]
    shutil.copytree(folder / "hf", folder / "copied")
    code, _, err = again(finished, "--recipe.teacher.load", folder / "copied")
    assert code == 0, err
    lmeff_json("import", folder / "hf", folder / "imported")
    code, _, err = again(finished, "--recipe.teacher.load", folder / "imported")
    assert code == 3
    assert "stage 'teacher'.load" in err
    code, _, err = again(finished, "--recipe.teacher.load", "None", "--model.vocab", CFG.vocab)
    assert code == 3
    assert "recipe.teacher.load: True then, False now" in err


def test_an_imported_folder_plans_and_runs_alike(finished, tmp_path):
    folder, config, report = finished
    lmeff_json("import", folder / "hf", tmp_path / "imported")
    options = ("--data.tokenizer", folder / "hf", "--recipe.teacher.load", tmp_path / "imported")
    found = lmeff_json("plan", config, "--chip", "v5e", *options, "--train.batch", 1)
    assert found["stage"] == "qat" or "qat" in json.dumps(found)
    made = lmeff_json("run", config, "--name", "other", *options)
    assert [row["loss"] for row in made["artifacts"]] == [row["loss"] for row in report["artifacts"]]


def test_a_loaded_model_is_cut_smaller(finished):
    folder, config, _ = finished
    recipe = f'Stage(name="cut", load={str(folder / "hf")!r}, shrink=ShrinkConfig(ffn=24, layers=1, calibration_batches=1), steps=1),'
    config = write_config(folder, folder / "text", recipe=recipe, claims="", name="cut.py")
    made = lmeff_json("run", config, "--data.tokenizer", folder / "hf", "--name", "cut")
    (row,) = made["artifacts"]
    assert row["kind"] == "shrunk"
    assert row["note"].startswith(f"loaded from {folder / 'hf'}")
    assert "ffn" in row["note"]
    opened = open_model(folder / "runs/cut")
    assert (opened.served.cfg.ffn, opened.served.cfg.layers) == (24, 1)


def test_an_artifact_that_is_not_done(finished, tmp_path):
    folder = finished[0]
    shutil.copytree(folder / "runs/small", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/stages/packed")
    assert "'qat'" in open_model(tmp_path / "run").source
    with pytest.raises(CheckpointError, match=r"artifact 'packed' is not done.*'teacher', 'qat'"):
        open_model(tmp_path / "run", artifact="packed")
