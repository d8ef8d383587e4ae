"""A model that is not here is planned from the shape that its stage says; what trains wants the folder, and the folder must have that shape."""

import dataclasses
import re

import pytest

from lmeff.config import DataConfig, Distill, Experiment, ShrinkConfig, Stage, TrainConfig
from lmeff.config.files import check_resume, write
from lmeff.config.validate import validate
from lmeff.core.errors import ConfigError
from lmeff.plan.job import jobs
from tests.recipe.pretrained_model import CFG, write_huggingface
from tests.runs import lmeff, lmeff_json, write_config, write_text

FOLDER = "models/none"
TAUGHT = """
            Stage(name="teacher", load={load!r}, model=ModelConfig(vocab=304, width=32, layers=2, heads=4, kv_heads=2, ffn=48, context={context}), steps=0),
            Stage(name="student", start="teacher", shrink=ShrinkConfig(layers=1), distill=Distill(teacher="teacher"), steps=2),
"""


def experiment(load=FOLDER, model=CFG, tokenizer="bytes", **changes):
    return Experiment(
        name="run",
        data=DataConfig(sequence=32, tokenizer=tokenizer),
        train=TrainConfig(batch=8, steps=2),
        recipe=(
            Stage(name="teacher", load=load, model=model, steps=0),
            Stage(
                name="student",
                start="teacher",
                shrink=ShrinkConfig(layers=1),
                distill=Distill(teacher="teacher"),
            ),
        ),
        **changes,
    )


def test_the_plan_has_the_shape_that_is_said():
    (job,) = jobs(experiment(), 1, "cpu")
    assert (job.teacher.cfg, job.cfg) == (CFG, dataclasses.replace(CFG, layers=1))


def test_its_tokenizer_is_as_far_away():
    (job,) = jobs(experiment(tokenizer=FOLDER), 1, "cpu")
    assert job.cfg.vocab == CFG.vocab
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*models/other"):
        jobs(experiment(tokenizer="models/other"), 1, "cpu")


def test_without_a_shape_there_is_no_plan():
    with pytest.raises(ConfigError, match=r"stage 'teacher'\.load: models/none: holds no model"):
        jobs(experiment(model=None), 1, "cpu")


def test_what_trains_wants_the_folder():
    with pytest.raises(ConfigError, match=r"stage 'teacher'\.load: models/none: holds no model"):
        validate(experiment(), 1)


def test_the_folder_has_the_shape_that_is_said_or_is_refused(tmp_path):
    folder = str(write_huggingface(tmp_path / "hf"))
    assert validate(experiment(folder), 1) == validate(experiment(folder, None), 1)
    other = experiment(folder, dataclasses.replace(CFG, ffn=64, context=None))
    differ = re.escape("got ffn 48 (the stage says 64), context 64 (the stage says None)")
    for check in (lambda: validate(other, 1), lambda: jobs(other, 1, "cpu")):
        with pytest.raises(ConfigError, match=differ) as told:
            check()
    assert str(told.value).startswith("stage 'teacher'.model: got ")
    assert "\n" not in str(told.value)


def test_a_run_goes_on_whether_or_not_the_shape_is_said(tmp_path):
    write(experiment(model=None), tmp_path)
    check_resume(experiment(), tmp_path)
    with pytest.raises(ConfigError, match=r"recipe\.teacher\.load: True then, False now"):
        check_resume(experiment(load=None), tmp_path)


def test_the_command_line_says_what_it_took(tmp_path):
    recipe = TAUGHT.format(load=FOLDER, context=64)
    config = write_config(tmp_path, write_text(tmp_path), recipe=recipe, claims="")
    answer = lmeff_json("plan", config, "--chip", "v5e", "--devices", 1)
    assert answer["assumed"] == {"teacher": FOLDER}
    _, shown, _ = lmeff("plan", config, "--chip", "v5e", "--devices", 1)
    assert f"stage 'teacher': {FOLDER} is not here; planned from the shape that its model says" in shown
    for command in (("run", config), ("train", config, "--stage", "student")):
        code, _, err = lmeff(*command)
        assert code == 3
        assert "stage 'teacher'.load: models/none: holds no model" in err
    assert not (tmp_path / "runs").exists()
    folder = write_huggingface(tmp_path / "hf")
    found = lmeff_json("plan", config, "--chip", "v5e", "--devices", 1, "--recipe.teacher.load", folder)
    assert "assumed" not in found
    assert found["bytes_per_device"] == answer["bytes_per_device"]
