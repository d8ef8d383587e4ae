"""Steps compiled for every stage of a config, and for TPU topologies, beside what is predicted of them."""

from pathlib import Path

import jax
import pytest

from lmeff.config.files import load_experiment
from lmeff.core.errors import DoesNotFit
from lmeff.core.specs import count
from lmeff.models.config import ModelConfig, preset
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan
from lmeff.plan.estimate import Memory
from lmeff.plan.job import Job, Shape, jobs
from lmeff.plan.state import host_bytes, state_bytes
from lmeff.plan.verify import refusal, verify
from lmeff.train.optim import OptimConfig
from tests.tpu.programs import needs_libtpu

QUICKSTART = jobs(load_experiment(Path(__file__).parents[2] / "configs/quickstart.py"), 8, "cpu")
MIXED = "params=float32,compute=bfloat16,output=bfloat16,state=float32"
TINY = Job(
    name="tiny",
    student=Shape(cfg=preset("tiny", layers=1, tied=False)),
    mesh=MeshPlan(data=2),
    devices=2,
    platform="cpu",
    rows=4,
    tokens=16,
    optim=OptimConfig(name="sgd"),
)

OUT_OF_MEMORY = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 18.97M of 13.00M hbm. Exceeded hbm capacity by 5.97M.

  Largest program allocations in hbm:

  1. Size: 6.41M
     XLA label: overlays
     Allocation type: overlays
"""
EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (11.09M) "
    "exceeds available HBM (10.00M)."
)


@pytest.fixture(scope="module")
def found():
    return verify(TINY, jax.devices()[:2])


def test_a_step_on_two_devices(found):
    weights = count(param_specs(TINY.cfg))
    assert found.arguments == state_bytes(TINY)
    assert {row.name: row.difference for row in found.rows}["arguments"] == 0
    assert found.argument == pytest.approx(4 * 2 * weights + 5 * 4 * 2 * 16, rel=0.001)
    assert found.total == found.argument + found.output - found.alias + found.temp
    assert found.alias >= 4 * 2 * weights  # the state is donated
    assert found.collectives["all-reduce"]["data"] == pytest.approx(2 / 2 * 4 * weights, rel=0.01)
    assert found.unknown == 0
    told = found._replace(unknown=3).to_json()["compiled"]
    assert (told["total_bytes"], told["collectives_of_unknown_count"]) == (found.total, 3)


def test_a_prediction_is_laid_beside(found):
    found = found._replace(predicted=Memory(0, {"parameters": 10, "optimizer": 20}, {"gradients": 70}, 5), reported=70)
    rows = {row.name: row for row in found.rows}
    assert {name: row.predicted for name, row in rows.items()} == {
        "parameters": 10,
        "optimizer": 20,
        "batch": 0,
        "counters": 0,
        "arguments": 30,
        "temporaries": 70,
        "total": 100,
        "in the host's memory": 5,
    }
    assert rows["total"].difference == pytest.approx((100 - found.total) / found.total)
    told = {row["name"]: row for row in found.to_json()["compiled"]["compared"]}
    assert list(told) == list(rows)
    assert told["total"]["difference"] == rows["total"].difference


@pytest.mark.parametrize(
    ("message", "told"), [(OUT_OF_MEMORY, "18.97M of a device's 13.00M"), (EARLY, "11.09M of a device's 10.00M")]
)
def test_a_refusal_says_how_much_and_what_is_to_blame(message, told):
    predicted = Memory(0, {"parameters": 2**30, "optimizer": 2**31}, {"gradients": 2**29})
    text = refusal(message, "v5e:4x4", predicted)
    assert told in text
    assert "'optimizer' with 2.00 GiB" in text
    assert "optim.offload" in text
    assert ("6.41M (overlays)" in text) == (message is OUT_OF_MEMORY)


def test_other_errors_of_the_compiler_are_passed_on(monkeypatch):
    def broken(job, layout):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr("lmeff.plan.verify.compiled", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        verify(TINY, jax.devices()[:2])


@pytest.mark.slow
@pytest.mark.parametrize("job", QUICKSTART, ids=lambda job: job.name)
def test_every_stage_that_trains_compiles(job):
    found = verify(job, jax.devices())
    assert sum(state_bytes(job).values()) == pytest.approx(found.argument, rel=0.005)
    assert found.arguments == pytest.approx(state_bytes(job), rel=0.005)
    assert found.collectives


NARROW = ModelConfig(vocab=2048, width=256, layers=2, heads=4, kv_heads=4, ffn=512, tied=False)
ON_TPU = Job(
    name="step",
    student=Shape(cfg=NARROW),
    precision=MIXED,
    mesh=MeshPlan(fsdp=4),
    devices=4,
    rows=4,
    tokens=256,
    remat="full",
)


@pytest.mark.tpu_aot
@pytest.mark.slow
@needs_libtpu
def test_a_step_for_a_topology():
    with jax.default_matmul_precision("default"):  # a kernel of bfloat16 products cannot have the highest
        found = verify(ON_TPU.changed(optim=OptimConfig(offload=True)), "v5e:2x2")
    job = ON_TPU.changed(optim=OptimConfig(offload=True))
    assert found.argument == sum(state_bytes(job).values()), "heads of 64 and all, as stored in tiles"
    assert found.arguments == state_bytes(job)
    assert found.host >= host_bytes(job) > 0
    assert found.peak is not None
    assert found.collectives


@pytest.mark.tpu_aot
@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_refused():
    large = ON_TPU.changed(
        student=Shape(cfg=preset("llama3_8b", layers=2)), mesh=MeshPlan(data=4), rows=64, tokens=4096
    )
    with (
        jax.default_matmul_precision("default"),
        pytest.raises(DoesNotFit, match=r"G of a device's .*'optimizer'") as told,
    ):
        verify(large, "v5e:2x2")
    assert told.value.exit_code == 6
