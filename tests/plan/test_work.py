"""FLOPs of a step by closed formula, for every kind of job, and beside the compiler's count of its elementwise parts."""

import dataclasses

import jax
import optax
import pytest

from lmeff.compress.config import Prune, Quantize
from lmeff.core.numerics import parse_format
from lmeff.core.ops import Numerics
from lmeff.core.specs import abstract, count
from lmeff.core.tree import flatten
from lmeff.distill.objectives import Distill
from lmeff.models.config import ModelConfig, MoE, preset
from lmeff.models.cost import active_parameters
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan
from lmeff.plan.flops import attention_forward, palm_per_token
from lmeff.plan.job import Job, Shape
from lmeff.plan.overhead import activation_flops, copies, optimizer_flops, view_flops
from lmeff.plan.work import CONVENTIONS, work
from lmeff.recipe.artifact import Recipe
from lmeff.train.optim import OPTIMIZERS, OptimConfig, make_optimizer

CFG = ModelConfig(vocab=256, width=64, layers=4, heads=4, kv_heads=2, ffn=160, tied=False)
ROWS, TOKENS = 16, 32
FLOAT32 = "params=float32,compute=float32,output=float32,state=float32"
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 160  # weights that a token is multiplied with
HEAD = 64 * 256
FULL = 4 * attention_forward(ROWS, TOKENS, 4, 16)
CAUSAL = 4 * attention_forward(ROWS, TOKENS, 4, 16, causal=True)


def job(**fields):
    return Job(name="stage", student=fields.pop("student", Shape(cfg=CFG)), rows=ROWS, tokens=TOKENS, **fields)


def products(weights):
    return 2 * ROWS * TOKENS * weights


EXPERTS = dataclasses.replace(CFG, moe=MoE(experts=4, top_k=2))
SLOTS = dataclasses.replace(CFG, moe=MoE(experts=4, top_k=2, capacity=1.5))
PRUNED = Recipe(transforms=(Prune(pattern="2:4"), Quantize(method="lsq")))
TAUGHT = {"teacher": Shape(cfg=dataclasses.replace(CFG, layers=8)), "distill": Distill(teacher="t")}
OF_EXPERTS = LAYER + 64 * 4 + 3 * 64 * 160  # two of them and a router in place of one ffn
JOBS = {
    "dense": (job(), 4 * LAYER + HEAD, 4 * LAYER + HEAD),
    "experts": (job(student=Shape(cfg=EXPERTS)), 4 * OF_EXPERTS + HEAD, 4 * OF_EXPERTS + HEAD),
    "experts with empty slots": (
        job(student=Shape(cfg=SLOTS)),
        4 * OF_EXPERTS + HEAD,
        4 * (OF_EXPERTS + 3 * 64 * 160) + HEAD,  # 4 experts x 24 slots for 32 tokens x 2
    ),
    "quantization-aware, pruned": (job(student=Shape(cfg=CFG, recipe=PRUNED)), 4 * LAYER + HEAD, 4 * LAYER + HEAD),
    "taught": (job(**TAUGHT), 4 * LAYER + HEAD, 4 * LAYER + HEAD),
    "pipeline": (job(mesh=MeshPlan(pipe=2), devices=2, accumulate=4), 4 * LAYER + HEAD, 4 * LAYER + HEAD),
    "sharded": (job(mesh=MeshPlan(fsdp=4, tensor=2), devices=8), 4 * LAYER + HEAD, 4 * LAYER + HEAD),
}


@pytest.mark.parametrize(("planned", "useful", "run"), JOBS.values(), ids=JOBS)
def test_model_and_parts_by_formula(planned, useful, run):
    found = work(planned)
    assert found.model_full == pytest.approx(3 * (products(useful) + FULL), rel=1e-9)
    assert found.model_causal == pytest.approx(3 * (products(useful) + CAUSAL), rel=1e-9)
    assert found.parts["forward"] == products(run)
    assert found.parts["backward"] == 2 * products(run)
    assert found.parts["attention forward"] == pytest.approx(CAUSAL)
    assert found.hardware == sum(found.parts.values())
    assert found.six_nd == 6 * active_parameters(planned.cfg) * ROWS * TOKENS
    assert {*found.parts, *found._fields} - {"sites", "teacher", "parts"} <= {*CONVENTIONS}


def test_conventions_name_what_there_is():
    fields = {*work(job())._fields} - {"sites", "parts"}
    assert {*CONVENTIONS} == {*work(job(mesh=MeshPlan(pipe=3), devices=3, accumulate=4)).parts} | fields


def test_llama_3_counts_as_palms_formula_does():
    """6N + 12LHQT of PaLM, N without the table that is only looked up."""
    cfg = preset("llama3_8b")
    found = work(Job(name="a", student=Shape(cfg=cfg), rows=4, tokens=8192))
    matrices = {path: spec for path, spec in flatten(param_specs(cfg)).items() if spec.is_matmul}
    multiplied = count(matrices) - cfg.vocab * cfg.width
    assert found.model_full == pytest.approx(4 * 8192 * palm_per_token(multiplied, 32, 32, 128, 8192), rel=1e-12)


def test_pruned_weights_are_left_out_of_what_is_effective():
    found = work(JOBS["quantization-aware, pruned"][0])
    assert found.effective == pytest.approx(3 * (products(4 * LAYER / 2 + HEAD) + CAUSAL))
    assert work(job()).effective == work(job()).model_causal


