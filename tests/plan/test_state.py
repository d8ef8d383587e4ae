"""Bytes of what a step is given, against the arguments of compiled programs."""

import dataclasses

import jax
import numpy as np
import pytest

from lmeff.compress.activations import Activations
from lmeff.compress.config import MATRICES, Prune, Quantize
from lmeff.core.errors import ConfigError
from lmeff.core.specs import abstract, count
from lmeff.distill.objectives import Distill
from lmeff.models.config import ModelConfig, MoE, preset
from lmeff.models.transformer import param_specs
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.plan.job import Job, Shape
from lmeff.plan.program import arguments, compiled, runtime
from lmeff.plan.state import CATEGORIES, host_bytes, state_bytes
from lmeff.recipe.artifact import Recipe
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.optim import OptimConfig
from lmeff.train.state import create_state
from lmeff.train.step import begin
from tests.models.families import FAMILIES

CFG = ModelConfig(vocab=96, width=64, layers=4, heads=8, kv_heads=4, ffn=128, tied=False)
EXPERTS = ModelConfig(vocab=96, width=64, layers=2, heads=4, kv_heads=2, ffn=32, moe=MoE(experts=8, shared=1))
KD = Distill(teacher="teacher", mix=0.5)
LSQ = Quantize(method="lsq", rules=((MATRICES, "int4/g16"), (".*", None)))
INT4 = Quantize(rules=((MATRICES, "int4/g32"), ("embed/table", "int8-affine"), (".*", None)))
MIXED = "params=bfloat16,compute=bfloat16,output=bfloat16,state=bfloat16"
HALF = "params=float32,compute=float16,output=float32,state=float32"


def job(cfg=CFG, *, recipe=None, activations=None, **fields):
    recipe = recipe or Recipe()
    if activations is not None:
        recipe = dataclasses.replace(recipe, numerics=activations.resolve(cfg))
    known = {"name": "job", "devices": 8, "platform": "cpu", "rows": 16, "tokens": 32}
    return Job(student=Shape(cfg=cfg, recipe=recipe), **(known | fields))


def taught(*transforms, packed=False, cfg=CFG):
    return {"teacher": Shape(cfg=cfg, recipe=Recipe(transforms=transforms, packed=packed)), "distill": KD}


def squeezed(*transforms):
    return Recipe(transforms=transforms)


def family(name):
    return dataclasses.replace(CFG, **({"heads": 4, "kv_heads": 4} | FAMILIES[name]))


JOBS = {
    "data": job(),
    "one device": job(devices=1),
    "zero 0": job(mesh=MeshPlan(fsdp=4, zero=0)),
    "zero 1": job(mesh=MeshPlan(fsdp=4, zero=1), optim=OptimConfig(ema=0.9)),
    "zero 2": job(mesh=MeshPlan(fsdp=8, zero=2)),
    "zero 3": job(mesh=MeshPlan(fsdp=8), optim=OptimConfig(ema=0.9)),
    "tensor": job(mesh=MeshPlan(tensor=4, fsdp=2)),
    "context": job(mesh=MeshPlan(context=4, fsdp=2)),
    "expert": job(EXPERTS, mesh=MeshPlan(expert=4, fsdp=2)),
    "pipe": job(mesh=MeshPlan(pipe=2, tensor=2), accumulate=4),
    "uneven pipe": job(dataclasses.replace(CFG, layers=5), mesh=MeshPlan(pipe=2, fsdp=2), accumulate=4),
    "lion": job(mesh=MeshPlan(fsdp=4), optim=OptimConfig(name="lion", b2=0.99)),
    "adafactor": job(dataclasses.replace(CFG, width=256, vocab=256, ffn=512), optim=OptimConfig(name="adafactor")),
    "sgd": job(mesh=MeshPlan(fsdp=4), optim=OptimConfig(name="sgd")),
    "muon": job(mesh=MeshPlan(fsdp=4), optim=OptimConfig(name="muon")),
    "lamb": job(EXPERTS, mesh=MeshPlan(fsdp=4), optim=OptimConfig(name="lamb")),
    "bfloat16": job(precision=MIXED, mesh=MeshPlan(fsdp=4), optim=OptimConfig(ema=0.9)),
    "loss scale": job(precision=HALF),
    "masks": job(recipe=squeezed(Prune(pattern="2:4")), mesh=MeshPlan(fsdp=2, tensor=2)),
    "learned scales": job(recipe=squeezed(LSQ), mesh=MeshPlan(fsdp=2, tensor=2), optim=OptimConfig(ema=0.9)),
    "masks and scales": job(recipe=squeezed(Prune(sparsity=0.5), LSQ), mesh=MeshPlan(fsdp=4, zero=1)),
    "activations": job(activations=Activations(rules=((".*", "int8/tensor"),)), mesh=MeshPlan(fsdp=4)),
    "dense teacher": job(**taught(cfg=EXPERTS), mesh=MeshPlan(fsdp=4, tensor=2)),
    "fake-quantized teacher": job(**taught(INT4), mesh=MeshPlan(fsdp=4)),
    "int4 teacher": job(**taught(INT4, packed=True), mesh=MeshPlan(fsdp=4, tensor=2)),
    "int8 teacher, pipe": job(**taught(Quantize(), packed=True), mesh=MeshPlan(pipe=4), accumulate=4),
    "int8 reducer": job(reduce=Reduce(), mesh=MeshPlan(data=8)),
    "powersgd": job(reduce=Reduce(method="powersgd", rank=2), mesh=MeshPlan(fsdp=2, tensor=2)),
    "local": job(local=LocalUpdates(axis="data"), mesh=MeshPlan(data=4, tensor=2), recipe=squeezed(LSQ)),
    "local, powersgd": job(
        local=LocalUpdates(axis="dcn"), mesh=MeshPlan(dcn=2, fsdp=2), reduce=Reduce(method="powersgd", rank=2)
    ),
    "norms on both sides, windows by layer": job(family("gemma 3"), mesh=MeshPlan(fsdp=2, tensor=2)),
    "norms over heads that are apart": job(
        family("olmo 2"), mesh=MeshPlan(fsdp=2, tensor=4), optim=OptimConfig(ema=0.9)
    ),
    "learned positions": job(family("gpt 2"), mesh=MeshPlan(fsdp=4, tensor=2), rows=8, tokens=12),
    "learned positions, muon, zero 1": job(
        family("gpt 2"), mesh=MeshPlan(fsdp=8, zero=1), optim=OptimConfig(name="muon")
    ),
    "biased queries, pipe": job(family("qwen 2"), mesh=MeshPlan(pipe=2, fsdp=2), accumulate=4),
    "scaled rotation, masks": job(family("phi 3"), mesh=MeshPlan(fsdp=4), recipe=squeezed(Prune(pattern="2:4"))),
    "offload": job(mesh=MeshPlan(fsdp=4), optim=OptimConfig(offload=True)),
}


