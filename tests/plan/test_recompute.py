"""What runs again in a backward pass: by closed formula, by the compiler, by the pipeline's own passes, and by the TPU's kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from lmeff.core.batch import Batch
from lmeff.core.ops import make_ops
from lmeff.core.specs import abstract
from lmeff.core.tree import map_with_path
from lmeff.models import splash
from lmeff.models.config import ModelConfig, MoE
from lmeff.models.mask import Mask
from lmeff.models.remat import parse, wrapper
from lmeff.models.transformer import block, param_specs, sites
from lmeff.parallel.slices import (
    Out,
    Slice,
    SliceModel,
    forward_slice,
    products_of,
    pull_slice,
    save_slice,
    weight_gradients,
)
from lmeff.plan.jaxprs import product_flops, total, traced
from lmeff.plan.recompute import again, attention_backward

CFG = ModelConfig(vocab=64, width=128, layers=2, heads=4, kv_heads=2, ffn=320)
TOKENS = 64
FLOPS = {
    "attn.q": 2 * TOKENS * 128 * 128,
    "attn.k": 2 * TOKENS * 128 * 64,
    "attn.v": 2 * TOKENS * 128 * 64,
    "attn.o": 2 * TOKENS * 128 * 128,
    "mlp.up": 2 * TOKENS * 128 * 320,
    "mlp.gate": 2 * TOKENS * 128 * 320,
    "mlp.down": 2 * TOKENS * 320 * 128,
}
NEEDED = {*FLOPS} - {"mlp.down"}  # nobody's gradient needs what the last product gives
POLICIES = {
    "none": (set(), 0),
    "dots": (set(), 1),
    "names": (NEEDED, 0),
    "save:attn_out": (NEEDED, 0),
    "save:attn.q,mlp.up": (NEEDED - {"attn.q", "mlp.up"}, 1),
    "save:product,attn_out": (set(), 0),
    "full": (NEEDED, 1),
}


@pytest.mark.parametrize("remat", POLICIES)
def test_products_that_a_policy_computes_again(remat):
    rerun, attention = POLICIES[remat]
    assert again(CFG, remat, TOKENS, jnp.float32) == (sum(FLOPS[site] for site in rerun), attention)


@pytest.mark.parametrize("capacity", [None, 1.25])
def test_experts_compute_their_last_product_again_for_their_gates(capacity):
    cfg = dataclasses.replace(CFG, moe=MoE(experts=4, top_k=2, capacity=capacity))
    rows = 4 * 40 if capacity else 2 * TOKENS
    router, experts = 2 * TOKENS * 128 * 4, 3 * 2 * rows * 128 * 320
    attention = sum(flops for site, flops in FLOPS.items() if site.startswith("attn"))
    found = again(cfg, "full", TOKENS, jnp.float32)
    assert found.products == pytest.approx(attention + router + experts, rel=1e-3)
    assert again(cfg, "dots", TOKENS, jnp.float32).products < 1e-3 * found.products


def weights(cfg):
    return map_with_path(lambda _, spec: jax.ShapeDtypeStruct(spec.shape[1:], jnp.float32), param_specs(cfg)["blocks"])


def gradient(cfg, remat, attend, tokens):
    """The gradients of two scanned blocks as shapes, and their function."""

    def run(blocks, x, ids):
        batch = Batch(ids, ids, ids, ids, jnp.ones(ids.shape))
        ops = make_ops(attend=attend)({}).ops
        step = wrapper(parse(remat, sites(cfg)))(lambda x, p: (block(x, p, batch, cfg, ops), None))
        return jax.grad(lambda b: jnp.square(jax.lax.scan(step, x, b)[0]).sum())(blocks)

    x = jax.ShapeDtypeStruct((1, tokens, cfg.width), jnp.float32)
    return run, (abstract(param_specs(cfg)["blocks"]), x, jax.ShapeDtypeStruct((1, tokens), jnp.int32))


@pytest.mark.slow
def test_the_compiler_computes_the_same_again():
    """XLA counts the body of each loop once: what "full" adds to it is what one layer computes again, and some elementwise work."""

    def no_products(q, k, v, segments, **seen):
        return checkpoint_name(q * (k + v).repeat(q.shape[2] // k.shape[2], axis=2), "attn_out")

    cfg = dataclasses.replace(CFG, width=512, ffn=1024, head_width=128)
    found = {}
    for remat in ("none", "full"):
        run, shapes = gradient(cfg, remat, no_products, TOKENS)
        found[remat] = jax.jit(run).lower(*shapes).compile().cost_analysis()["flops"]
    assert found["full"] - found["none"] == pytest.approx(again(cfg, "full", TOKENS, jnp.float32).products, rel=0.02)


@pytest.mark.parametrize(("platform", "tokens", "times"), [("cpu", 64, 2.5), ("cpu", 4096, 2.5), ("tpu", 4096, 3.5)])
def test_products_of_an_attention_kernels_backward_pass(platform, tokens, times):
    assert attention_backward(platform, tokens, 8, 2, 128) == times
    assert attention_backward(platform, tokens, 8, 2, 128, mixed=True) == times + (platform == "tpu"), "a pass forward"


def test_the_tpus_attention_runs_forward_again_where_layers_differ():
    q, ids = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.float32), jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def gradients(q, ids, full):
        return jax.grad(lambda *qkv: jnp.square(splash.attend(*qkv, ids, Mask(64, None), full)).sum(), (0, 1, 2))(
            q, q, q
        )

    found = total(traced(gradients, q, ids, jax.ShapeDtypeStruct((), bool)), product_flops())
    assert found == pytest.approx(4 * 128**3 * (1 + attention_backward("tpu", 128, 1, 1, 128, mixed=True)), rel=0.01)


@pytest.mark.parametrize("remat", ["dots", "names"])
def test_the_tpus_attention_is_kept_and_computed_again_as_any_other(remat):
    """A layer's whole gradient with the real kernel, one head and one tile: products three times and again, attention once, 3.5 times and again."""
    cfg = dataclasses.replace(CFG, heads=1, kv_heads=1, head_width=128, layers=1)

    def attend(q, k, v, segments, *, window, softcap, full):
        return splash.attend(q, k, v, segments, Mask(window, softcap), full)

    run, shapes = gradient(cfg, remat, attend, 128)
    products = 2 * 128 * (4 * 128 * 128 + 3 * 128 * 320)
    rerun = again(cfg, remat, 128, jnp.float32)
    attention = 4 * 128 * 128 * 128 * (1 + 3.5 + rerun.attention)
    assert total(traced(run, *shapes), product_flops()) == pytest.approx(
        3 * products + rerun.products + attention, rel=2e-3
    )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_pipelines_passes_compute_again_what_the_policy_says(remat):
    """F once, the slice's F again with what B and W need, then B and W: two products each for one of F, and again what the policy did not keep."""

    def attend(q, k, v, segments, **seen):
        return checkpoint_name(q * (k + v).repeat(q.shape[2] // k.shape[2], axis=2), "attn_out")

    model = SliceModel(CFG, lambda product: make_ops(attend=attend, product=product), jnp.float32, jnp.float32, remat)
    x, ids = jax.ShapeDtypeStruct((1, TOKENS, 128), jnp.float32), jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    batch = Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct((1, TOKENS), jnp.float32))
    products = products_of(model, Slice(weights(CFG), {}, None), x, batch)
    piece = Slice(abstract(param_specs(CFG)["blocks"]), {}, None)

    def forward(piece, x, batch):
        return forward_slice(model, piece, x, batch).y_BTD

    def backward(piece, x, batch):
        out, saved = save_slice(model, products, piece, x, batch)
        d_x, others, cotangents = pull_slice(model, products, piece, saved, batch, Out(out.y_BTD, {}))
        return d_x, others, weight_gradients(model, products, piece, saved.inputs, cotangents, batch)

    first, rest = (total(traced(fn, piece, x, batch), product_flops()) for fn in (forward, backward))
    assert first == CFG.layers * sum(FLOPS.values())
    rerun = CFG.layers * again(CFG, remat, TOKENS, jnp.float32).products
    assert rest == first + rerun + 2 * first
