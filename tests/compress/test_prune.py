"""Masks: counts, order and schedule against sorting oracles, and what they cost on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.base import State
from lmeff.compress.config import MATRICES, Prune, build
from lmeff.compress.prune import Ramp, bisect, largest, largest_in_groups, magnitude_pruning
from lmeff.core.specs import ParamSpec, initialize
from lmeff.core.tree import flatten
from lmeff.models.config import preset
from lmeff.models.transformer import param_specs
from lmeff.parallel.hlo import collectives
from lmeff.parallel.mesh import MeshPlan, make_layout, shardings

CFG = preset("tiny")
SPECS = param_specs(CFG)
RULES = (("blocks/(attn/wo|mlp/up)", True), (".*", False))


def weights(kind, shape, dtype=jnp.float32):
    w = jax.random.normal(jax.random.key(len(shape)), shape)
    if kind == "ties":
        w = jnp.round(w * 2) / 2
    if kind == "equal":
        w = jnp.full(shape, -0.25)
    if kind == "mostly zero":
        w = jnp.where(jax.random.uniform(jax.random.key(1), shape) < 0.8, 0.0, w)
    if kind == "wide":
        w = w * jnp.exp(20 * jax.random.normal(jax.random.key(2), shape))
    return w.astype(dtype)


def oracle(w, keep):
    """A stable sort by falling magnitude: ties go to the lower index."""
    flat = np.abs(np.asarray(w, np.float32)).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    return mask.reshape(w.shape)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "mostly zero", "wide"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bisection_is_the_sort(kind, dtype):
    w = weights(kind, (3, 10, 4, 7), dtype)
    mask = jax.jit(lambda w, keep: largest(w, keep, (-3, -2, -1)))
    for keep in (0, 1, 100, 279, 280):
        got = np.asarray(mask(w, jnp.int32(keep)))
        for layer in range(3):
            assert np.array_equal(got[layer], oracle(w[layer], keep)), (keep, layer)


def test_bisection_never_asks_outside_its_interval():
    asked = []

    def holds(i):
        jax.debug.callback(lambda i: asked.append(int(i)), i)
        return i >= 5

    assert int(bisect(holds, jnp.int32(-2), jnp.int32(9), 8)) == 5
    assert int(bisect(lambda i: i >= -1, jnp.int32(-2), jnp.int32(0x7F800000), 32)) == -1
    assert int(bisect(lambda i: i >= 0x7F800000, jnp.int32(-2), jnp.int32(0x7F800000), 32)) == 0x7F800000
    jax.effects_barrier()
    assert asked


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize(("keep", "size"), [(2, 4), (1, 4), (4, 8), (3, 3)])
def test_each_group_keeps_exactly_n_of_m(kind, keep, size):
    for axis in (-3, -2, -1):
        w = weights(kind, (2, 24, 24, 24))
        got = np.moveaxis(np.asarray(largest_in_groups(w, jnp.int32(keep), axis, size)), axis, -1)
        groups = np.moveaxis(np.asarray(w), axis, -1).reshape(-1, size)
        got = got.reshape(-1, size)
        assert np.all(got.sum(1) == keep)
        order = np.argsort(-np.abs(groups), axis=1, kind="stable")
        want = np.zeros_like(got)
        np.put_along_axis(want, order[:, :keep], True, axis=1)
        assert np.array_equal(got, want)


def test_the_pattern_runs_along_the_last_contracted_dim():
    params = initialize(jax.random.key(0), SPECS)
    compression = build((Prune(pattern="1:4", rules=RULES),))
    shown = compression.apply(params, compression.init(params, SPECS))
    up_LDF, wo_LHCD = shown["blocks"]["mlp"]["up"], shown["blocks"]["attn"]["wo"]
    assert np.all((np.asarray(up_LDF) != 0).reshape(2, 8, 4, 64).sum(2) == 1)
    assert np.all((np.asarray(wo_LHCD) != 0).reshape(2, 4, 2, 4, 32).sum(3) == 1)


def test_cubic_schedule():
    ramp = Ramp(0.8, begin=10, end=50, every=20)
    assert ramp.updates == [10, 30, 50]
    assert [ramp.at(t) for t in (0, 9, 10, 29)] == [0, 0, 0, 0]
    assert ramp.at(30) == ramp.at(49) == pytest.approx(0.8 * (1 - 0.5**3))
    assert ramp.at(50) == ramp.at(10**6) == 0.8
    assert ramp.kept(1000) == [1000, 300, 200]
    assert Ramp(0.8, begin=10, end=45, every=20).updates == [10, 30, 45]
    assert Ramp(0.5, begin=7, end=7).updates == [7]
    assert Ramp(0.5).updates == [0]
    assert Ramp(0.5).at(0) == 0.5


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"pattern": (1, 4)}])
def test_masks_follow_the_schedule_inside_jit(options):
    ramp = Ramp(0.75, begin=2, end=9, every=3)
    specs = {"a": ParamSpec(letters="LDF", shape=(2, 8, 9), contract="D")}
    params = initialize(jax.random.key(0), specs)
    compression = magnitude_pruning(ramp, **options)
    state = jax.jit(lambda p: compression.init(p, specs))(params)
    update = jax.jit(compression.update)
    size = 4 if "pattern" in options else 144 if "scope" in options else 72
    for step in range(1, 14):
        other = jax.tree.map(lambda w, step=step: jnp.roll(w, step), params)
        before, state = state, state._replace(auxiliary=update(other, params, state, jnp.int32(step)))
        keep = np.asarray(state.auxiliary["a"].value.keep)
        want = (size - round(ramp.at(step) * size)) / size
        assert keep.mean() == pytest.approx(want, abs=1e-9), step
        same = np.array_equal(keep, before.auxiliary["a"].value.keep)
        assert same or step in ramp.updates


def test_one_shot_masks_are_made_at_once_and_stay():
    params = initialize(jax.random.key(0), SPECS)
    compression = build((Prune(sparsity=0.5, rules=RULES),))
    state = compression.init(params, SPECS)
    moved = jax.tree.map(lambda w: jnp.flip(w, -1), params)
    updated = compression.update(moved, params, state, jnp.int32(3))
    assert all(a is b for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(state.auxiliary), strict=True))
    assert not np.all(flatten(state.auxiliary[0])["blocks/mlp/up"].value.keep)


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9, 0.999])
def test_sparsity_is_reached_in_every_layer(sparsity):
    params = initialize(jax.random.key(0), SPECS)
    compression = build((Prune(sparsity=sparsity, rules=RULES),))
    masks = flatten(jax.jit(lambda p: compression.init(p, SPECS))(params).auxiliary[0])
    assert set(masks) == {"blocks/attn/wo", "blocks/mlp/up"}
    for entry in masks.values():
        assert entry.value.keep.dtype == bool
        for layer in np.asarray(entry.value.keep):
            assert abs((1 - layer.mean()) - sparsity) <= 1 / layer.size


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "mostly zero"])
def test_global_scope_is_one_sort_over_all_leaves(kind):
    specs = {
        "a": ParamSpec(letters="LDF", shape=(3, 10, 7), contract="D"),
        "b": ParamSpec(letters="VD", shape=(11, 13), contract="D"),
    }
    params = {path: weights(kind, spec.shape) * (1 + (path == "b")) for path, spec in specs.items()}
    for sparsity in (0.0, 0.31, 0.5, 0.97):
        compression = magnitude_pruning(Ramp(sparsity), scope="global")
        masks = jax.jit(lambda p, c=compression: c.init(p, specs))(params).auxiliary
        got = np.concatenate([np.asarray(masks[path].value.keep).ravel() for path in specs])
        everything = np.concatenate([np.asarray(params[path]).ravel() for path in specs])
        assert np.array_equal(got, oracle(everything, everything.size - round(sparsity * everything.size)))


def test_global_counts_beyond_int32():
    # 5 billion weights as a spec: the target's shares and rest are exact integers of the host.
    ramp = Ramp(0.3, end=10)
    wanted, share = ramp.kept(32 * 4096 * 40_000), ramp.kept(4096 * 40_000)
    assert all(abs(total - 32 * own) <= 32 for total, own in zip(wanted, share, strict=True))
    specs = {"a": ParamSpec(letters="LDF", shape=(32, 4096, 40_000), contract="D")}
    params = {"a": jax.ShapeDtypeStruct(specs["a"].shape, jnp.float32)}
    compression = magnitude_pruning(ramp, scope="global")
    state = jax.eval_shape(lambda p: compression.init(p, specs), params)
    jax.eval_shape(compression.update, params, params, state, jax.ShapeDtypeStruct((), jnp.int32))


def test_pruned_weights_keep_their_value_and_get_no_gradient():
    params = initialize(jax.random.key(0), SPECS)
    compression = build((Prune(sparsity=0.5, rules=RULES),))
    state = compression.init(params, SPECS)
    grads = jax.grad(lambda p: sum(jnp.sum(3 * x) for x in jax.tree.leaves(compression.apply(p, state))))(params)
    keep = np.asarray(flatten(state.auxiliary[0])["blocks/mlp/up"].value.keep)
    assert np.array_equal(grads["blocks"]["mlp"]["up"], np.where(keep, 3.0, 0.0))
    assert np.all(np.asarray(grads["embed"]["table"]) == 3)


def test_a_weight_that_is_not_a_number_is_masked_like_a_zero():
    w = jnp.array([[jnp.nan, 1.0], [2.0, 3.0]])
    mask = jnp.array([[False, True], [True, True]])
    compression = magnitude_pruning(Ramp(0.25))
    specs = {"a": ParamSpec(letters="DF", shape=(2, 2), contract="D")}
    state = compression.init({"a": jnp.ones((2, 2))}, specs)
    entry = state.auxiliary["a"]
    state = State({}, {"a": entry._replace(value=type(entry.value)(mask, entry.value.axes, entry.value.inner))})
    assert np.array_equal(compression.apply({"a": w}, state)["a"], [[0.0, 1.0], [2.0, 3.0]])


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": 0.5, "scope": "global"}, {"pattern": "2:4"}])
def test_no_weight_is_gathered_on_a_mesh(options):
    """What moves between devices is counts: one number a layer for each halving, or for one of all layers."""
    layout = make_layout(MeshPlan(fsdp=4, tensor=2))
    random = initialize(jax.random.key(0), SPECS)
    params = jax.device_put(random, shardings(random, SPECS, layout))
    compression = build((Prune(end=9, rules=((MATRICES, True), (".*", False)), **options),))
    init = functools.partial(compression.init, specs=SPECS)
    out = shardings(jax.eval_shape(init, params), SPECS, layout)
    state = jax.jit(init, out_shardings=out)(params)
    update = jax.jit(lambda p, s, t: compression.update(p, p, s, t), out_shardings=out.auxiliary)
    text = update.lower(params, state, jnp.int32(1)).compile().as_text()
    moved = collectives(text)
    if "pattern" in options:
        assert moved == []  # groups lie within a shard
    else:
        assert {c.kind for c in moved} == {"all-reduce"}
        assert max(c.largest for c in moved) <= CFG.layers * len(flatten(state.auxiliary[0]))
    assert " sort(" not in text
