"""The laws of weight transforms: every member x every law, bit for bit wherever a law says equal."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lmeff.compress.base import State, chain
from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.core.numerics import QTensor, is_qtensor, materialize, parse_format
from lmeff.core.ops import FLOATING, Numerics
from lmeff.core.specs import abstract, initialize
from lmeff.core.tree import flatten
from lmeff.models.config import preset
from lmeff.models.transformer import forward, identity_view, param_specs, project, sites
from lmeff.parallel.mesh import MeshPlan, make_layout, shardings
from lmeff.parallel.seam import layout_ops
from lmeff.train.state import with_shardings
from tests.laws.members import MEMBERS, NEUTRAL, pruned_and_quantized, quantize

CFG = preset("tiny")
SPECS = param_specs(CFG)
LAYOUTS = {
    "one device": make_layout(MeshPlan(), jax.devices()[:1]),
    "fsdp x tensor": make_layout(MeshPlan(fsdp=4, tensor=2)),
    "data x fsdp x tensor": make_layout(MeshPlan(data=2, fsdp=2, tensor=2)),
}
STEP = 2

each_member = pytest.mark.parametrize("name", MEMBERS)
# One mesh cuts every letter that can be cut; the members that count over whole leaves see another one too.
MESHES = [(name, "data x fsdp x tensor") for name in MEMBERS]
MESHES += [(name, "fsdp x tensor") for name in ("prune globally", "prune and quantize every matrix")]


class Seen(NamedTuple):
    """What a member makes of the parameters: its state after an update, and the weights seen, seen twice and packed."""

    state: Any
    weights: Any
    twice: Any
    packed: Any


def run(compression, params):
    """Initial state, an update after step `STEP` with other weights, learned factors moved off 1, then all three views."""
    state = compression.init(params, SPECS)
    moved = jax.tree.map(lambda w: w * jnp.sin(w * 1e3), params)
    state = state._replace(auxiliary=compression.update(moved, params, state, jnp.int32(STEP)))
    state = state._replace(trainable=jax.tree.map(lambda factor: factor * 0.7813, state.trainable))
    weights = compression.apply(params, state)
    return Seen(state, weights, compression.apply(weights, state), compression.export(params, state))


@functools.cache
def random_params():
    params = jax.jit(lambda key: initialize(key, SPECS))(jax.random.key(0))
    # A dead output channel (scale of an empty range), equal weights (ties) and a channel of one sign.
    w = params["blocks"]["mlp"]["up"]
    w = w.at[0, :, 3].set(0.0).at[1, :16, 5:9].set(0.01).at[1, :, 4].set(jnp.abs(w[1, :, 4]))
    params["blocks"]["mlp"]["up"] = w
    return params


@functools.cache
def seen(name, layout="one device"):
    """One compile for each member and layout serves most laws."""
    place = LAYOUTS[layout]
    params = jax.device_put(random_params(), shardings(random_params(), SPECS, place))
    fn = functools.partial(run, MEMBERS[name])
    out = shardings(jax.eval_shape(fn, params), SPECS, place)
    return jax.jit(fn, out_shardings=out)(params)


def assert_equal(got, want):
    """Same structure (static fields included), dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype, path
        g, w = np.asarray(g), np.asarray(w)
        np.testing.assert_array_equal(g, w, err_msg=jax.tree_util.keystr(path))
        if np.issubdtype(g.dtype, np.floating):
            np.testing.assert_array_equal(np.signbit(g), np.signbit(w), err_msg=jax.tree_util.keystr(path))


def spec_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@each_member
def test_1_export_is_what_apply_shows(name):
    made = seen(name)
    assert_equal(materialize(made.packed), made.weights)
    changed = [not np.array_equal(a, b) for a, b in zip(leaves(made.weights), leaves(random_params()), strict=True)]
    assert any(changed) == (name != "identity")  # the laws are about something


def leaves(tree):
    return jax.tree.leaves(tree)


def batch():
    rows, length = 2, 12
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, CFG.vocab)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    ones = jnp.ones((rows, length), jnp.int32)
    return Batch(tokens, tokens, ones, positions, ones.astype(jnp.float32))


def logits(params, rows, numerics, view=identity_view, state=()):
    make_ops = layout_ops(LAYOUTS["one device"], numerics)
    out = forward(params, rows, CFG, make_ops=make_ops, view=view, view_state=state)
    return project(out.hidden_BTD, out.head, CFG, make_ops({}).ops)


@each_member
def test_2_packed_integers_serve_what_training_saw(name):
    """Weight-only, and with int8 activations everywhere, whose scales are found token by token."""
    made, compression = seen(name), MEMBERS[name]
    integer = Numerics(tuple((site, parse_format("int8")) for site in sites(CFG)))

    @jax.jit
    def both(params, state, packed, rows):
        return [
            (logits(packed, rows, numerics), logits(params, rows, numerics, compression.apply, state))
            for numerics in (FLOATING, integer)
        ]

    for served, trained in both(random_params(), made.state, made.packed, batch()):
        assert float(jnp.abs(served - trained).max() / jnp.abs(trained).max()) < 1e-6


