"""FLOPs counted from letters equal XLA's own count of an unrolled model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.batch import Batch
from lmeff.core.ops import make_ops
from lmeff.core.specs import abstract
from lmeff.models.config import ModelConfig
from lmeff.models.cost import flops_per_token
from lmeff.models.transformer import block, normalize, param_specs, project

CASES = {
    "grouped": {"kv_heads": 2},
    "untied, plain": {"kv_heads": 4, "tied": False, "activation": "gelu"},
    "window": {"kv_heads": 4, "window": 24, "head_width": 32},
}


def products_only(q, k, v, segments, *, window, softcap):
    """The two products of attention over all keys, without a softmax."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return jnp.einsum("BHTS,BSHC->BTHC", jnp.einsum("BTHC,BSHC->BHTS", q, k), v)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_compilers_count(case):
    cfg = ModelConfig(vocab=384, width=256, layers=2, heads=4, ffn=512, **CASES[case])
    rows, context = 2, 64

    def unrolled(params, tokens):
        ops = make_ops(attend=products_only)({}).ops
        ids = jnp.ones_like(tokens)
        x = params["embed"]["table"][tokens]
        for layer in range(cfg.layers):
            p = jax.tree.map(lambda w, layer=layer: w[layer], params["blocks"])
            x = block(x, p, Batch(tokens, tokens, ids, ids, ids), cfg, ops)
        head = params["embed"]["table"] if cfg.tied else params["head"]["w"]
        return project(normalize(x, params["final_norm"], cfg), head, cfg, ops)

    tokens = jax.ShapeDtypeStruct((rows, context), jnp.int32)
    compiled = jax.jit(unrolled).lower(abstract(param_specs(cfg)), tokens).compile()
    counted = compiled.cost_analysis()["flops"] / (rows * context)
    t, s = np.arange(context)[:, None], np.arange(context)[None, :]
    visible = ((s <= t) & (t - s < (cfg.window or context))).sum() / context
    unseen = cfg.layers * 4 * cfg.heads * cfg.head_size * (context - visible)
    assert abs(counted / (flops_per_token(cfg, context) + unseen) - 1) < 0.01
