"""The resolved config of a run is read back as it was, with every variant of a model, and as older versions wrote it."""

import dataclasses
import json

import pytest

from lmeff.config.files import FILE, read, write
from lmeff.config.schema import Experiment, Stage
from lmeff.config.validate import validate
from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.data.config import DataConfig
from lmeff.models.config import ModelConfig
from tests.models.families import FAMILIES

SIZES = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_families(name, tmp_path):
    cfg = ModelConfig(**(SIZES | FAMILIES[name]))
    experiment = Experiment(name="run", model=cfg, recipe=(Stage(name="model"), Stage(name="other", model=cfg)))
    write(experiment, tmp_path)
    assert read(tmp_path) == experiment


@pytest.mark.parametrize(("once", "bias", "qk_norm"), [(False, "none", None), (True, "all", "head")])
def test_what_was_on_or_off(once, bias, qk_norm, tmp_path):
    write(Experiment(name="run"), tmp_path)
    stored = json.loads((tmp_path / FILE).read_text())
    stored["model"] |= {"bias": once, "qk_norm": once}
    (tmp_path / FILE).write_text(json.dumps(stored))
    assert read(tmp_path).model == ModelConfig(bias=bias, qk_norm=qk_norm)


def test_unknown_fields_are_refused(tmp_path):
    write(Experiment(name="run"), tmp_path)
    stored = json.loads((tmp_path / FILE).read_text())
    stored["model"]["colour"] = "blue"
    (tmp_path / FILE).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="colour"):
        read(tmp_path)


def test_rows_longer_than_the_positions_are_refused():
    cfg = dataclasses.replace(ModelConfig(), positions="learned", context=64)
    experiment = Experiment(name="run", model=cfg, data=DataConfig(sequence=128))
    with pytest.raises(
        ConfigError, match=r"data\.sequence: got 128 tokens a row, expected at most model\.context = 64"
    ):
        validate(experiment, 1)