@each_member
def test_3_runs_on_specs(name):
    made = jax.eval_shape(functools.partial(run, MEMBERS[name]), abstract(SPECS))
    want = spec_of(seen(name))
    assert jax.tree.structure(made) == jax.tree.structure(want)
    assert jax.tree.leaves(made) == jax.tree.leaves(want)


@each_member
def test_4_keeps_structure_and_shardings(name):
    made = seen(name, "data x fsdp x tensor")
    params = random_params()
    placed = jax.device_put(params, shardings(params, SPECS, LAYOUTS["data x fsdp x tensor"]))
    shown = jax.jit(MEMBERS[name].apply)(placed, made.state)
    assert jax.tree.structure(shown) == jax.tree.structure(placed)
    for got, want in zip(leaves(shown), leaves(placed), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


@pytest.mark.parametrize("name", NEUTRAL)
def test_5_neutral_members_change_no_bit(name):
    made = jax.jit(functools.partial(run, NEUTRAL[name]))(random_params())
    assert_equal(made.weights, random_params())
    assert_equal(made.packed, random_params())


@each_member
def test_6_applying_twice_is_applying_once(name):
    assert_equal(seen(name).twice, seen(name).weights)


@pytest.mark.parametrize(("name", "layout"), MESHES)
def test_7_every_mesh_makes_the_same_bits(name, layout):
    assert_equal(seen(name, layout), seen(name))


@each_member
def test_8_stacked_layers_are_layer_by_layer(name):
    made, apply = seen(name), MEMBERS[name].apply

    @jax.jit
    def both(blocks, state):
        layers = [apply(*jax.tree.map(lambda x, i=i: x[i], (blocks, state))) for i in range(CFG.layers)]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *layers), jax.vmap(apply)(blocks, state)

    looped, mapped = both(random_params()["blocks"], State(*(block_state(part) for part in made.state)))
    assert_equal(looped, made.weights["blocks"])
    assert_equal(mapped, made.weights["blocks"])


def block_state(part):
    return tuple(block_state(p) for p in part) if isinstance(part, tuple) else part.get("blocks", {})


@each_member
def test_9_eager_is_jit_and_nothing_is_traced_twice(name):
    compression = MEMBERS[name]
    assert_equal(run(compression, random_params()), seen(name))
    traces = []

    @jax.jit
    def step(params, state, number):
        traces.append(1)
        auxiliary = compression.update(params, params, state, number)
        return (
            compression.apply(params, State(state.trainable, auxiliary)),
            State(state.trainable, auxiliary),
            number + 1,
        )

    state, number = jax.jit(lambda p: compression.init(p, SPECS))(random_params()), jnp.int32(0)
    params = random_params()
    for _ in range(3):
        params, state, number = step(params, state, number)
    assert len(traces) == 1


@each_member
def test_10_state_survives_a_checkpoint_and_a_change_of_mesh(name, tmp_path):
    made = seen(name, "data x fsdp x tensor")
    arrays = {"state": made.state, "packed": made.packed}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", arrays)
        checkpointer.wait_until_finished()
        target = with_shardings(spec_of(arrays), SPECS, LAYOUTS["fsdp x tensor"])
        restored = checkpointer.restore(tmp_path / "saved", target)
    assert_equal(restored, arrays)
    for got, want in zip(leaves(restored), leaves(target), strict=True):
        assert got.sharding == want.sharding


def test_11_quantization_before_anything_else_is_refused():
    with pytest.raises(ConfigError, match=r"member 0 of 2 packs the weights .* Put it last"):
        chain(quantize("int8"), MEMBERS["prune"])
    with pytest.raises(ConfigError, match=r"member 1 of 3"):
        chain(MEMBERS["prune"], quantize("int8"), quantize("int4"))


@pytest.mark.parametrize("format", ["int8", "int8-affine", "int4-affine/g8", "int3/tensor", "fp8"])
def test_11_masked_weights_are_zero_on_the_grid(format):
    compression = pruned_and_quantized(format, sparsity=0.5)
    made = jax.jit(functools.partial(run, compression))(random_params())
    masks = flatten(made.state.auxiliary[0])
    assert masks
    for path, entry in masks.items():
        packed = flatten(made.packed)[path]
        gone = ~np.asarray(entry.value.keep)
        assert gone.sum() == gone.size // 2
        assert is_qtensor(packed)
        assert not np.any(np.asarray(materialize(packed))[gone])
        assert np.array_equal(np.asarray(packed.q)[gone], zero_codes(packed)[gone])


def zero_codes(packed: QTensor):
    ones = QTensor(
        jnp.zeros_like(packed.q), jnp.ones_like(packed.scale), packed.zero, packed.format, packed.axes, "float32"
    )
    return -np.asarray(materialize(ones)).astype(np.int8)  # (0 - zero) * 1
