"""A cut model is the big one with zeros in it: the same logits, the same training, in every variant; and every bad input is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.base import LeafTransform, chain, identity, only, per_leaf
from lmeff.compress.importance import scores
from lmeff.compress.prune import Ramp, magnitude_pruning
from lmeff.compress.quantize import fake_quantization
from lmeff.compress.shrink import Plan, ShrinkConfig, apply_masks, describe, masked, plan, shrink, smaller
from lmeff.core.errors import ConfigError
from lmeff.core.numerics import materialize, parse_format, quantize
from lmeff.core.precision import Policy
from lmeff.core.specs import count, initialize
from lmeff.core.tree import flatten, map_with_path
from lmeff.distill.objectives import Projection, head_objective
from lmeff.models.config import ModelConfig
from lmeff.models.cost import flops_per_token
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout, shardings
from lmeff.train.optim import OPTIMIZERS, OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import build_state, create_state
from lmeff.train.step import make_train_step
from tests.compress.structure import ONE, SMALL, logits, make_batch, make_model

VARIANTS = {
    "grouped, gated, tied": {},
    "untied, plain, biases, layer norms, head norms": {
        "activation": "gelu",
        "bias": "all",
        "tied": False,
        "qk_norm": "head",
        "norm": "layer",
    },
    "multi-head, gelu gate, head norms": {"kv_heads": 4, "activation": "geglu", "qk_norm": "head", "bias": "all"},
    "multi-query, own head width": {"kv_heads": 1, "head_width": 6, "tied": False, "window": 5},
    "windows by layer, norms on both sides": {
        "layers": 4,
        "window": 3,
        "full_layers": (1, 3),
        "rope_local_theta": 100.0,
        "norm_at": "both",
        "norm_plus_one": True,
        "bias": "qkv",
    },
    "learned positions, norms after": {"positions": "learned", "context": 16, "norm_at": "post", "bias": "attention"},
}
PRODUCTS = {
    "grouped, gated, tied": {"ffn": 9, "kv_heads": 1, "queries": 1, "layers": 2},
    "untied, plain, biases, layer norms, head norms": {"ffn": 16, "kv_heads": 1, "layers": 2},
    "multi-head, gelu gate, head norms": {"ffn": 5, "kv_heads": 3, "layers": 1},
    "multi-query, own head width": {"ffn": 8, "queries": 3, "layers": 2},
    "windows by layer, norms on both sides": {"ffn": 9, "kv_heads": 1, "layers": 3},
    "learned positions, norms after": {"ffn": 9, "queries": 1, "layers": 2},
}
SINGLES = [{"ffn": 11}, {"kv_heads": 1}, {"queries": 1}, {"layers": 2}]


def random_plan(cfg, sizes, seed=0):
    config = ShrinkConfig(**sizes, importance="random", seed=seed)
    return plan(config, cfg, scores("random", cfg, None, (), ONE, seed=seed))


@functools.cache
def variant(name):
    return make_model(**VARIANTS[name])


CASES = [*PRODUCTS.items(), *(("grouped, gated, tied", sizes) for sizes in SINGLES)]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_masked_equals_shrunk(name, sizes):
    cfg, params = variant(name)
    cut = random_plan(cfg, sizes)
    new, small, _ = shrink(cfg, params, None, cut)
    assert {path: x.shape for path, x in flatten(small).items()} == {
        path: spec.shape for path, spec in flatten(param_specs(new)).items()
    }
    assert new == smaller(cfg, cut)
    if not cfg.mixed:  # else which layers see all is known by the plan alone
        assert new == ShrinkConfig(**sizes).apply(cfg)
    batch = make_batch()
    whole = logits(cfg, params, batch)
    want = logits(cfg, apply_masks(params, masked(cfg, cut)), batch)
    got = logits(new, small, batch)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(whole - want).max() > 1e-2  # the cut does change the model


@pytest.mark.parametrize("kept", [(0, 2), (1, 3), (0, 3), (1, 2, 3)])
def test_layers_that_stay_see_what_they_saw(kept):
    """Also where all that stay see all, or none does."""
    cfg, params = variant("windows by layer, norms on both sides")
    cut = Plan(layers=np.array(kept))
    new, small, _ = shrink(cfg, params, None, cut)
    want = logits(cfg, apply_masks(params, masked(cfg, cut)), make_batch())
    np.testing.assert_allclose(logits(new, small, make_batch()), want, atol=1e-5)
    assert new.mixed == (len({layer in cfg.full_layers for layer in kept}) == 2)
    first = ShrinkConfig(layers=len(kept)).apply(cfg)
    assert first == smaller(cfg, Plan(layers=np.arange(len(kept))))


def test_heads_are_cut_from_norms_over_all_of_them():
    cfg, params = make_model(qk_norm="width", kv_heads=4)
    cut = Plan(groups=np.array([[0, 2], [1, 3], [0, 1]]), heads=np.array([[0, 2], [1, 3], [0, 1]]))
    new, small, _ = shrink(cfg, params, None, cut)
    assert (new.heads, new.kv_heads, new.head_size) == (2, 2, cfg.head_size)
    for name, kept in (("q_norm", cut.heads), ("k_norm", cut.groups)):
        whole = params["blocks"]["attn"][name]
        np.testing.assert_array_equal(small["blocks"]["attn"][name], [w[k] for w, k in zip(whole, kept, strict=True)])
    assert np.isfinite(logits(new, small, make_batch())).all()


def test_describe_and_size():
    cfg, params = variant("grouped, gated, tied")
    cut = Plan(
        layers=np.array([0, 2]),
        neurons=np.array([np.r_[0:4, 6:24], np.r_[2:24]]),
        groups=np.array([[1], [0]]),
        heads=np.array([[2, 3], [0, 1]]),
    )
    rows = {row[0]: row[1:] for row in describe(cut, cfg)}
    assert rows["layers"] == ("3", "2", "1")
    assert rows["ffn neurons"] == ("24", "22", "layer 0: 4-5; layer 2: 0-1")
    assert rows["kv heads"] == ("2", "1", "layer 0: 0; layer 2: 1")
    assert rows["query heads"] == ("4", "2", "layer 0: 0-1; layer 2: 2-3")
    new, small, _ = shrink(cfg, params, None, cut)
    numbers = sum(x.size for x in jax.tree.leaves(small))
    assert rows["parameters"][1] == f"{numbers:,}"
    assert numbers == count(param_specs(new))
    np.testing.assert_array_equal(small["blocks"]["mlp"]["down"][1], params["blocks"]["mlp"]["down"][2, 2:])
    np.testing.assert_array_equal(small["blocks"]["attn"]["wq"][0], params["blocks"]["attn"]["wq"][0][:, 2:])
    np.testing.assert_array_equal(small["blocks"]["attn"]["wk"][1], params["blocks"]["attn"]["wk"][2][:, :1])
    assert flops_per_token(new, 16) < flops_per_token(cfg, 16)


# ---- training on


def masking(masks):
    """The plan as plain 0/1 masks on the weights; the chain rule puts them on the gradients too."""
    flat = flatten(masks)
    transform = LeafTransform(
        init=lambda w, spec: (None, jnp.zeros((), jnp.int32)),
        apply=lambda w, trainable, mask: w * mask,
        update=lambda w, grad, trainable, mask, step: mask,
        export=lambda w, trainable, mask: w * mask,
    )
    lifted = only((*((path, True) for path in flat), (".*", False)), per_leaf(transform))

    def init(params, specs):
        state = lifted.init(params, specs)
        return state._replace(
            auxiliary=map_with_path(lambda path, leaf: leaf._replace(value=flat[path]), state.auxiliary)
        )

    return lifted._replace(init=init)


def runtime(cfg, tx, compression):
    return Runtime(
        student=Model(cfg, view=compression.apply),
        teacher=None,
        specs=param_specs(cfg),
        compression=compression,
        objective=head_objective(Projection(cfg)),
        tx=tx,
        layout=ONE,
        policy=Policy(),
        ema=0.9,
    )


def train_steps(step, state, first, steps):
    losses = []
    for i in range(first, first + steps):
        state, metrics = step(state, jax.tree.map(jnp.asarray, make_batch(seed=i)), Frozen())
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("lion", marks=pytest.mark.slow)])
def test_trains_on_as_the_masked_model_does(optimizer):
    name = "untied, plain, biases, layer norms, head norms"
    cfg, params = variant(name)
    cut = random_plan(cfg, {"ffn": 16, "kv_heads": 1, "layers": 2})
    optim = OptimConfig(name=optimizer, learning_rate=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.1)
    tx = make_optimizer(optim, 40, policy=Policy(), specs=param_specs(cfg))
    masks = masked(cfg, cut)
    big, open_ = runtime(cfg, tx, masking(masks)), masking(jax.tree.map(jnp.ones_like, masks))
    big_step = jax.jit(make_train_step(big))
    state = create_state(params, big.specs, open_, tx, ONE, ema=True)
    state, _ = train_steps(big_step, state, 0, 5)
    masks_state = big.compression.init(params, big.specs).auxiliary
    big_state, big_losses = train_steps(big_step, state._replace(auxiliary=masks_state), 5, 10)

    new, small_params, small_state = shrink(cfg, state.trainable.params, state._replace(auxiliary={}), cut)
    small_tx = make_optimizer(optim, 40, policy=Policy(), specs=param_specs(new))
    small = runtime(new, small_tx, identity())
    small_step = jax.jit(make_train_step(small))
    small_state, small_losses = train_steps(small_step, small_state, 5, 10)

    np.testing.assert_allclose(small_losses, big_losses, atol=1e-5)
    assert small_losses[-1] < small_losses[0]
    _, *want = shrink(cfg, big_state.trainable.params, (big_state.opt, big_state.ema), cut)
    for got, expected in zip((small_state.trainable.params, (small_state.opt, small_state.ema)), want, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    # Control: moments that start anew do not give this training.
    fresh, _ = train_steps(
        small_step, create_state(small_params, small.specs, identity(), small_tx, ONE, ema=True), 5, 10
    )
    moved = np.abs(fresh.trainable.params["blocks"]["mlp"]["up"] - small_state.trainable.params["blocks"]["mlp"]["up"])
    assert moved.max() > 1e-4


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_state_has_the_smaller_shape(optimizer):
    cfg, params = variant("multi-head, gelu gate, head norms")
    cut = random_plan(cfg, PRODUCTS["multi-head, gelu gate, head norms"])
    new = smaller(cfg, cut)

    def born(cfg):
        optim = OptimConfig(name=optimizer, ema=0.9)
        tx = make_optimizer(optim, 10, policy=Policy(), specs=param_specs(cfg))
        return jax.eval_shape(
            lambda key: build_state(initialize(key, param_specs(cfg)), param_specs(cfg), identity(), tx, ema=True),
            jax.random.key(0),
        )

    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), born(cfg))
    _, _, got = shrink(cfg, params, state, cut)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), born(new))


def test_factored_moments_are_refused():
    cfg = ModelConfig(vocab=8, width=128, layers=1, heads=2, kv_heads=1, ffn=128)
    params = map_with_path(lambda _, spec: np.zeros(spec.shape, np.float32), param_specs(cfg))
    tx = make_optimizer(OptimConfig(name="adafactor"), 10, policy=Policy(), specs=param_specs(cfg))
    with pytest.raises(ConfigError, match=r"v_row.*cannot be cut exactly.*adamw"):
        shrink(cfg, params, jax.jit(tx.init)(params), random_plan(cfg, {"ffn": 64}))


def test_compression_state_is_cut_along():
    """Masks and learned scales: the cut model sees bit for bit the cut of what the big one sees."""
    cfg, params = variant("grouped, gated, tied")
    cut = random_plan(cfg, PRODUCTS["grouped, gated, tied"])
    matrices = ((".*/(w[qkvo]|up|gate|down)", True), (".*", False))
    lsq = fake_quantization(parse_format("int4"), method="lsq")
    compression = chain(only(matrices, magnitude_pruning(Ramp(0.5))), only(matrices, lsq))
    state, seen = jax.jit(lambda p: _init_and_apply(compression, p, cfg))(params)
    new, small, small_state = shrink(cfg, params, state, cut)
    fresh = jax.eval_shape(lambda p: compression.init(p, param_specs(new)), small)
    assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, fresh)
    _, want, _ = shrink(cfg, seen, None, cut)
    got = jax.jit(compression.apply)(small, small_state)
    for path, x in flatten(want).items():
        np.testing.assert_array_equal(flatten(got)[path], x, err_msg=path)
    up = flatten(want)["blocks/mlp/up"]
    assert len(np.unique(up)) < up.size / 2  # masked and on a grid of few steps


def _init_and_apply(compression, params, cfg):
    state = compression.init(params, param_specs(cfg))
    return state, compression.apply(params, state)


def test_packed_weights_are_cut_where_that_is_exact():
    cfg, params = variant("grouped, gated, tied")
    specs = flatten(param_specs(cfg))
    cut = random_plan(cfg, {"ffn": 8, "layers": 2})

    def pack(text):
        format = parse_format(text)
        return map_with_path(
            lambda path, w: quantize(w, format, specs[path].axes) if specs[path].is_matmul else w, params
        )

    packed = pack("int8")
    _, small, _ = shrink(cfg, packed, None, cut)
    _, want, _ = shrink(cfg, jax.jit(materialize)(packed), None, cut)
    for a, b in zip(jax.tree.leaves(jax.jit(materialize)(small)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match=r"'mlp'\]\['down'\].*regroup"):
        shrink(cfg, pack("int4/g8"), None, cut)


def test_sharded_models_are_cut_the_same():
    cfg, params = variant("multi-head, gelu gate, head norms")
    cut = random_plan(cfg, {"ffn": 8, "kv_heads": 2, "layers": 2})
    layout = make_layout(MeshPlan(data=2, fsdp=2, tensor=2))
    tx = make_optimizer(OptimConfig(), 10, policy=Policy(), specs=param_specs(cfg))
    state = create_state(params, param_specs(cfg), identity(), tx, layout, ema=True)
    new, small, small_state = shrink(cfg, state.trainable.params, state, cut, layout=layout)
    _, want, _ = shrink(cfg, params, None, cut)
    wanted = create_state(want, param_specs(new), identity(), tx, layout, ema=True)
    for a, b in zip(
        jax.tree.leaves((small, small_state)), jax.tree.leaves((wanted.trainable.params, wanted)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert small["blocks"]["mlp"]["up"].sharding.spec[2] == "tensor"


def test_every_moment_is_laid_out_like_its_parameter():
    cfg, _ = variant("multi-head, gelu gate, head norms")
    layout = make_layout(MeshPlan(data=2, fsdp=2, tensor=2))
    specs = param_specs(cfg)
    for optimizer in ("adamw", "muon"):  # Muon's state has dict keys of its own around the parameters'
        tx = make_optimizer(OptimConfig(name=optimizer), 10, policy=Policy(), specs=specs)
        opt = jax.eval_shape(lambda tx=tx: tx.init(initialize(jax.random.key(0), specs)))
        flat = jax.tree_util.tree_flatten_with_path(shardings(opt, specs, layout))[0]
        found = {jax.tree_util.keystr(path[-3:]): sharding for path, sharding in flat}
        want = layout.sharding("LDF", (3, 32, 24))
        assert found["['blocks']['mlp']['up']"] == want, optimizer
        assert "tensor" in want.spec


# ---- bad inputs

BAD_CONFIGS = {
    "nothing": ({}, "nothing is cut; set one of ffn, kv_heads"),
    "unknown importance": ({"ffn": 8, "importance": "activations"}, "did you mean 'activation'"),
    "no batches": ({"ffn": 8, "calibration_batches": 0}, "calibration_batches: got 0"),
}
BAD_TARGETS = {
    "zero": ({"ffn": 0}, {}, r"shrink.ffn: got 0, expected 1 to 23 \(the model has 24\)"),
    "negative": ({"layers": -1}, {}, "shrink.layers: got -1"),
    "bigger": ({"ffn": 25}, {}, "shrink.ffn: got 25, expected 1 to 23"),
    "equal": ({"layers": 3}, {}, "shrink.layers: got 3, expected 1 to 2"),
    "multi-query": ({"kv_heads": 1}, {"kv_heads": 1}, "multi-query attention.*shrink.queries"),
    "multi-head": ({"queries": 1}, {"kv_heads": 4}, "multi-head attention.*shrink.kv_heads"),
    "one layer": ({"layers": 1}, {"layers": 1}, "only one of its layers"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case):
    fields, message = BAD_CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        ShrinkConfig(**fields)


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets(case):
    sizes, changes, message = BAD_TARGETS[case]
    cfg = ModelConfig(**{**SMALL, **changes})
    with pytest.raises(ConfigError, match=message):
        ShrinkConfig(**sizes).apply(cfg)


def test_state_that_mirrors_nothing_is_refused():
    cfg, params = variant("grouped, gated, tied")
    with pytest.raises(ConfigError, match=r"attn.q.*below no parameter"):
        shrink(cfg, params, {"attn.q": jnp.zeros((3, 2))}, random_plan(cfg, {"layers": 2}))


def test_head_width_stays():
    assert ShrinkConfig(kv_heads=1).apply(ModelConfig(**SMALL)).head_size == 8
    assert ShrinkConfig(ffn=8).apply(ModelConfig(**SMALL)).head_width is None
