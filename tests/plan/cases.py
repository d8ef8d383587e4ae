"""Jobs whose memory is predicted and compiled: for CPU devices, and for TPUs by topology."""

import dataclasses

import jax

from lmeff.compress.config import MATRICES, Prune, Quantize
from lmeff.distill.objectives import Distill
from lmeff.models.config import ModelConfig, MoE, preset
from lmeff.parallel.devices import parse_topology
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.plan.job import Job, Shape
from lmeff.plan.program import compiled
from lmeff.recipe.artifact import Recipe

CFG = ModelConfig(vocab=2048, width=256, layers=4, heads=8, kv_heads=8, ffn=704, tied=False)
EXPERTS = dataclasses.replace(CFG, ffn=256, moe=MoE(experts=8, top_k=2))
MIXED = "params=float32,compute=bfloat16,output=bfloat16,state=float32"
LSQ = Quantize(method="lsq", rules=((MATRICES, "int4/g32"), (".*", None)))


def memory(job, devices=None):
    """What the compiler says of the step's memory on one device."""
    devices = devices or jax.devices()[: job.devices]
    # Other tests ask for the highest precision, which a kernel of bfloat16 products cannot have.
    with jax.default_matmul_precision("default"):
        return compiled(job, make_layout(job.mesh, devices)).memory_analysis()


def cpu(cfg=CFG, mesh=MeshPlan(), devices=1, transforms=(), **fields):  # noqa: B008 -- frozen
    """A job on CPU devices: eight rows of 256 tokens where nothing else is said."""
    student = Shape(cfg=cfg, recipe=Recipe(transforms=transforms))
    given = {"platform": "cpu", "rows": 8, "tokens": 256, "remat": "full", **fields}
    return Job(name="cpu", student=student, mesh=mesh, devices=devices, **given)


def sized(cfg=CFG, **changes):
    return dataclasses.replace(cfg, **changes)


CPU = {
    "dense none": cpu(remat="none"),
    "dense dots": cpu(remat="dots"),
    "dense names": cpu(remat="names"),
    "grouped full": cpu(sized(kv_heads=2, layers=6, ffn=1024)),
    "experts full": cpu(EXPERTS),
    "capacity full": cpu(sized(EXPERTS, moe=MoE(experts=8, top_k=2, capacity=1.25))),
    "int8 full": cpu(transforms=(Quantize(),)),
    "lsq full": cpu(transforms=(LSQ,)),
    "2:4 full": cpu(transforms=(Prune(pattern="2:4"),)),
    "teacher full": cpu(teacher=Shape(cfg=sized(layers=6)), distill=Distill(teacher="teacher")),
    "accumulate 4": cpu(rows=16, accumulate=4),
    "pipe 4, 1f1b": cpu(mesh=MeshPlan(pipe=4), devices=4, rows=32, accumulate=8, remat="none"),
    "fsdp 8": cpu(mesh=MeshPlan(fsdp=8), devices=8, rows=32),
    "tensor 4": cpu(mesh=MeshPlan(tensor=4), devices=4),
    "fsdp 4 x tensor 2": cpu(mesh=MeshPlan(fsdp=4, tensor=2), devices=8, rows=32),
    "data 8, dots": cpu(mesh=MeshPlan(data=8), devices=8, rows=32, remat="dots"),
}

# Sizes that no row of the tables was read off: see the README.
HELD_OUT = {
    "wide ffn, dots": cpu(sized(width=192, ffn=1536, layers=5), remat="dots"),
    "narrow ffn, full": cpu(sized(width=384, heads=6, kv_heads=3, ffn=512), rows=4),
    "long rows, names": cpu(sized(layers=3), rows=2, tokens=2048, remat="names"),
    "large vocabulary": cpu(sized(vocab=16384, layers=2), rows=8),
    "gelu, layer norm": cpu(sized(activation="gelu", norm="layer", bias="all", ffn=1024), rows=8),
    "fsdp 2 x tensor 4, dots": cpu(sized(kv_heads=4), mesh=MeshPlan(fsdp=2, tensor=4), devices=8, remat="dots"),
    "context 4": cpu(mesh=MeshPlan(context=4), devices=4, rows=2, tokens=1024),
    "zero 1": cpu(mesh=MeshPlan(fsdp=4, zero=1), devices=4, rows=16),
}

