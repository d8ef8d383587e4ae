"""FLOPs counted from letters equal XLA's own count of an unrolled model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.specs import abstract
from lmeff.models.config import ModelConfig
from lmeff.models.cost import flops_per_token
from lmeff.models.transformer import param_specs
from tests.models.unrolled import unrolled

CASES = {
    "grouped": {"kv_heads": 2},
    "untied, plain": {"kv_heads": 4, "tied": False, "activation": "gelu"},
    "window": {"kv_heads": 4, "window": 24, "head_width": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_compilers_count(case):
    cfg = ModelConfig(vocab=384, width=256, layers=2, heads=4, ffn=512, **CASES[case])
    rows, context = 2, 64

    tokens = jax.ShapeDtypeStruct((rows, context), jnp.int32)
    compiled = jax.jit(functools.partial(unrolled, cfg)).lower(abstract(param_specs(cfg)), tokens).compile()
    counted = compiled.cost_analysis()["flops"] / (rows * context)
    t, s = np.arange(context)[:, None], np.arange(context)[None, :]
    visible = ((s <= t) & (t - s < (cfg.window or context))).sum() / context
    unseen = cfg.layers * 4 * cfg.heads * cfg.head_size * (context - visible)
    assert abs(counted / (flops_per_token(cfg, context) + unseen) - 1) < 0.01
