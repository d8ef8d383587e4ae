"""Precision policies: their text, their effect on every product of the traced step, and float16 with a loss scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.core.ops import plain_einsum
from lmeff.core.precision import Policy, parse
from lmeff.train.loss_scale import LossScaleState, current_scale, dynamic_loss_scale, find
from lmeff.train.optim import OptimConfig
from lmeff.train.runtime import Frozen
from lmeff.train.step import make_train_step
from tests.train.tiny_run import fingerprint, make_batch, make_runtime, make_state

BF16 = parse("params=float32,compute=bfloat16,output=float32,state=bfloat16")


def test_policy_text():
    assert parse("") == Policy()
    assert parse("compute=bf16") == Policy(compute=jnp.bfloat16)
    assert parse(str(BF16)) == BF16
    assert str(Policy()) == "params=float32,compute=float32,output=float32,state=float32"
    assert parse("compute=f16").needs_loss_scale
    assert not BF16.needs_loss_scale


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "compte=bfloat16",
            "got 'compte=bfloat16', expected one of params, compute, output, state = dtype; did you mean 'compute'",
        ),
        (
            "compute=bfloat",
            "precision.compute: got 'bfloat', expected one of bfloat16, float16, float32; did you mean 'bfloat16'",
        ),
        ("bfloat16", "precision: got 'bfloat16'"),
        ("compute=", "precision.compute: got ''"),
        ("compute=bf16,compute=f32", "'compute' is given twice"),
        ("state=float16", "precision.state: got float16, in which squares of gradients underflow"),
    ],
)
def test_policy_refuses(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def traced(rt):
    state = jax.eval_shape(lambda: make_state(rt))
    return state, jax.make_jaxpr(make_train_step(rt))(state, make_batch(0), Frozen())


def products(jaxpr, inside=()):
    """(path of enclosing primitives, operand dtypes, result dtype, result shape) of every dot_general, through all inner jaxprs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            left, right = (v.aval.dtype for v in eqn.invars)
            yield inside, (left, right), eqn.outvars[0].aval.dtype, eqn.outvars[0].aval.shape
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner, (*inside, eqn.primitive.name))


def test_every_product_of_the_blocks_is_narrow_with_wide_sums():
    rt = make_runtime(OptimConfig(), 10, policy=BF16, compressed=False)
    state, jaxpr = traced(rt)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(state.opt) if x.ndim} == {jnp.dtype(jnp.bfloat16)}
    found = list(products(jaxpr.jaxpr))
    wide = sorted(p[3] for p in found if p[1] != (jnp.bfloat16, jnp.bfloat16))
    assert wide == [(64, 32), (8 * 32, 32), (8 * 32, 64)]  # logits and their two gradients: the output is float32
    assert len(found) - len(wide) == 3 * 7 + 7  # each weight of a block and its two gradients; the blocks of attention
    assert {p[2] for p in found} == {jnp.dtype(jnp.float32)}  # every sum
    out = rt.student.run(rt.layout, *_inputs(rt), None, rt.policy, "none")
    assert (out.hidden_BTD.dtype, out.head.dtype) == (jnp.float32, jnp.bfloat16)


def test_narrow_gradients_are_those_of_the_float32_product():
    key = jax.random.key(0)
    x, w = (jax.random.normal(key, s).astype(jnp.bfloat16) for s in ((3, 5, 4, 8), (4, 8, 6)))
    g = jax.random.normal(key, (3, 5, 6)).astype(jnp.bfloat16)
    narrow, pull = jax.vjp(lambda x, w: plain_einsum("BTHC,HCD->BTD", x, w), x, w)
    wide, exact = jax.vjp(
        lambda x, w: plain_einsum("BTHC,HCD->BTD", x, w), x.astype(jnp.float32), w.astype(jnp.float32)
    )
    for a, b in zip((narrow, *pull(g)), (wide, *exact(g.astype(jnp.float32))), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-6)  # rounded once


def _inputs(rt):
    return make_state(rt).trainable.params, (), jax.tree.map(jnp.asarray, make_batch(0))


def test_output_is_rounded_once():
    rt = make_runtime(OptimConfig(), 10, compressed=False)
    run = jax.jit(
        lambda policy: rt.student.run(rt.layout, *_inputs(rt), None, policy, "none").hidden_BTD, static_argnums=0
    )
    wide = run(Policy(compute=jnp.bfloat16, output=jnp.float32))
    narrow = run(Policy(compute=jnp.bfloat16, output=jnp.bfloat16))
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)
    assert np.any(wide != narrow.astype(jnp.float32))


