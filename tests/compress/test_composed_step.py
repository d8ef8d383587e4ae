"""The composed train step: a member that does nothing leaves no trace, and what was trained is what is exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.base import State, identity
from lmeff.compress.config import Prune, Quantize, build
from lmeff.core.batch import Batch
from lmeff.core.numerics import parse_format
from lmeff.core.ops import FLOATING, Numerics
from lmeff.core.precision import Policy
from lmeff.core.specs import initialize
from lmeff.core.tree import flatten
from lmeff.distill.objectives import Distill, Projection, head_objective
from lmeff.models.config import preset
from lmeff.models.transformer import identity_view, param_specs, sites
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.train.evaluate import make_eval_step
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import create_state
from lmeff.train.step import make_train_step
from tests.hurry import OPTIMIZED

CFG = preset("tiny")
SPECS = param_specs(CFG)
ONE = make_layout(MeshPlan(), jax.devices()[:1])
STEPS = 3
INT8 = Numerics(tuple((site, parse_format("int8")) for site in sites(CFG)))


def make_batch(step, rows=4, length=16):
    tokens = jax.random.randint(jax.random.key(step), (rows, length + 1), 0, CFG.vocab)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    ones = jnp.ones((rows, length), jnp.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(jnp.float32))


@functools.cache
def random_params():
    return jax.jit(lambda: initialize(jax.random.key(0), SPECS))()


@functools.cache
def trained(compression, distill=None, numerics=FLOATING):
    """The state after a few steps, and the metrics of each."""
    policy = Policy()
    teacher = None if distill is None else Model(CFG)
    objective = head_objective(Projection(CFG, numerics), None if distill is None else Projection(CFG), distill)
    rt = Runtime(
        student=Model(CFG, numerics, compression.apply),
        teacher=teacher,
        specs=SPECS,
        compression=compression,
        objective=objective,
        tx=make_optimizer(OptimConfig(warmup_steps=1), STEPS, policy=policy, specs=SPECS),
        layout=ONE,
        policy=policy,
    )
    state = create_state(random_params(), SPECS, compression, rt.tx, ONE, ema=False)
    frozen = Frozen() if teacher is None else Frozen(teacher=initialize(jax.random.key(9), SPECS))
    step, metrics = jax.jit(make_train_step(rt), compiler_options=OPTIMIZED), []
    for number in range(STEPS):
        state, told = step(state, make_batch(number), frozen)
        metrics.append(told)
    return state, metrics


OFF = {
    "a mask of density 1": (build((Prune(sparsity=0.0),)), None),
    "a schedule that has not begun": (build((Prune(sparsity=0.5, begin=STEPS + 1, end=STEPS + 2),)), None),
    "quantization of nothing": (build((Quantize(rules=((".*", None),)),)), None),
    "a teacher of no weight": (identity(), Distill(teacher="t", mix=0.0)),
    "all of them": (build((Prune(sparsity=0.0), Quantize(rules=((".*", None),)))), Distill(teacher="t", mix=0.0)),
}


@pytest.mark.parametrize("name", OFF)
def test_a_member_that_is_off_was_never_there(name):
    plain, plain_metrics = trained(identity())
    state, metrics = trained(*OFF[name])
    for path, want in flatten(plain.trainable.params).items():
        np.testing.assert_array_equal(flatten(state.trainable.params)[path], want, err_msg=path)
        assert not np.array_equal(want, flatten(random_params())[path])
    for told, want in zip(metrics, plain_metrics, strict=True):
        assert float(told["loss"]) == float(want["loss"])
        assert float(told["grad_norm"]) == float(want["grad_norm"])


@functools.cache
def composed():
    rules = (("blocks/(attn/w.|mlp/(up|gate|down))", "int4/g16"), ("embed/table", "int8"), (".*", None))
    compression = build((Prune(sparsity=0.5, end=2), Quantize(method="lsq", rules=rules)))
    return compression, *trained(compression, Distill(teacher="t", mix=0.5), INT8)


def test_masks_scales_and_weights_learn_together():
    compression, state, metrics = composed()
    assert all(np.isfinite(float(told["loss"])) for told in metrics)
    shown = jax.jit(compression.apply)(state.trainable.params, state.compression)
    for path, entry in flatten(state.auxiliary[0]).items():
        gone = ~np.asarray(entry.value.keep)
        assert gone.mean() == 0.5
        assert not np.any(np.asarray(flatten(shown)[path])[gone])
    factors = flatten(state.trainable.compression[1])
    assert len(factors) == 8
    for entry in factors.values():
        assert np.any(np.asarray(entry.value) != 1)
        assert np.all(np.abs(np.asarray(entry.value) - 1) < 0.05)  # a step of Adam moves a factor by the learning rate


@pytest.mark.parametrize("numerics", [FLOATING, INT8], ids=["weights", "weights and activations"])
def test_the_exported_model_has_the_loss_of_the_trained_one(numerics):
    compression, state, _ = composed()
    params, own = state.trainable.params, State(*state.compression)
    packed = jax.jit(compression.export)(params, own)
    losses = {}
    for name, view, arrays, carried in (
        ("fake", compression.apply, params, own),
        ("packed", identity_view, packed, State({}, {})),
    ):
        score = make_eval_step(Model(CFG, numerics, view), ONE, Policy())
        losses[name] = np.asarray(score(arrays, carried, None, make_batch(77)), np.float64)
    assert abs(losses["packed"].mean() - losses["fake"].mean()) < 1e-4
    assert losses["fake"].mean() > 1
