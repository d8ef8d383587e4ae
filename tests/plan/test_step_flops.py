"""The products of the whole traced train step are those that are planned: what runs, whatever is composed."""

import dataclasses

import jax
import pytest

from lmeff.compress.config import Prune, Quantize
from lmeff.core.numerics import parse_format
from lmeff.core.ops import Numerics
from lmeff.distill.objectives import Distill
from lmeff.models.attention import BLOCK
from lmeff.models.config import ModelConfig, MoE
from lmeff.plan.jaxprs import product_flops, total, traced
from lmeff.plan.job import Job, Shape
from lmeff.plan.program import arguments, runtime
from lmeff.plan.work import work
from lmeff.recipe.artifact import Recipe
from lmeff.train.step import make_train_step

CFG = ModelConfig(vocab=192, width=64, layers=3, heads=4, kv_heads=2, ffn=160, tied=False)
TOKENS = BLOCK  # one tile of attention, which is computed whole
QUANTIZED = Recipe(
    transforms=(Prune(pattern="2:4"), Quantize(method="lsq")), numerics=Numerics((("mlp.down", parse_format("int8")),))
)
SLOTS = dataclasses.replace(CFG, moe=MoE(experts=4, top_k=2, capacity=1.5, shared=1))
TEACHER = Shape(cfg=dataclasses.replace(CFG, width=96, heads=6, layers=5, tied=True))
JOBS = {
    "plain": {},
    "tied, full remat, accumulated": {
        "student": Shape(cfg=dataclasses.replace(CFG, tied=True)),
        "remat": "full",
        "accumulate": 2,
    },
    "products kept": {"remat": "dots"},
    "attention kept": {"remat": "names"},
    "quantization-aware, pruned": {"student": Shape(cfg=CFG, recipe=QUANTIZED), "remat": "full"},
    "taught": {"teacher": TEACHER, "distill": Distill(teacher="t")},
    "experts": {"student": Shape(cfg=SLOTS), "remat": "full"},
}


def step_flops(job):
    """Of the products in the traced step, on shapes."""
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments(job, job.layout))
    return total(traced(make_train_step(runtime(job, job.layout)), *given), product_flops())


@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_a_steps_products_are_those_planned(fields):
    fields = {"student": Shape(cfg=CFG), **fields}
    job = Job(name="a", rows=4, tokens=TOKENS, platform="cpu", **fields)
    found = work(job)
    visible = next(site.visible for site in found.sites if site.kind == "attention")
    parts = {name: flops for name, flops in found.parts.items() if name not in ("compression", "optimizer")}
    # The causal part is planned, the whole tile is run.
    attention = found.parts["attention forward"]
    rerun = attention if fields.get("remat") in ("full", "dots") else 0
    taught = sum(site.flops * site.visible for site in found.teacher if site.kind == "attention")
    masked = (attention + found.parts["attention backward"] + rerun + taught) * (1 / visible - 1)
    assert step_flops(job) == pytest.approx(sum(parts.values()) + masked, rel=1e-3 if job.cfg.moe else 1e-9)