def scripted(grads, **options):
    """The states of a loss scale over a script of gradients, around an inner transform that counts and sums."""
    import optax

    tx = dynamic_loss_scale(optax.trace(0.5), **options)
    state = tx.init({"w": jnp.zeros(2)})
    states, updates = [], []
    for g in grads:
        update, state = jax.jit(tx.update)({"w": jnp.asarray(g, jnp.float32)}, state, {"w": jnp.zeros(2)})
        states.append(state)
        updates.append(np.asarray(update["w"]))
    return states, updates


def test_loss_scale_halves_skips_and_grows():
    inf, ok = [np.inf, 1.0], [1.0, 2.0]
    states, updates = scripted([ok, inf, [np.nan, 0.0], ok, ok, ok, ok], initial=8.0, growth_interval=2)
    assert [float(s.scale) for s in states] == [8.0, 4.0, 2.0, 2.0, 4.0, 4.0, 8.0]
    assert [int(s.clean) for s in states] == [1, 0, 0, 1, 0, 1, 0]
    assert [int(s.guarded.total_notfinite) for s in states] == [0, 1, 2, 2, 2, 2, 2]
    assert not updates[1].any()
    assert not updates[2].any()
    np.testing.assert_array_equal(states[2].guarded.inner_state.trace["w"], states[0].guarded.inner_state.trace["w"])
    np.testing.assert_array_equal(
        updates[3], 1.5 * np.array(ok)
    )  # the momentum of the first step, as if nothing had been between
    states, updates = scripted([inf] * 52, initial=4.0)
    assert float(states[-1].scale) == 1.0
    assert not updates[49].any()
    assert not np.isfinite(updates[-1]).all()  # no scale helps: let through, so that the loss says so


@pytest.fixture(scope="module")
def half():
    """A jitted float16 step with masks, learned scales and an average, and its first state."""
    rt = make_runtime(OptimConfig(ema=0.9, warmup_steps=2, learning_rate=1e-2), 40, policy=parse("compute=float16"))
    state = make_state(rt)
    return jax.jit(make_train_step(rt)), state


def test_overflow_skips_everything_bitwise(half):
    step, state = half
    state, _ = step(state, make_batch(0), Frozen())
    trainable = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(-0.0), state.trainable)  # -0.0 + 0.0 would be 0.0
    state = state._replace(trainable=trainable, opt=with_scale(state.opt, 2.0**120))
    after, metrics = step(state, make_batch(1), Frozen())
    for part in ("trainable", "auxiliary", "ema"):
        assert fingerprint(getattr(after, part)) == fingerprint(getattr(state, part)), part
    assert fingerprint(find(after.opt).guarded.inner_state) == fingerprint(find(state.opt).guarded.inner_state)
    assert float(find(after.opt).scale) == float(metrics["loss_scale"]) == 2.0**119
    assert (float(metrics["skipped"]), float(metrics["update_norm"])) == (1.0, 0.0)
    assert np.isfinite(float(metrics["loss"]))
    assert int(after.step) == int(state.step) + 1  # the batch is spent


def with_scale(opt, value):
    is_scale = lambda x: isinstance(x, LossScaleState)  # noqa: E731
    return jax.tree.map(lambda x: x._replace(scale=jnp.float32(value)) if is_scale(x) else x, opt, is_leaf=is_scale)


def test_float16_trains_and_finds_its_scale(half):
    step, state = half
    state = state._replace(opt=with_scale(state.opt, 2.0**26))
    losses = []
    for i in range(40):
        state, metrics = step(state, make_batch(i), Frozen())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5, losses
    assert 1 <= float(metrics["skipped"]) < 15
    assert float(current_scale(state.opt)) == 2.0 ** (26 - float(metrics["skipped"]))
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}


def test_gradients_do_not_depend_on_the_scale(half):
    step, state = half
    one, other = (
        step(state._replace(opt=with_scale(state.opt, s)), make_batch(0), Frozen())[1] for s in (2.0**8, 2.0**12)
    )
    assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=2e-3)


def test_policies_are_values():
    assert dataclasses.replace(Policy(), compute=jnp.float16) == parse("compute=float16")
    assert hash(Policy()) == hash(parse(""))
