"""Experts over devices: every mesh is one device, and what crosses devices is what the formulas say."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from lmeff.config.schema import Experiment
from lmeff.config.validate import validate
from lmeff.core.errors import ConfigError
from lmeff.data.config import DataConfig
from lmeff.models.config import preset
from lmeff.models.moe import LETTERS, moe_layer, row_capacity
from lmeff.parallel.hlo import collectives
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.region import Kept, regional
from lmeff.parallel.seam import layout_ops
from tests.layouts.traffic import compared, step_of
from tests.layouts.trial import MODELS, ROWS, TOKENS, Mesh, assert_equals_one_device, make_batch, relative, run

EIGHT = Mesh(expert=8, model="capacity")
EIGHT_DROPLESS = Mesh(expert=8, model="experts")
CASES = [
    (EIGHT, "plain"),
    (EIGHT_DROPLESS, "plain"),
    (Mesh(expert=4, tensor=2, model="capacity", remat="names"), "plain"),
    (Mesh(expert=2, fsdp=2, tensor=2, model="experts", remat="full"), "weights"),
    (Mesh(data=2, expert=4, accumulate=2, model="experts"), "plain"),
    (Mesh(expert=2, fsdp=2, tensor=2, accumulate=2, model="capacity"), "plain"),
    (Mesh(data=2, expert=2, context=2, model="capacity"), "plain"),
]
SLOW = [
    (Mesh(expert=4, tensor=2, model="capacity", remat="names"), "mask"),
    (Mesh(data=2, expert=4, accumulate=2, model="experts"), "all"),
    (Mesh(expert=2, fsdp=2, tensor=2, accumulate=2, model="capacity"), "teacher"),
    (Mesh(data=2, expert=4, accumulate=2, model="capacity", remat="dots"), "all"),
    (Mesh(expert=4, tensor=2, model="experts"), "teacher"),
    (Mesh(expert=2, fsdp=2, tensor=2, accumulate=2, model="experts"), "weights"),
    (Mesh(data=2, expert=2, context=2, model="experts", remat="dots"), "mask"),
    (Mesh(expert=2, context=2, tensor=2, model="capacity"), "all"),
    (Mesh(data=2, fsdp=2, expert=2, zero=2, model="experts"), "plain"),
    (Mesh(data=2, fsdp=4, model="experts"), "plain"),
    (Mesh(fsdp=4, tensor=2, model="capacity", remat="names"), "weights"),
    (Mesh(dcn=2, fsdp=2, expert=2, model="capacity"), "mask"),
]


def name(mesh, feature):
    axes = [f"{axis}{size}" for axis, size in mesh.degrees.items()]
    more = [f"accumulate{mesh.accumulate}"] * (mesh.accumulate > 1) + [f"zero{mesh.zero}"] * (mesh.zero < 3)
    return "-".join([feature, *axes, *more, mesh.remat, mesh.model])


def one(mesh):
    return Mesh(model=mesh.model)


FAST = (CASES[0], CASES[1], CASES[6])
PARAMS = [pytest.param(*case, id=name(*case), marks=() if case in FAST else pytest.mark.slow) for case in CASES + SLOW]


@pytest.mark.parametrize(("mesh", "feature"), PARAMS)
def test_equals_one_device(mesh, feature):
    assert_equals_one_device(mesh, feature)
    told = run(one(mesh), feature).metrics[0]
    assert {"balance", "router_z"} <= told.keys()
    assert mesh.model != "capacity" or told["dropped"] > 0.1


@pytest.mark.parametrize(("mesh", "feature"), FAST, ids=[name(*case) for case in FAST])
def test_a_step_moves_what_the_formula_says_to_the_byte(mesh, feature):
    """Others are compared in `test_bytes_composed.py`."""
    got, want = compared(run(mesh, feature).text, step_of(mesh, feature))
    assert got == pytest.approx(want)


def layer_gradients(mesh):
    """Gradients of one layer's weights, and of a scale of its input, from inside a region over the batch axes."""
    cfg, layout = MODELS[mesh.model], mesh.layout
    random = np.random.default_rng(0)
    sizes = {**cfg.sizes, "B": ROWS, "T": TOKENS}
    p = {name: random.standard_normal([sizes[letter] for letter in LETTERS[name]]) for name in LETTERS}
    p = jax.tree.map(lambda w: (0.3 * w).astype(np.float32), {**p, "scale": random.standard_normal(cfg.width)})
    x, direction = (random.standard_normal((ROWS, TOKENS, cfg.width)).astype(np.float32) for _ in range(2))

    def loss(p, layout, batch, x, direction):
        scope = layout_ops(layout)({})
        moe = dataclasses.replace(cfg.moe, shared=0)
        y = moe_layer(layout.place(x * p["scale"], "BS_"), p, batch, cfg, moe, scope.ops)
        return (y * direction).sum() + sum(kept.sum() for kept in scope.close().values())

    def local(layout, p, _, rows, __):
        return jax.grad(loss)(p, layout, *rows), {}

    cuts = {name: layout.partition(LETTERS.get(name, "_")) for name in p}
    run = regional(local, layout, layout.axes("B"), (cuts, {}, {}))
    return jax.tree.map(
        np.asarray, jax.jit(lambda p, rows: run(p, {}, rows, {}, Kept(None, 0))[0])(p, (make_batch(), x, direction))
    )


