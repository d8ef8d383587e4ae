"""The counter equals closed formulas, the compiler's count of an unrolled model, and what reports say; XLA's count of a loop does not."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from lmeff.compress.config import Prune, Quantize
from lmeff.core.batch import Batch
from lmeff.core.numerics import parse_format
from lmeff.core.ops import Numerics, make_ops
from lmeff.core.precision import parse
from lmeff.core.specs import abstract, count
from lmeff.core.tree import flatten
from lmeff.models.config import PRESETS, ModelConfig, MoE, preset
from lmeff.models.cost import flops_per_token
from lmeff.models.transformer import forward, param_specs, sites
from lmeff.plan.count import density, filled
from lmeff.plan.count import sites as count_sites
from lmeff.plan.jaxprs import product_flops, total, traced
from lmeff.plan.job import Shape
from lmeff.recipe.artifact import Recipe
from tests.models.families import FAMILIES
from tests.models.unrolled import products_only, unrolled

BASE = ModelConfig(vocab=384, width=128, layers=3, heads=8, kv_heads=8, ffn=320)
CFGS = {
    "dense": BASE,
    "grouped, untied": dataclasses.replace(BASE, kv_heads=2, tied=False),
    "plain ffn, biases": dataclasses.replace(BASE, activation="gelu", bias="all", norm="layer"),
    "window, wide heads": dataclasses.replace(BASE, window=24, head_width=32, qk_norm="head"),
    "experts": dataclasses.replace(BASE, moe=MoE(experts=8, top_k=2)),
    "experts with capacity": dataclasses.replace(BASE, moe=MoE(experts=8, top_k=2, capacity=1.25)),
    "shared experts": dataclasses.replace(BASE, moe=MoE(experts=8, top_k=3, shared=2)),
}
ROWS, TOKENS = 6, 64
SIZES = {"layers": 2, "heads": 4, "kv_heads": 2}
CFGS |= {name: dataclasses.replace(BASE, **(SIZES | changes)) for name, changes in FAMILIES.items()}
CFGS["gpt 2"] = dataclasses.replace(CFGS["gpt 2"], context=TOKENS)


def formula(cfg, rows, tokens):
    """(products, attention counted full) by hand: 2 FLOPs a weight and token."""
    d, f, heads = cfg.width, cfg.ffn, cfg.head_size * (2 * cfg.heads + 2 * cfg.kv_heads)
    matrices = 3 if cfg.gated else 2
    if cfg.moe is None:
        ffn = matrices * d * f
    else:
        each = cfg.moe.top_k
        if cfg.moe.capacity is not None:
            each = cfg.moe.experts * math.ceil(cfg.moe.capacity * tokens * each / cfg.moe.experts) / tokens
        ffn = matrices * d * f * (each + cfg.moe.shared) + d * cfg.moe.experts
    products = 2 * rows * tokens * (cfg.layers * (d * heads + ffn) + d * cfg.vocab)
    return products, 4 * rows * cfg.layers * tokens * tokens * cfg.heads * cfg.head_size


@pytest.mark.parametrize(("name", "parameters"), [("llama3_8b", 8_030_261_248), ("llama3_70b", 70_553_706_496)])
def test_parameters_of_llama_3(name, parameters):
    assert count(param_specs(preset(name))) == parameters


@pytest.mark.parametrize("cfg", CFGS.values(), ids=CFGS)
def test_equals_the_formula(cfg):
    found = count_sites(Shape(cfg=cfg), ROWS, TOKENS)
    products, attention = formula(cfg, ROWS, TOKENS)
    assert sum(site.flops for site in found if site.kind == "product") == products
    assert sum(site.flops for site in found if site.kind == "attention") == attention
    windows = [cfg.window if cfg.window and layer not in cfg.full_layers else TOKENS for layer in range(cfg.layers)]
    seen = sum(min(t + 1, window) for t in range(TOKENS) for window in windows) / cfg.layers / TOKENS**2
    assert [site.visible for site in found if site.kind == "attention"] == pytest.approx([seen], rel=1e-12)
    assert sum(site.flops for site in found if site.kind == "lookup") == 0


@pytest.mark.parametrize("cfg", CFGS.values(), ids=CFGS)
def test_names_are_those_of_the_model(cfg):
    found = [site.name for site in count_sites(Shape(cfg=cfg), 1, TOKENS) if site.equation]
    assert set(found) - {"moe.router"} == set(sites(cfg))
    assert len(found) == len(set(found))


def by_hand(cfg):
    """Parameters, counted leaf by leaf."""
    d, heads, kv_heads, c = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_size
    attention = 2 * d * c * (heads + kv_heads)
    attention += {"none": 0, "qkv": (heads + 2 * kv_heads) * c, "all": (heads + 2 * kv_heads) * c + d}[cfg.bias]
    attention += {None: 0, "head": 2 * c, "width": (heads + kv_heads) * c}[cfg.qk_norm]
    ffn = (3 if cfg.gated else 2) * d * cfg.ffn + (cfg.ffn + d) * (cfg.bias == "all")
    if cfg.moe is not None:
        ffn = cfg.moe.experts * (ffn + d)
    norm = d * (2 if cfg.norm == "layer" else 1)
    norms = norm * (4 if cfg.norm_at == "both" else 2)
    ends = d * (cfg.vocab * (1 if cfg.tied else 2) + (cfg.context or 0 if cfg.positions == "learned" else 0))
    return cfg.layers * (attention + ffn + norms) + norm + ends


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_families_are_those_counted_by_hand(name):
    cfg = CFGS[name]
    assert count(param_specs(cfg)) == by_hand(cfg)
    found = count_sites(Shape(cfg=cfg), 1, TOKENS)
    flops = sum(site.flops * site.visible for site in found) / TOKENS
    assert flops == pytest.approx(flops_per_token(cfg, TOKENS), rel=1e-4), (
        "which rounds attention to whole FLOPs a layer"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_reports_say_the_same(name):
    """`models.cost.flops_per_token`, which comparison tables show, is this count by token."""
    cfg = preset(name)
    found = count_sites(Shape(cfg=cfg), 1, 2048)
    assert sum(site.flops * site.visible for site in found) / 2048 == pytest.approx(
        flops_per_token(cfg, 2048), rel=1e-9
    )


def test_reports_count_no_empty_slots():
    cfg = CFGS["experts with capacity"]
    found = count_sites(Shape(cfg=cfg), 1, TOKENS)
    useful = sum(site.flops * site.visible * filled(cfg, site.name, TOKENS) for site in found)
    assert filled(cfg, "moe.up", TOKENS) == 0.8
    assert useful / TOKENS == pytest.approx(flops_per_token(cfg, TOKENS), rel=1e-9)


LARGE = ModelConfig(vocab=1024, width=512, layers=2, heads=4, kv_heads=2, ffn=1024, tied=False)


def compiled_flops(fn, cfg, tokens=32):
    shapes = abstract(param_specs(cfg)), jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    return jax.jit(fn).lower(*shapes).compile().cost_analysis()["flops"]


def test_three_times_the_count_is_the_compilers_for_forward_and_backward_unrolled():
    """Of the forward pass alone `tests/models/test_cost.py` shows it."""

    def run(params, tokens):
        return jax.grad(lambda p: jnp.square(unrolled(LARGE, p, tokens)).sum())(params)

    found = sum(site.flops for site in count_sites(Shape(cfg=LARGE), 2, 32))
    assert compiled_flops(run, LARGE) == pytest.approx(3 * found, rel=0.01)


def test_the_compilers_count_of_a_loop_is_wrong():
    """XLA counts a scanned body once, so 16 layers cost it as much as 4. The walk over the traced program and the counter know better."""

    def scanned(params, tokens, cfg):
        batch = Batch(tokens, *[jnp.ones_like(tokens)] * 4)
        return forward(params, batch, cfg, make_ops=make_ops(attend=products_only)).hidden_BTD

    xla, walked, counted = {}, {}, {}
    for layers in (4, 16):
        cfg = dataclasses.replace(BASE, layers=layers)
        run = functools.partial(scanned, cfg=cfg)
        shapes = abstract(param_specs(cfg)), jax.ShapeDtypeStruct((2, 32), jnp.int32)
        xla[layers] = compiled_flops(run, cfg)
        walked[layers] = total(traced(run, *shapes), product_flops())
        counted[layers] = sum(site.flops for site in count_sites(Shape(cfg=cfg), 2, 32) if site.name != "head")
    assert xla[4] == pytest.approx(xla[16], rel=1e-3)
    assert counted[16] == 4 * counted[4]
    assert walked == counted


def test_bytes_are_those_of_the_compute_dtype_and_the_logits_those_of_the_output():
    cfg, policy = CFGS["grouped, untied"], parse("compute=bfloat16,output=float32")
    found = {site.name: site for site in count_sites(Shape(cfg=cfg), ROWS, TOKENS, policy=policy, accumulate=3)}
    up, head, embed = found["mlp.up"], found["head"], found["embed"]
    assert up.reads == {"activation": 2 * 3 * ROWS * TOKENS * 128, "weight": 2 * 3 * 128 * 320 * 3}
    assert up.writes == 2 * 3 * ROWS * TOKENS * 320
    assert (up.format, up.layers, up.equation) == ("bfloat16", 3, "BTD,DF->BTF")
    assert (head.format, head.writes) == ("float32", 4 * ROWS * TOKENS * 384)
    assert embed.reads["weight"] == embed.writes == 2 * ROWS * TOKENS * 128


def test_packed_weights_are_read_as_codes_and_scales():
    recipe = Recipe(
        transforms=(Quantize(rules=((r"blocks/.*/(w.|up|gate|down)", "int4/g32"), (".*", None))),), packed=True
    )
    coded = dataclasses.replace(recipe, numerics=Numerics(tuple((site, parse_format("int8")) for site in ("mlp.up",))))
    plain, both = ({s.name: s for s in count_sites(Shape(cfg=BASE, recipe=r), 1, TOKENS)} for r in (recipe, coded))
    codes, scales = 128 * 320 / 2, 128 / 32 * 320 * 4
    assert plain["mlp.up"].reads["weight"] == 3 * (codes + scales)
    assert (plain["mlp.up"].format, both["mlp.up"].format) == ("float32", "int8")
    assert plain["mlp.up"].reads["activation"] == 4 * both["mlp.up"].reads["activation"]
    assert plain["mlp.up"].flops == both["mlp.up"].flops
    rules = ((r"blocks/.*/(w.|up|gate|down)", "fp8"), (".*", None))
    floating = dataclasses.replace(coded, transforms=(Quantize(rules=rules),))  # such codes are no integers to sum
    up = next(s for s in count_sites(Shape(cfg=BASE, recipe=floating), 1, TOKENS) if s.name == "mlp.up")
    assert (up.format, up.reads) == (
        "float32",
        {"activation": 3 * 4 * TOKENS * 128, "weight": 3 * (128 * 320 + 320 * 4)},
    )


def test_density_is_what_the_masks_leave():
    shape = Shape(cfg=BASE, recipe=Recipe(transforms=(Prune(sparsity=0.3), Prune(pattern="2:4"), Quantize())))
    matrices = {path for path, spec in flatten(param_specs(BASE)).items() if spec.is_matmul and path != "embed/table"}
    assert density(shape) == dict.fromkeys(matrices, 0.5)
    found = {site.name: site.dense for site in count_sites(shape, 1, TOKENS)}
    assert {name for name, dense in found.items() if dense == 0.5} == {*sites(BASE)} - {"head"}


def test_a_second_call_counts_nothing():
    shape = Shape(cfg=preset("llama3_70b"))
    assert count_sites(shape, 8, 8192) is count_sites(Shape(cfg=preset("llama3_70b")), 8, 8192)
