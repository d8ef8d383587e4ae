"""Optimizers and schedules: against closed forms, on stacked leaves, with trainable compression state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmeff.core.errors import ConfigError
from lmeff.core.precision import Policy
from lmeff.core.specs import initialize
from lmeff.core.tree import flatten
from lmeff.parallel.region import Kept
from lmeff.train.optim import OPTIMIZERS, SCHEDULES, Kinds, OptimConfig, ema_update, learning_rate_at, make_optimizer
from lmeff.train.runtime import Frozen
from lmeff.train.state import Trainable
from lmeff.train.step import gradients
from tests.train.tiny_run import SPECS, make_batch, make_runtime, make_state

RATES = {"adafactor": 3e-2, "adamw": 1e-2, "lamb": 3e-2, "lion": 2e-3, "muon": 1e-2, "sgd": 0.3}
STEPS = 30


@pytest.fixture(scope="module")
def gradient():
    """The jitted gradient of the tiny model with masks and learned scales, and where it starts: one compile for all optimizers."""
    rt = make_runtime(OptimConfig(), STEPS)
    state = make_state(rt)
    fn = jax.jit(
        lambda trainable, batch: gradients(
            rt, trainable, state.auxiliary, batch, Frozen(), jnp.float32(1.0), Kept(None, state.step)
        )[:2]
    )
    return fn, state.trainable


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_trains(gradient, name):
    fn, trainable = gradient
    config = OptimConfig(name=name, learning_rate=RATES[name], warmup_steps=3)
    tx = make_optimizer(config, STEPS, policy=Policy(), specs=SPECS)
    state, start, losses = tx.init(trainable), trainable, []

    @jax.jit
    def update(grads, state, trainable):
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for step in range(STEPS):
        grads, sums = fn(trainable, make_batch(step))
        losses.append(float(sums["loss"]))
        trainable, state = update(grads, state, trainable)
    assert abs(losses[0] - np.log(64)) < 0.1
    assert losses[-1] < losses[0] - 0.25, losses
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(trainable), jax.tree.leaves(start), strict=True)]
    assert all(moved)  # the learned scales too


def one_update(config, grads, params, *, steps=10, policy=None):
    tx = make_optimizer(config, steps, policy=policy or Policy(), specs=SPECS)
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, state


def tree(seed):
    params = initialize(jax.random.key(seed), SPECS)
    scales = {"blocks": {"attn": {"wq": Wrapped(jnp.ones((2, 1, 4, 8)))}}}
    return Trainable(params, scales)


def Wrapped(x):
    from lmeff.compress.base import Leaf

    return Leaf(x)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_weight_decay_is_decoupled_and_on_matrices_only(name):
    """A step with and without decay differs by rate x decay x weight on matrices, and by nothing elsewhere."""
    params, grads = tree(0), jax.tree.map(lambda x: x * 0.3 + 0.01, tree(1))
    config = {"name": name, "learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"}
    with_decay, _ = one_update(OptimConfig(weight_decay=0.5, **config), grads, params)
    without, _ = one_update(OptimConfig(weight_decay=0.0, **config), grads, params)
    difference = jax.tree.map(jnp.subtract, with_decay, without)
    matrices = [path for path, spec in flatten(SPECS).items() if spec.contract]
    assert len(matrices) == 8  # the table, four of attention, three of the gated ffn
    for path, delta in flatten(difference.params).items():
        if path not in matrices:
            assert not np.any(delta), path
        elif name == "lamb":  # its decay is part of the step whose length it fixes
            assert np.any(delta), path
        else:
            np.testing.assert_allclose(delta, -1e-2 * 0.5 * flatten(params.params)[path], rtol=1e-4, atol=1e-8)
    assert not any(np.any(x) for x in jax.tree.leaves(difference.compression))


def test_lamb_steps_are_as_long_as_the_weights_layer_by_layer():
    params, grads = tree(0), tree(1)
    scale = jnp.array([1.0, 10.0])
    wq = params.params["blocks"]["attn"]["wq"] * scale[:, None, None, None]
    params.params["blocks"]["attn"]["wq"] = wq
    config = OptimConfig(name="lamb", learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0)
    updates, _ = one_update(config, grads, params)
    step = updates.params["blocks"]["attn"]["wq"]
    norms = [np.linalg.norm(x) for x in (*np.asarray(step), *np.asarray(wq))]
    np.testing.assert_allclose(norms[:2], 0.1 * np.array(norms[2:]), rtol=1e-5)


def test_muon_orthogonalizes_each_layer_by_its_letters():
    params, grads = tree(0), tree(1)
    config = OptimConfig(
        name="muon", learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=None
    )
    updates, _ = one_update(config, grads, params)
    inputs = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "up": 1, "gate": 1, "down": 1}  # dims contracted, after the layers
    for path, step in flatten(updates.params["blocks"]).items():
        name = path.split("/")[-1]
        if name not in inputs:
            continue
        matrices = np.asarray(step).reshape(2, np.prod(step.shape[1 : 1 + inputs[name]]), -1)
        for matrix in matrices:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
            assert values.min() > 0.6, (path, values)
            assert values.max() < 1.3, (path, values)


def test_muon_leaves_the_rest_to_adam():
    params = tree(0)
    chosen = Kinds(flatten(SPECS)).muon(params)
    is_leaf = lambda x: x is None or hasattr(x, "reduction_axis")  # noqa: E731
    named = {jax.tree_util.keystr(p): d for p, d in jax.tree_util.tree_flatten_with_path(chosen, is_leaf=is_leaf)[0]}
    assert sum(d is not None for d in named.values()) == 7
    assert all("blocks" in p and "norm" not in p and ".params" in p for p, d in named.items() if d is not None)
    biased = {"blocks/attn/q_bias": flatten(SPECS)["blocks/attn_norm/scale"]}
    assert (
        Kinds(biased).muon({"blocks": {"attn": {"q_bias": jnp.zeros((2, 4, 8))}}})["blocks"]["attn"]["q_bias"] is None
    )


def test_clipping_is_by_the_norm_of_everything():
    params, grads = tree(0), jax.tree.map(jnp.ones_like, tree(1))
    config = {
        "name": "sgd",
        "learning_rate": 1.0,
        "b1": 0.0,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "schedule": "constant",
    }
    updates, _ = one_update(OptimConfig(clip_norm=0.5, **config), grads, params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)
    free, _ = one_update(OptimConfig(clip_norm=None, **config), grads, params)
    assert all(np.all(x == -1) for x in jax.tree.leaves(free))


def test_moments_are_stored_in_the_state_dtype_and_used_in_float32():
    params, grads = tree(0), tree(1)
    config = OptimConfig(warmup_steps=0, schedule="constant")
    narrow, state = one_update(config, grads, params, policy=Policy(state=jnp.bfloat16))
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 2 * len(jax.tree.leaves(params))
    assert set(floats) == {jnp.dtype(jnp.bfloat16)}
    wide, state = one_update(config, grads, params)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(a, b)  # the first step reads no stored moment
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (grads, params))
    _, state = one_update(config, *half)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {
        jnp.dtype(jnp.float32)
    }  # float32 moments of bfloat16 weights
    with pytest.raises(ConfigError, match=r"optim.b2: got 0.999 with precision state=bfloat16, expected at most 0.996"):
        one_update(OptimConfig(b2=0.999), grads, params, policy=Policy(state=jnp.bfloat16))


def test_second_moments_shrink_at_the_largest_b2_allowed():
    """Why `b2` is limited: one bfloat16 value that decays by 1 - b2 must not be rounded back, anywhere between powers of two."""
    values = jnp.linspace(1, 2, 129)[:128].astype(jnp.bfloat16)
    assert bool(jnp.all((0.996 * values.astype(jnp.float32)).astype(jnp.bfloat16) < values))
    assert not bool(jnp.all((0.999 * values.astype(jnp.float32)).astype(jnp.bfloat16) < values))


def test_ema_is_float32_and_its_closed_form():
    average, new = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 3.0], jnp.bfloat16)}
    for _ in range(3):
        average = ema_update(average, new, 0.9)
    np.testing.assert_allclose(average["w"], 3 - 0.9**3 * np.array([2.0, 1.0]), rtol=1e-6)
    assert average["w"].dtype == jnp.float32


CLOSED = {
    "constant": lambda t, n: 1.0,
    "cosine": lambda t, n: 0.1 + 0.9 * (1 + np.cos(np.pi * t / n)) / 2,
    "linear": lambda t, n: 1 - 0.9 * t / n,
    "rsqrt": lambda t, n: np.sqrt(10 / (10 + t)),
    "wsd": lambda t, n: 1.0 if t < n - n // 5 else 1 - 0.9 * (t - (n - n // 5)) / (n // 5),
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedule_is_its_closed_form(name):
    config = OptimConfig(learning_rate=2.0, schedule=name, warmup_steps=10, final_fraction=0.1)
    for step in (0, 4, 9):
        assert learning_rate_at(config, 110, step) == pytest.approx(2.0 * (step + 1) / 10, rel=1e-5)
    for step in (10, 35, 60, 89, 90, 100, 109):
        assert learning_rate_at(config, 110, step) == pytest.approx(2.0 * CLOSED[name](step - 10, 100), rel=1e-4)


def test_warmup_longer_than_the_run_is_shortened_to_reach_the_peak():
    config = OptimConfig(learning_rate=1.0, schedule="cosine", warmup_steps=20)
    rates = [learning_rate_at(config, 5, step) for step in range(5)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    assert learning_rate_at(config, 1, 0) == 1.0
    assert learning_rate_at(OptimConfig(learning_rate=1.0, warmup_steps=0), 10, 0) == 1.0
    assert learning_rate_at(OptimConfig(learning_rate=1.0, warmup_steps=1), 10, 0) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optim.name: got 'adam'.*did you mean 'adamw'"),
        ({"schedule": "cosin"}, "optim.schedule: got 'cosin'.*did you mean 'cosine'"),
        ({"learning_rate": 0.0}, "optim.learning_rate: got 0.0, expected a positive number"),
        ({"learning_rate": float("nan")}, "optim.learning_rate: got nan"),
        ({"warmup_steps": -1}, "optim.warmup_steps: got -1"),
        ({"final_fraction": 1.5}, "optim.final_fraction: got 1.5, expected 0 to 1"),
        ({"weight_decay": -0.1}, "optim.weight_decay: got -0.1"),
        ({"b2": 1.0}, "optim.b2: got 1.0, expected 0 to below 1"),
        ({"clip_norm": 0.0}, "optim.clip_norm: got 0.0, expected a positive number, or None"),
        ({"ema": 1.0}, "optim.ema: got 1.0"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**fields)