@pytest.mark.parametrize("model", ["experts", "capacity"])
def test_a_layer_in_a_region_has_the_same_gradients(model):
    """With context and tensor parallelism inside, where JAX does not check what varies over the mesh."""
    want = layer_gradients(Mesh(model=model))
    for mesh in (Mesh(expert=2, context=2, tensor=2, model=model), Mesh(data=2, expert=4, model=model)):
        for name, gradient in layer_gradients(mesh).items():
            assert relative(gradient, want[name]) <= 1e-5, (mesh, name)


def test_experts_and_their_moments_lie_in_shards():
    mesh = CASES[3][0]
    shards = run(mesh, "weights").shards
    own = {path: found for path, found in shards.items() if path.endswith("['moe']['up']")}
    assert len(own) == 4, own  # the parameter, both moments, the kept gradient
    assert set(own.values()) == {((2, 8, 64, 32), (2, 4, 32, 16))}
    factors = {path: found for path, found in shards.items() if "['moe']['up'].value" in path}
    assert set(factors.values()) == {((2, 8, 4, 32), (2, 4, 4, 16))}


def crossings(mesh, feature="plain"):
    """Elements of each collective over the expert axis in the loops over layers, by kind, of arrays as wide as the model."""
    found: dict[str, list[int]] = {}
    width = MODELS[mesh.model].width
    for c in collectives(run(mesh, feature).text):
        if c.loop and any(shape[-1:] == (width,) for shape in c.shapes):
            found.setdefault(c.kind, []).append(c.elements)
    return found


def test_a_capacity_fixes_what_crosses_devices():
    """Two all-to-alls forward and two backward, each of E x rows x C x D numbers on a device, of which (e - 1) / e leave it."""
    cfg, rows = MODELS["capacity"], ROWS // EIGHT.expert
    slots = row_capacity(cfg.moe, TOKENS)
    assert slots == math.ceil(TOKENS * cfg.moe.top_k / cfg.moe.experts)
    numbers = cfg.moe.experts * rows * slots * cfg.width
    assert numbers == cfg.moe.capacity * cfg.moe.top_k * rows * TOKENS * cfg.width
    assert crossings(EIGHT)["all-to-all"] == [numbers] * 4


def test_without_a_capacity_tokens_go_to_all_devices_once():
    """An all-gather of e n D numbers and a reduce-scatter to n D forward, and the other way round backward; no all-to-all of buffers k times as large."""
    cfg = MODELS["experts"]
    tokens = ROWS // EIGHT_DROPLESS.expert * TOKENS
    found = crossings(EIGHT_DROPLESS)
    assert found["all-gather"] == [EIGHT_DROPLESS.expert * tokens * cfg.width] * 2
    assert found["reduce-scatter"] == [tokens * cfg.width] * 2
    assert "all-to-all" not in found


def test_experts_stay_where_they_are():
    cfg = MODELS["capacity"]
    for mesh in (EIGHT, EIGHT_DROPLESS):
        for c in collectives(run(mesh, "plain").text):
            assert not any(
                shape[-2:] in ((cfg.width, cfg.ffn), (cfg.ffn, cfg.width)) and len(shape) > 2 for shape in c.shapes
            ), c


def config(mesh, **changes):
    model = dataclasses.replace(preset("moe_tiny", vocab=512), **changes)
    return Experiment(name="x", model=model, mesh=mesh, data=DataConfig())


def test_experts_that_cannot_be_cut_are_refused():
    assert validate(config(MeshPlan(expert=4, data=2)), 8)
    with pytest.raises(ConfigError, match=r"E = 4 over expert = 8"):
        validate(config(MeshPlan(expert=8)), 8)
