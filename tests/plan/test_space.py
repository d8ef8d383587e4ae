"""What is tried is what can train."""

import dataclasses
import itertools

import numpy as np
import pytest

from lmeff.config import Experiment, Stage
from lmeff.config.validate import validate
from lmeff.core.errors import ConfigError
from lmeff.data.config import DataConfig
from lmeff.models.config import preset
from lmeff.parallel.mesh import AXES, MeshPlan
from lmeff.plan.hardware import chip
from lmeff.plan.job import Shape
from lmeff.plan.legal import illegal
from lmeff.plan.search import costs
from lmeff.plan.space import Pipelined, Space, kind, meshes, microbatches, plans
from lmeff.train.loop import TrainConfig
from lmeff.train.optim import OptimConfig
from tests.plan.searched import FEW, PRECISION, SHORT, job


def trains(of):
    """Whether the checks of training let a job pass: another way to ask than `plans` takes."""
    experiment = Experiment(
        name="x",
        precision=of.precision,
        model=of.cfg,
        mesh=of.mesh,
        data=DataConfig(tokenizer="bytes", sequence=of.tokens),
        train=TrainConfig(batch=of.rows, accumulate=of.accumulate, remat=of.remat),
        evaluate=dataclasses.replace(Experiment(name="y").evaluate, batch=of.rows),
        recipe=(Stage(name="pretrain"),),
    )
    try:
        validate(experiment, of.devices)
    except ConfigError:
        return False
    return True


def test_meshes_are_all_that_can_train_and_no_others():
    of, space = job(rows=8), Space(sequence=("gather",), pipelines=(Pipelined(),), remat=("full",), rounds=64)
    tried = {tuple(plans(of, 8, space).at(row).degrees.values()) for row in range(len(plans(of, 8, space)))}
    expected = set()
    for degrees in itertools.product((1, 2, 4, 8), repeat=len(AXES)):
        named = dict(zip(AXES, degrees, strict=True))
        if np.prod(degrees) != 8 or named["dcn"] > 1 or named["expert"] > 1:
            continue
        mesh = MeshPlan(**named, sequence="gather")
        if any(trains(of.changed(mesh=mesh, accumulate=count)) for count in (1, 2, 4, 8)):
            expected.add(degrees)
    assert tried == expected
    assert len(tried) > 20


def test_every_plan_can_train_and_is_looked_at_once():
    found = plans(job(), 8, Space())
    made = [found.at(row) for row in range(len(found))]
    assert len(set(made)) == len(made)
    assert all(illegal(of) is None and trains(of) for of in made[:: len(made) // 50])
    assert found.looked == len(found) + sum(reason.count for reason in found.refused.values())


def test_the_reasons_of_what_cannot_train():
    found = plans(job(rows=4), 8, Space())
    assert {"model: the mesh cannot cut H", "stage 'pretrain': the model has", "train.batch"} <= set(found.refused)
    assert found.refused["train.batch"].count > 0
    assert found.refused["train.batch"].example.startswith(
        "train.batch: got 4 rows, expected a multiple of mesh.fsdp = 8"
    )
    assert found.refused["stage 'pretrain': the model has"].example.startswith(
        "stage 'pretrain': the model has 4 layers"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mesh": MeshPlan(data=3)}, "mesh: got data 3 on 8 devices"),
        ({"mesh": MeshPlan(fsdp=8), "rows": 12}, "train.batch: got 12 rows"),
        ({"mesh": MeshPlan(context=8), "tokens": 1000}, "data.sequence: got rows of 1000 tokens"),
        ({"mesh": MeshPlan(tensor=8), "tokens": 1004}, "data.sequence: got rows of 1004 tokens"),
        ({"mesh": MeshPlan(tensor=8)}, "model: the mesh cannot cut H = 12"),
        ({"mesh": MeshPlan(pipe=8), "accumulate": 8}, "stage 'pretrain': the model has 4 layers"),
        ({"mesh": MeshPlan(pipe=4, schedule="interleaved"), "accumulate": 2}, "mesh.schedule: schedule interleaved: got microbatches = 2"),
        ({"precision": "state=bfloat16", "optim": OptimConfig(b2=0.999)}, "optim.b2: got 0.999"),
        ({"remat": "some"}, "train.remat: got 'some'"),
    ],
    ids=["product", "rows", "context", "parts", "heads", "layers", "rounds", "moments", "remat"],
)  # fmt: skip
def test_one_line_says_why_a_job_cannot_train(changes, reason):
    said = illegal(job(**changes))
    assert said is not None
    assert said.startswith(reason)
    assert "\n" not in said


def test_a_teacher_has_to_fit_the_mesh_too():
    of = job(cfg=preset("125m", heads=16, kv_heads=16), mesh=MeshPlan(tensor=8), teacher=Shape(cfg=SHORT))
    assert illegal(of.changed(teacher=None)) is None
    assert "H = 12 over tensor = 8" in (illegal(of) or "")


def test_numbers_of_microbatches():
    degrees = dict.fromkeys(AXES, 1)
    assert microbatches(32, degrees, 16) == [1, 2, 4, 8, 16, 32]
    assert microbatches(12, degrees, 16) == [1, 2, 4, 12]
    assert microbatches(32, degrees | {"fsdp": 8}, 16) == [1, 2, 4]
    assert microbatches(256, degrees | {"pipe": 4}, 16) == [4, 8, 16, 32, 64]
    assert microbatches(2, degrees | {"pipe": 4}, 16) == [2]  # fewer rows than stages
    assert microbatches(7, degrees | {"fsdp": 8}, 16) == [1]


def test_reasons_of_a_kind_differ_in_numbers_alone():
    assert kind("train.batch: got 12 rows, expected 8") == "train.batch"
    assert kind("model: the mesh cannot cut K = 8 over tensor = 16") == kind(
        "model: the mesh cannot cut K = 2 over tensor = 4"
    )


def test_slices_stay_as_they_are():
    assert {mesh["dcn"] for mesh in meshes(16, 2, Space(), has_experts=False)} == {2}
    assert {mesh["expert"] for mesh in meshes(8, 1, Space(), has_experts=True)} == {1, 2, 4, 8}
    with pytest.raises(ConfigError, match=r"mesh\.dcn: got 3 slices, expected a divisor of 8 devices"):
        list(meshes(8, 3, Space(), has_experts=False))


def test_precisions_are_tried_where_they_are_named():
    both = (PRECISION, f"{PRECISION},state=bfloat16")
    one, two = (plans(job(), 8, dataclasses.replace(FEW, precision=named)) for named in ((), both))
    assert len(two) == 2 * len(one)
    assert {two.at(row).precision for row in range(len(two))} == set(both)
    assert {one.at(row).precision for row in range(len(one))} == {PRECISION}
    cost = costs(chip("v5e"))
    size = {precision: cost.bytes(job(precision=precision)) for precision in both}
    assert size[both[0]] - size[both[1]] == pytest.approx(2 * 2 * 67_000_000, rel=0.01)  # two moments of 2 bytes less
