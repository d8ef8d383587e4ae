"""Steps of decoding compiled for TPUs: the cache stays where it is."""

import re

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.precision import parse
from lmeff.core.specs import abstract
from lmeff.infer.engine import decode, extend, make_engine
from lmeff.infer.served import Served
from lmeff.models.cache import cache_bytes, parse_cache
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.devices import topology
from lmeff.parallel.mesh import MeshPlan, make_layout, shardings
from tests.tpu.programs import needs_libtpu

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow, needs_libtpu]

CFG = ModelConfig(
    vocab=2048, width=512, layers=4, heads=8, kv_heads=4, head_width=128, ffn=1024, window=512, full_layers=(1, 3)
)


@pytest.mark.parametrize(("chunk", "text"), [(1, "bfloat16"), (1, "int8"), (8, "bfloat16")])
def test_keys_and_values_are_not_copied(chunk, text):
    """4096 tokens of 8 rows over data 2 x tensor 2; XLA may lay out scales anew, a thirtieth of the bytes."""
    layout, specs = make_layout(MeshPlan(data=2, tensor=2), topology("v5e:2x2")), param_specs(CFG)
    weights = abstract(specs, jnp.bfloat16)
    weights = jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), weights, shardings(weights, specs, layout)
    )
    policy = parse("params=bfloat16,compute=bfloat16,output=bfloat16")
    model = Served(cfg=CFG, params=weights, layout=layout, policy=policy)
    engine = make_engine(model, batch=8, length=4096, cache=parse_cache(text), chunk=chunk)

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.sharding("BS"[: len(shape)], shape))

    with jax.default_matmul_precision("default"):
        step, new = (decode, [integers(8)]) if chunk == 1 else (extend, [integers(8, chunk), integers(8)])
        program = step.lower(engine.program, engine.weights, engine.specs, *new).compile()
    memory, held = program.memory_analysis(), cache_bytes(engine.specs) // 4
    assert held <= memory.alias_size_in_bytes < 1.01 * held
    assert memory.temp_size_in_bytes < 0.2 * held
    stacks = {tuple(x.sharding.shard_shape(x.shape)) for stack in engine.specs.stacks for x in (stack.k, stack.v)}
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose|all-gather)\(", program.as_text())
    assert not stacks & {tuple(map(int, shape.split(","))) for shape in copied}