def argument_bytes(program):
    """(on the device, on the host)."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes, memory.host_argument_size_in_bytes


def passed_through(given):
    """A program that is given the same and does nothing."""
    places = jax.tree.map(lambda x: x.sharding, given)
    return jax.jit(lambda *x: x, out_shardings=tuple(places), donate_argnums=0).lower(*given).compile()


@pytest.mark.parametrize("name", JOBS)
def test_bytes_are_the_arguments_of_a_program(name):
    wanted = JOBS[name]
    layout = make_layout(wanted.mesh, jax.devices()[: wanted.devices])
    device, host = argument_bytes(passed_through(arguments(wanted, layout)))
    assert sum(state_bytes(wanted).values()) + host_bytes(wanted) == device + host


def test_all_categories_are_met():
    assert {category for each in JOBS.values() for category in state_bytes(each)} == set(CATEGORIES)


STEPS = {
    "int4 teacher, masks, scales": job(
        **taught(INT4, packed=True), recipe=squeezed(Prune(sparsity=0.5, end=5), LSQ), mesh=MeshPlan(fsdp=4, tensor=2)
    ),
    "experts, local, powersgd": job(
        EXPERTS, local=LocalUpdates(axis="data"), mesh=MeshPlan(data=4, expert=2), reduce=Reduce(method="powersgd")
    ),
    "pipe, average": job(
        mesh=MeshPlan(pipe=2, fsdp=2, tensor=2), accumulate=4, optim=OptimConfig(name="muon", ema=0.9)
    ),
}


BEGINNINGS = {
    "local": pytest.param(job(local=LocalUpdates(axis="data"), mesh=MeshPlan(data=4, fsdp=2))),
    "experts, local, powersgd": pytest.param(STEPS["experts, local, powersgd"], marks=pytest.mark.slow),
    "pipe, average": pytest.param(STEPS["pipe, average"], marks=pytest.mark.slow),
}


@pytest.mark.parametrize("wanted", BEGINNINGS.values(), ids=BEGINNINGS)
def test_what_is_planned_is_what_training_begins_with(wanted):
    layout = make_layout(wanted.mesh, jax.devices()[: wanted.devices])
    rt = runtime(wanted, layout)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(rt.specs, rt.policy.params))
    real = begin(rt, create_state(params, rt.specs, rt.compression, rt.tx, layout, ema=rt.ema is not None))
    planned = arguments(wanted, layout).state
    assert jax.tree.structure(real) == jax.tree.structure(planned)
    for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(planned), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_bytes_are_the_arguments_of_the_step_itself(name):
    wanted = STEPS[name]
    program = compiled(wanted, make_layout(wanted.mesh, jax.devices()[: wanted.devices]))
    assert sum(state_bytes(wanted).values()) == pytest.approx(argument_bytes(program)[0], rel=0.005)


def test_llama_8b_on_256_devices():
    """12 bytes a parameter over all devices, and five ids or weights a token: ZeRO-3 with Adam in float32."""
    llama = job(preset("llama3_8b"), mesh=MeshPlan(fsdp=256), devices=256, rows=256, tokens=4096, platform="gpu")
    found = state_bytes(llama)
    parameters = count(param_specs(llama.cfg))
    assert found["parameters"] * 256 == 4 * parameters
    assert found["optimizer"] == 2 * found["parameters"]
    assert found["batch"] == 5 * 4 * 4096
    assert sum(found.values()) < 0.352 * 2**30  # experiments/tpu_memory has 0.351 GiB of arguments
    assert host_bytes(llama) == 0
    offloaded = llama.changed(optim=OptimConfig(offload=True))
    assert host_bytes(offloaded) == found["optimizer"]
    assert "optimizer" not in state_bytes(offloaded)


def test_every_stage_holds_as_much_and_there_is_no_other():
    wanted = JOBS["pipe"]
    assert state_bytes(wanted, 0) == state_bytes(wanted, 1)
    with pytest.raises(ConfigError, match=r"stage 2, expected 0 to 1"):
        state_bytes(wanted, 2)


def test_another_mesh_traces_nothing_anew(monkeypatch):
    llama = job(preset("llama3_70b"), mesh=MeshPlan(fsdp=64), devices=64, rows=64)
    whole = state_bytes(llama)

    def refuse(*given, **named):
        raise AssertionError("traced again")

    monkeypatch.setattr("lmeff.plan.state.build_state", refuse)
    halves = state_bytes(llama.changed(mesh=MeshPlan(fsdp=128), devices=128, rows=128))
    assert halves["parameters"] * 2 == whole["parameters"]
