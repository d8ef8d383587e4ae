"""Compressed reductions and local updates from the config to the artifact; what they refuse."""

import dataclasses

import pytest

from lmeff.config import Experiment, LocalUpdates, MeshPlan, OptimConfig, Reduce, Stage, TrainConfig
from lmeff.config.files import read, write
from lmeff.config.validate import validate
from lmeff.core.errors import ConfigError
from lmeff.models.config import ModelConfig
from tests.runs import lmeff, lmeff_json, write_config, write_text

MODEL = ModelConfig(vocab=264, width=32, layers=2, heads=4, kv_heads=2, ffn=64)
LOCAL, INT8, POWER = LocalUpdates(every=2), Reduce(), Reduce(method="powersgd")
RECIPE = """
            Stage(name="teacher", steps=2),
            Stage(
                name="all",
                start="teacher",
                compress=(Prune(sparsity=0.5, end=2), Quantize(method="lsq")),
                distill=Distill(teacher="teacher"),
                steps=5,
            ),
            Stage(name="packed", start="all", steps=0, export=True),
"""


def experiment(train=None, mesh=None, optim=None, **fields):
    return Experiment(
        name="x", model=MODEL, train=TrainConfig(batch=16, **(train or {})), mesh=mesh or MeshPlan(), optim=optim or OptimConfig(), **fields
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (experiment({"local": LOCAL}, MeshPlan(fsdp=8)), r"train\.local\.axis: got 'data'.*one worker.*Set mesh\.data"),
        (experiment({"local": LOCAL}, MeshPlan(dcn=2)), r"train\.local\.axis: got 'data' with mesh\.dcn = 2, expected 'dcn'"),
        (experiment({"local": LOCAL}, optim=OptimConfig(ema=0.9)), r"optim\.ema: got 0\.9 with train\.local, expected None"),
        (
            experiment({"local": LOCAL}, recipe=(Stage(name="a", optim=OptimConfig(ema=0.5)),)),
            r"stage 'a'\.optim\.ema: got 0\.5",
        ),
        (
            experiment({"reduce": POWER}, precision="params=float32,compute=float16"),
            r"train\.reduce: got method powersgd.*no float16",
        ),
    ],
    ids=["one-worker", "slowest-axis", "ema", "ema-of-a-stage", "loss-scale"],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        validate(made, 8)
    train = dataclasses.replace(made.train, local=None, reduce=INT8)
    assert validate(dataclasses.replace(made, train=train), 8)


def test_configs_keep_them(tmp_path):
    made = experiment({"local": LocalUpdates(every=7, axis="data", fragments=3), "reduce": POWER})
    write(made, tmp_path)
    assert read(tmp_path) == made


@pytest.mark.slow
def test_a_run_with_everything_composed(tmp_path):
    """Masks, learned scales and a teacher, on data 2 x fsdp 2 x tensor 2, with workers apart and codes within."""
    file = write_config(tmp_path, write_text(tmp_path), recipe=RECIPE, claims="")
    text = file.read_text().replace("import (", "import (LocalUpdates, Reduce, MeshPlan,", 1)
    file.write_text(
        text.replace("TrainConfig(", "TrainConfig(local=LocalUpdates(every=2), reduce=Reduce(), eval_every=2, ", 1)
    )
    options = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    report = lmeff_json("run", file, *options)
    assert {"teacher", "all", "packed"} <= {row["name"] for row in report["artifacts"]}
    code, _, error = lmeff("run", file, *options)
    assert code == 0, error
