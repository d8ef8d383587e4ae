"""A plan with round numbers, made by hand: what tables and pages are tested on. No formula made these numbers."""

from typing import Any

from lmeff.models.config import preset
from lmeff.parallel.mesh import MeshPlan
from lmeff.plan.answer import budget_json, estimate_json, search_json, serving_json
from lmeff.plan.budget import Fit
from lmeff.plan.chips import CHIPS
from lmeff.plan.estimate import Energy, Estimate, Flow, Memory, SiteTime, StepTime, Work
from lmeff.plan.job import Job, Shape
from lmeff.plan.search import Search
from lmeff.plan.space import Refused
from lmeff.plan.verify import Row

GIB = 2**30
JOB = Job(
    name="teacher",
    student=Shape(cfg=preset("llama3_70b")),
    precision="params=float32,compute=bfloat16,output=float32,state=float32",
    mesh=MeshPlan(fsdp=16, pipe=4, tensor=4),
    devices=256,
    rows=256,
    tokens=4096,
    steps=15_000,
    accumulate=8,
    remat="full",
)
PARTS = {
    "forward": 1.4e17, "backward": 2.8e17, "recompute": 1.4e17, "attention forward": 5.6e15, "attention backward": 1.4e16, "optimizer": 9.1e11,
}  # fmt: skip
WORK = Work(
    sites=(),
    teacher=(),
    parts=PARTS,
    model_full=4.5e17,
    model_causal=4.4e17,
    hardware=sum(PARTS.values()),
    effective=4.4e17,
    six_nd=4.4e17,
)
STATE = {"parameters": 4 * GIB, "optimizer": 8 * GIB, "batch": 2**20}
MEMORY = tuple(
    Memory(
        stage=stage,
        state=STATE,
        temporaries={
            "gradients": 4 * GIB,
            "gathered weights": 3 * GIB,
            "stash": kept * GIB,
            "block": 5 * GIB // 2,
            "logits": logits * GIB,
        },
        host=host * GIB,
    )
    for stage, kept, logits, host in ((0, 9, 0, 2), (2, 6, 0, 1), (3, 4, 3, 0))
)
FLOWS = (
    Flow("all-gather", ("fsdp",), "step", "ici", 21.5 * GIB, 0.120),
    Flow("reduce-scatter", ("fsdp",), "step", "ici", 10.7 * GIB, 0.060),
    Flow("all-gather", ("tensor",), "layer", "ici", 300 * GIB, 1.7),
    Flow("collective-permute", ("pipe",), "tick", "ici", 4.1 * GIB, 0.023),
)


def _site(name: str, flops: float, bytes_: float, bound: str) -> SiteTime:
    return SiteTime(name, flops, bytes_, flops / 459e12, bytes_ / 2.765e12, bound)


SITES = (
    _site("attn.q", 2.2e14, 2.6e10, "compute"),
    _site("attn.k", 2.8e13, 1.4e10, "compute"),
    _site("attention", 7.7e13, 3.3e10, "compute"),
    _site("mlp.up", 7.7e14, 8.1e10, "compute"),
    _site("mlp.down", 7.7e14, 8.1e10, "compute"),
    _site("head", 4.3e13, 1.1e10, "compute"),
    _site("norms", 1.1e11, 9.2e10, "memory"),
    _site("embed", 0.0, 2.1e9, "memory"),
)
TIME = StepTime(
    low=5.1,
    middle=7.4,
    high=11.2,
    sites=SITES,
    parts={"compute": 4.9, "memory": 0.06, "network": 1.9, "bubble": 1.4, "optimizer": 0.02, "host": 0.0},
    tokens_per_second=256 * 4096 / 7.4,
    mfu_full=0.52,
    mfu_causal=0.51,
    hfu=0.67,
)
ENERGY = Energy(
    joules={"compute": 600_000.0, "memory": 45_000.0, "network": 12_000.0, "idle": 120_000.0},
    kwh=3_900.0,
    chip_hours=7_890.0,
    assumptions={"watts a chip, busy": 450.0, "PUE": 1.1},
)


def make_estimate(**changes: Any) -> Estimate:
    """The plan, with fields changed."""
    made = Estimate(
        job=JOB,
        chip="v5p",
        parameters=70_553_706_496,
        active_parameters=70_553_706_496,
        work=WORK,
        memory=MEMORY,
        capacity=95 * GIB,
        flows=FLOWS,
        time=TIME,
        energy=ENERGY,
        notes=("network takes 23% of a step: less tensor parallelism sends less.",),
    )
    return made._replace(**changes)


def make_plan(**changes: Any) -> dict[str, Any]:
    """The same as JSON."""
    return estimate_json(make_estimate(**changes))


def compared(arguments, temporaries, live):
    """What a compiler might say beside the sample's prediction, as `Verification.to_json` has it."""
    fullest = max(MEMORY, key=lambda memory: memory.total)
    state, predicted = sum(fullest.state.values()), sum(fullest.temporaries.values())
    rows = (
        Row("arguments", state, arguments),
        Row("temporaries", predicted, temporaries),
        Row("total", state + predicted, arguments + temporaries),
        Row("live at the peak", fullest.total, live),
    )
    return [{**row._asdict(), "difference": row.difference} for row in rows]


def make_full() -> dict[str, Any]:
    """With everything that options ask for: search and room by hand, budget and serving of the real model."""
    best = make_estimate(job=JOB.changed(mesh=MeshPlan(fsdp=64, context=4), accumulate=1))
    found = Search(
        best=(best,),
        plain=best,
        piped=make_estimate(),
        least=best,
        own=make_estimate(),
        looked=279_096,
        legal=217_256,
        close=240,
        fit=191,
        refused={"heads": Refused(48_320, "model: the mesh cannot cut K = 8 over tensor = 64 evenly")},
        reasons=("best: fsdp 64 x context 4", "do not pipeline: the best plan with one takes 79% more"),
        simple=None,
    )
    room = Fit(
        rows=2944,
        tokens=96_000,
        row_step=128,
        token_step=128,
        rows_bytes=94 * GIB,
        tokens_bytes=95 * GIB,
        more_rows_bytes=97 * GIB,
        more_tokens_bytes=96 * GIB,
        capacity=95 * GIB,
    )
    compiled = {
        "where": "v5p:4x8x8",
        "fits": True,
        "argument_bytes": 11 * GIB,
        "compared": compared(11 * GIB, 20 * GIB, 28 * GIB),
        "total_bytes": 31 * GIB,
        "collective_bytes": {"all-gather": {"fsdp": 21.5 * GIB}},
    }
    return make_plan() | {
        "search": search_json(found),
        "room": room._asdict(),
        "compiled": compiled,
        "budget": budget_json(JOB, CHIPS["v5p"], bytes=40 * GIB, ms=None),
        "serving": serving_json(JOB.cfg, CHIPS["v5p"], 4096),
    }
