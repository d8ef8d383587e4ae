"""Train steps compiled for TPUs that are not here."""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from lmeff.models.config import ModelConfig
from lmeff.parallel.devices import topology
from lmeff.parallel.mesh import make_layout
from lmeff.plan import program
from lmeff.plan.job import Job, Shape
from lmeff.train.optim import OptimConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lmeff[tpu]'"
)

CFG = ModelConfig(vocab=2048, width=256, layers=4, heads=4, kv_heads=4, ffn=1024, tied=False)
TOKENS = 256
MIXED = "params=float32,compute=bfloat16,output=bfloat16,state=float32"


@functools.cache
def compiled(name, plan, rows, remat="full", offload=False, cfg=CFG):
    """(the state's shapes and shardings, the compiled step) of a plan on a topology."""
    layout = make_layout(plan, topology(name))
    job = Job(
        name="step",
        student=Shape(cfg=cfg),
        precision=MIXED,
        mesh=plan,
        devices=layout.mesh.size,
        rows=rows,
        tokens=TOKENS,
        accumulate=2 * plan.pipe if plan.pipe > 1 else 1,
        remat=remat,
        optim=OptimConfig(offload=offload),
    )
    # Other tests ask for the highest precision, which a kernel of bfloat16 products cannot have.
    with jax.default_matmul_precision("default"):
        return program.arguments(job, layout).state, program.compiled(job, layout)


def shard_bytes(x):
    """Bytes of a leaf on one device."""
    return jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))


ITEM = {"f32": 4, "s32": 4, "bf16": 2}


def arguments(text):
    """(shape, stored bytes, whether in the host's memory) of each argument of one chip, from the program's text.

    `f32[4,64,256]{2,1,0:T(8,128)S(5)}` is stored in tiles of 8 x 128, in memory space 5: the host's.
    """
    entry = re.search(r"entry_computation_layout=\{\((.*?)\)->", text).group(1)
    found = []
    for dtype, dims, order, tile, rest in re.findall(
        r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\)([^}]*))?\})?", entry
    ):
        shape = tuple(int(n) for n in dims.split(",") if n)
        stored = [shape[int(i)] for i in reversed(order.split(",")) if i] or [
            1
        ]  # outermost first; a scalar fills a tile
        for i, size in enumerate(reversed([int(n) for n in tile.split(",") if n]), 1):
            if i <= len(stored):
                stored[-i] = -(-stored[-i] // size) * size
        found.append((shape, ITEM[dtype] * math.prod(stored), "S(5)" in rest))
    return found
