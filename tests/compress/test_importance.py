"""Importance equals its formula in NumPy, finds what was planted, ranks better than its reverse, and is the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.base import identity
from lmeff.compress.importance import Scores, channel_energy, scores, turned
from lmeff.compress.shrink import ShrinkConfig, apply_masks, masked, plan
from lmeff.core.errors import ConfigError, DataError
from lmeff.core.ops import recording
from lmeff.core.precision import Policy
from lmeff.distill.objectives import Projection, head_objective, token_nll
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import forward, param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.seam import layout_ops
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import create_state
from lmeff.train.step import make_train_step
from tests.compress.structure import ONE, make_batch, make_model

BATCHES = [make_batch(seed=i, padding=2 + i) for i in range(2)]
BATCHES[0].segments[3] = 0  # a row of nothing but padding


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def found(model):
    return scores("activation", *model, BATCHES, ONE)


def test_activation_equals_numpy(model, found):
    cfg, params = model
    taps = ("mlp.neurons", "attn.heads", "block.in", "block.out")
    make = recording(layout_ops(ONE), lambda name, x: x if name in taps else None)
    run = jax.jit(lambda batch: forward(params, batch, cfg, make_ops=make).records)
    sums, turned, tokens = {"mlp.neurons": 0.0, "attn.heads": 0.0}, 0.0, 0
    for batch in BATCHES:
        records = {k.removeprefix("blocks/"): np.asarray(v, np.float64) for k, v in run(batch).items()}
        for row in range(batch.tokens.shape[0]):
            real = batch.segments[row] > 0
            if not real.any():
                continue
            for name in sums:
                sums[name] = sums[name] + np.abs(records[name][:, row, real]).mean(1) ** 2
            x, y = (records[name][:, row, real] for name in ("block.in", "block.out"))
            cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            turned, tokens = turned + (1 - cosine).sum(1), tokens + real.sum()
    heads = np.linalg.norm(np.sqrt(sums["attn.heads"]), axis=-1)
    np.testing.assert_allclose(found.neurons, np.sqrt(sums["mlp.neurons"]), rtol=1e-5)
    np.testing.assert_allclose(found.heads, heads, rtol=1e-5)
    np.testing.assert_allclose(found.groups, np.linalg.norm(heads.reshape(3, 2, 2), axis=-1), rtol=1e-5)
    np.testing.assert_allclose(found.layers, turned / tokens, rtol=1e-5)


def test_magnitude_equals_numpy():
    cfg, params = make_model(bias="all")
    got = scores("magnitude", cfg, params, (), ONE)
    attn, mlp = (jax.tree.map(lambda x: np.asarray(x, np.float64), params["blocks"][key]) for key in ("attn", "mlp"))
    for layer, neuron in [(0, 0), (2, 7)]:
        own = [mlp["up"][layer][:, neuron], mlp["gate"][layer][:, neuron], mlp["down"][layer][neuron]]
        want = np.linalg.norm(np.concatenate([*own, mlp["up_bias"][layer][neuron : neuron + 1]]))
        np.testing.assert_allclose(got.neurons[layer, neuron], want, rtol=1e-5)
    own = [attn["wq"][1][:, 3], attn["wo"][1][3], attn["q_bias"][1][3]]
    np.testing.assert_allclose(got.heads[1, 3], np.linalg.norm(np.concatenate([x.ravel() for x in own])), rtol=1e-5)
    own = [attn["wk"][1][:, 1], attn["wv"][1][:, 1], attn["k_bias"][1][1], attn["v_bias"][1][1]]
    own += [attn[name][1][..., 2:, :] for name in ("wq", "q_bias")] + [attn["wo"][1][2:]]
    np.testing.assert_allclose(got.groups[1, 1], np.linalg.norm(np.concatenate([x.ravel() for x in own])), rtol=1e-5)
    own = [attn[name][2].ravel() for name in ("wq", "wk", "wv", "wo")]
    own += [mlp[name][2].ravel() for name in ("up", "gate", "down")]
    np.testing.assert_allclose(got.layers[2], np.linalg.norm(np.concatenate(own)), rtol=1e-5)


@pytest.mark.parametrize("method", ["activation", "magnitude"])
def test_planted_dead_parts_are_the_ones_cut(method):
    cfg, params = make_model()
    params = jax.tree.map(np.array, params)
    attn, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
    neurons, groups = {0: [1, 5, 6], 1: [0, 2, 23], 2: [9, 10, 11]}, {0: 1, 1: 0, 2: 1}
    for layer in range(3):
        mlp["up"][layer][:, neurons[layer]] = mlp["gate"][layer][:, neurons[layer]] = 0
        mlp["down"][layer][neurons[layer]] = 0
        group = groups[layer]
        attn["wv"][layer][:, group] = attn["wk"][layer][:, group] = 0
        attn["wo"][layer][2 * group : 2 * group + 2] *= 0.01
        attn["wq"][layer][:, 2 * group : 2 * group + 2] *= 0.01
    attn["wo"][1] *= 1e-3
    mlp["down"][1] *= 1e-3
    attn["wv"][1] *= 0.5
    cut = plan(ShrinkConfig(ffn=21, kv_heads=1, layers=2), cfg, scores(method, cfg, params, BATCHES, ONE))
    assert cut.layers.tolist() == [0, 2]
    for row, layer in enumerate(cut.layers):
        assert sorted(set(range(24)) - set(cut.neurons[row].tolist())) == neurons[layer]
        assert cut.groups[row].tolist() == [1 - groups[layer]]
        assert cut.heads[row].tolist() == [2 * (1 - groups[layer]), 2 * (1 - groups[layer]) + 1]


def test_plan_keeps_the_best_and_the_first_of_equals():
    cfg = ModelConfig(vocab=8, width=8, layers=3, heads=6, kv_heads=2, head_width=2, ffn=4)
    given = Scores(
        neurons=np.array([[1, 2, 3, 4], [9, 9, 9, 9], [4, 1, 3, 2]]),
        heads=np.array([[1, 2, 3, 9, 8, 7], [0, 0, 0, 0, 0, 0], [5, 4, 6, 1, 3, 2]]),
        groups=np.array([[1, 2], [0, 0], [9, 3]]),
        layers=np.array([5, 1, 5]),
    )
    cut = plan(ShrinkConfig(ffn=2, kv_heads=1, queries=2, layers=2), cfg, given)
    assert cut.layers.tolist() == [0, 2]
    assert cut.neurons.tolist() == [[2, 3], [0, 2]]
    assert cut.groups.tolist() == [[1], [0]]
    assert cut.heads.tolist() == [[3, 4], [0, 2]]
    cut = plan(ShrinkConfig(queries=1, ffn=2), cfg, given)
    assert cut.layers is None
    assert cut.groups is None
    assert cut.heads.tolist() == [[2, 3], [0, 3], [2, 4]]
    assert cut.neurons[1].tolist() == [0, 1]


@pytest.fixture(scope="module")
def trained():
    """A model after 120 steps, and its held-out loss under any masks."""
    cfg, params = make_model(layers=4)
    specs = param_specs(cfg)
    tx = make_optimizer(OptimConfig(learning_rate=1e-2), 120, policy=Policy(), specs=specs)
    objective = head_objective(Projection(cfg))
    rt = Runtime(
        student=Model(cfg),
        teacher=None,
        specs=specs,
        compression=identity(),
        objective=objective,
        tx=tx,
        layout=ONE,
        policy=Policy(),
    )
    step = jax.jit(make_train_step(rt), donate_argnums=0)
    state = create_state(params, specs, identity(), tx, ONE, ema=False)
    for i in range(120):
        state, _ = step(state, jax.tree.map(jnp.asarray, make_batch(seed=100 + i, rows=16)), Frozen())
    held_out = make_batch(seed=7, rows=64)
    nll = token_nll(Projection(cfg))

    @jax.jit
    def loss(params):
        return nll(ONE, Model(cfg).run(ONE, params, (), held_out, None, Policy(), "none"), held_out).sum()

    params = state.trainable.params
    return cfg, params, lambda masks: float(loss(apply_masks(params, masks))) / held_out.weights.sum()


SIZES = {"neurons": {"ffn": 12}, "groups": {"kv_heads": 1}, "queries": {"queries": 1}, "layers": {"layers": 3}}


def test_better_than_random_and_far_better_than_worst_first(trained):
    cfg, params, loss = trained
    own = scores("activation", cfg, params, [make_batch(seed=i, rows=16) for i in range(4)], ONE)
    worst = Scores(*(-x for x in own))
    dense = loss({})
    for what, sizes in SIZES.items():
        config = ShrinkConfig(**sizes)
        draws = [scores("random", cfg, params, (), ONE, seed=seed) for seed in range(8)]
        best, reverse, *control = (loss(masked(cfg, plan(config, cfg, s))) - dense for s in (own, worst, *draws))
        assert best < np.mean(control) < reverse, what


def test_the_same_scores_and_plans_on_every_mesh(model, found):
    cfg, params = model
    layout = make_layout(MeshPlan(data=2, fsdp=2, tensor=2))
    config = ShrinkConfig(ffn=10, kv_heads=1, queries=1, layers=2)
    for method in ("activation", "magnitude", "random"):
        want = found if method == "activation" else scores(method, cfg, params, BATCHES, ONE, seed=3)
        got = scores(method, cfg, params, BATCHES, layout, seed=3)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        for a, b in zip(plan(config, cfg, got), plan(config, cfg, want), strict=True):
            np.testing.assert_array_equal(a, b)


def test_half_precision_is_summed_in_full():
    """A bfloat16 sum of thousands of terms stops growing; float32 sums of bfloat16 terms do not."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 4096, 3)), jnp.bfloat16)
    real = np.arange(4096)[None] < np.array([[4096], [1000]])
    exact = np.abs(x.astype(np.float64))
    want = exact[0].mean(0) ** 2 + exact[1, :1000].mean(0) ** 2
    np.testing.assert_allclose(channel_energy(jnp.asarray(x), jnp.asarray(real)), want, rtol=1e-5)
    angle = turned(jnp.asarray(x), jnp.asarray(x * 2), jnp.asarray(real))
    assert abs(float(angle)) < 1e-4  # 5096 tokens that keep their direction
    cfg, params = make_model(ffn=600)
    half = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    full = jax.tree.map(lambda x: x.astype(np.float32), half)
    for a, b in zip(*(scores("magnitude", cfg, p, (), ONE) for p in (half, full)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_random_depends_on_the_seed_alone(model):
    cfg, _ = model
    first, again, other = (scores("random", cfg, None, (), ONE, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).all()


def test_bad_inputs(model):
    cfg, params = model
    with pytest.raises(ConfigError, match="got 'taylor', expected one of activation, magnitude, random"):
        scores("taylor", cfg, params, BATCHES, ONE)
    for batches in ([], [BATCHES[0]._replace(segments=np.zeros_like(BATCHES[0].segments))]):
        with pytest.raises(DataError, match="no batch has a token outside padding"):
            scores("activation", cfg, params, batches, ONE)
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(DataError, match="scores of neurons are not finite"):
        scores("magnitude", cfg, broken, (), ONE)