@pytest.mark.parametrize(
    ("remat", "weights", "attention"), [("full", LAYER - 64 * 160, 1), ("dots", 0, 1), ("names", LAYER - 64 * 160, 0)]
)
def test_recomputation(remat, weights, attention):
    found = work(job(remat=remat)).parts["recompute"]
    assert found == pytest.approx(products(4 * weights) + attention * CAUSAL)


def test_a_pipeline_that_keeps_inputs_runs_every_layer_again_and_the_teachers_last_ones():
    plan = MeshPlan(pipe=2)
    inputs = work(job(mesh=plan, devices=2, accumulate=4, **TAUGHT)).parts
    residuals = work(job(mesh=dataclasses.replace(plan, stash="residuals"), devices=2, accumulate=4, **TAUGHT)).parts
    assert inputs["recompute"] == pytest.approx(products(4 * LAYER) + CAUSAL)
    assert residuals["recompute"] == 0
    teacher = products(8 * LAYER) + 2 * CAUSAL
    assert residuals["teacher"] == pytest.approx(teacher + products(HEAD))
    assert inputs["teacher"] == pytest.approx(1.5 * teacher + products(HEAD))


def test_a_pipeline_pads_slices():
    parts = work(job(mesh=MeshPlan(pipe=3), devices=3, accumulate=4)).parts  # 4 layers as 2 + 1 + 1
    layers = 3 * products(4 * LAYER) + CAUSAL * 3.5 + parts["recompute"]
    assert parts["padding"] == pytest.approx(layers / 2)


def test_attention_on_tpus_makes_scores_twice_in_its_backward_pass():
    wide = dataclasses.replace(CFG, head_width=128)
    for platform, context, times in (("cpu", 1, 2.5), ("tpu", 1, 3.5), ("tpu", 2, 2.5)):
        planned = Job(
            name="a",
            student=Shape(cfg=wide),
            rows=2,
            tokens=256,
            platform=platform,
            mesh=MeshPlan(context=context),
            devices=context,
        )
        parts = work(planned).parts
        assert parts["attention backward"] == pytest.approx(times * parts["attention forward"])


def test_a_mask_costs_one_flop_a_weight_each_way_on_every_copy():
    """Once a microbatch, again where the layer is; a device of fsdp has its part, one of data a copy."""
    masked = {"student": Shape(cfg=CFG, recipe=Recipe(transforms=(Prune(sparsity=0.5),)))}
    weights = 4 * LAYER
    assert view_flops(masked["student"], FLOAT32) == (weights, weights)
    assert work(job(**masked)).parts["compression"] == 2 * weights
    assert work(job(**masked, accumulate=4, remat="full")).parts["compression"] == 12 * weights
    for plan, times in ((MeshPlan(data=4), 4), (MeshPlan(fsdp=4), 1), (MeshPlan(data=2, tensor=2), 2)):
        assert work(job(**masked, mesh=plan, devices=4)).parts["compression"] == times * 2 * weights
    piped = job(**masked, mesh=MeshPlan(pipe=2), devices=2, accumulate=4)  # seen once a step
    assert work(piped).parts["compression"] == 2 * weights


def test_activations_on_grids_cost_as_often_as_they_are_made():
    numerics = Numerics((("mlp.down", parse_format("int8")),))
    shape = Shape(cfg=CFG, recipe=Recipe(numerics=numerics))
    forward, backward = activation_flops(parse_format("int8"))
    numbers = 4 * ROWS * TOKENS * 160
    assert work(job(student=shape)).parts["compression"] == numbers * (forward + backward)
    assert work(job(student=shape, remat="full")).parts["compression"] == numbers * (2 * forward + backward)
    assert 5 < forward < 30
    taught = job(teacher=shape, distill=Distill(teacher="t"), remat="full")  # it has no backward pass
    assert work(taught).parts["compression"] == numbers * forward


def test_an_optimizers_flops_are_near_the_compilers():
    """XLA's count has casts and more, and leaves out square roots; both are sums over the same arithmetic."""
    optim, specs = OptimConfig(clip_norm=None), param_specs(CFG)
    tx = make_optimizer(optim, 100, policy=job().policy, specs=specs)
    params = abstract(specs)
    state = jax.eval_shape(tx.init, params)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    xla = jax.jit(update).lower(params, state, params).compile().cost_analysis()["flops"]
    assert optimizer_flops(Shape(cfg=CFG), optim, FLOAT32) == pytest.approx(xla, rel=0.25)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_counted(name):
    each = optimizer_flops(Shape(cfg=CFG), OptimConfig(name=name), FLOAT32) / count(param_specs(CFG))
    assert each > 1000 if name == "muon" else 5 < each < 60  # muon multiplies matrices


def test_the_optimizer_runs_on_every_copy_of_its_state():
    once = work(job()).parts["optimizer"]
    found = {zero: work(job(mesh=MeshPlan(fsdp=4, zero=zero), devices=4)).parts["optimizer"] for zero in (0, 1, 3)}
    assert found[0] == 4 * once
    assert found[1] == found[3] == pytest.approx(once, rel=0.1)
    assert copies(job(mesh=MeshPlan(data=4), devices=4).layout, Shape(cfg=CFG)) == 4