SMALL = ModelConfig(vocab=16384, width=1024, layers=8, heads=8, kv_heads=4, head_width=128, ffn=4096, tied=False)


def tpu(topology, mesh, cfg=SMALL, rows_each=2, tokens=2048, **fields):
    """A job on a topology: so many rows on every group of devices that has its own."""
    devices = parse_topology(topology).devices
    degrees = mesh.degrees(devices)
    groups = degrees["dcn"] * degrees["data"] * degrees["fsdp"] * degrees["expert"]
    given = {"precision": MIXED, "remat": "full", **fields}
    rows = groups * rows_each * given.get("accumulate", 1)
    return topology, Job(
        name="tpu",
        student=Shape(cfg=cfg),
        mesh=mesh,
        devices=devices,
        platform="tpu",
        rows=rows,
        tokens=tokens,
        **given,
    )


LLAMA = preset("llama3_8b")
NARROW = sized(SMALL, vocab=8192, width=512, layers=4, heads=4, kv_heads=2, ffn=2048)
TPU = {
    "v5e fsdp 16, narrow": tpu("v5e:4x4", MeshPlan(fsdp=16), NARROW, rows_each=1, tokens=512),
    "v5e fsdp 4, narrow, 64 layers": tpu(
        "v5e:2x2", MeshPlan(fsdp=4), sized(NARROW, layers=64), rows_each=4, tokens=512
    ),
    "v5e fsdp 16, 4 layers": tpu(
        "v5e:4x4", MeshPlan(fsdp=16), sized(SMALL, layers=4, kv_heads=2), rows_each=1, tokens=4096
    ),
    "v5e fsdp 16, 16 heads": tpu(
        "v5e:4x4", MeshPlan(fsdp=16), sized(SMALL, vocab=32768, layers=4, heads=16), rows_each=1
    ),
    "v5e fsdp 4": tpu("v5e:2x2", MeshPlan(fsdp=4)),
    "v5e fsdp 4, heads of 64": tpu("v5e:2x2", MeshPlan(fsdp=4), sized(SMALL, heads=16, kv_heads=8, head_width=64)),
    "v6e 1, heads of 64, names": tpu(
        "v6e:1x1", MeshPlan(), sized(SMALL, layers=4, heads=16, kv_heads=16, head_width=64), remat="names"
    ),
    "v5e data 4": tpu("v5e:2x2", MeshPlan(data=4), sized(SMALL, layers=4)),
    "v6e fsdp 4, 16 layers, dots": tpu("v6e:2x2", MeshPlan(fsdp=4), sized(SMALL, layers=16), remat="dots"),
    "v5p fsdp 4": tpu("v5p:2x2x1", MeshPlan(fsdp=4)),
    "v4 fsdp 4, 16 layers": tpu("v4:2x2x1", MeshPlan(fsdp=4), sized(SMALL, layers=16)),
    "tpu7x fsdp 8": tpu("tpu7x:2x2x1", MeshPlan(fsdp=8)),
    "v5e fsdp 4 x tensor 4": tpu("v5e:4x4", MeshPlan(fsdp=4, tensor=4), rows_each=4),
    "v5p fsdp 2 x tensor 2, names": tpu("v5p:2x2x1", MeshPlan(fsdp=2, tensor=2), remat="names"),
    "v6e fsdp 4, 32 layers, none": tpu("v6e:2x2", MeshPlan(fsdp=4), sized(SMALL, layers=32), rows_each=1, remat="none"),
    "v5p fsdp 4, accumulate 4": tpu("v5p:2x2x1", MeshPlan(fsdp=4), accumulate=4),
    "v4 pipe 4, 1f1b": tpu("v4:2x2x1", MeshPlan(pipe=4), accumulate=8, rows_each=1),
    "tpu7x tensor 4 x data 2": tpu("tpu7x:2x2x1", MeshPlan(data=2, tensor=4), rows_each=4),
    "llama3_8b v5e:4x4": tpu("v5e:4x4", MeshPlan(fsdp=16), LLAMA, rows_each=1, tokens=4096),
    "llama3_8b v5p:4x4x4": tpu("v5p:4x4x4", MeshPlan(fsdp=64), LLAMA, rows_each=1, tokens=4096),
    "llama3_8b v5e:16x16": tpu("v5e:16x16", MeshPlan(fsdp=256), LLAMA, rows_each=1, tokens=4096),
}
