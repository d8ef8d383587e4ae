"""Blocked attention equals the plain oracle, in values and gradients, in every form and variant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lmeff.models import attention as attn

CASES = {
    "multi-head": (2, 40, 4, 4, attn.Mask(None, None)),
    "grouped": (2, 70, 4, 2, attn.Mask(None, None)),
    "multi-query": (1, 64, 4, 1, attn.Mask(None, None)),
    "window": (1, 150, 2, 1, attn.Mask(17, None)),
    "softcap": (1, 70, 2, 2, attn.Mask(None, 2.0)),
    "window and softcap": (2, 130, 4, 2, attn.Mask(64, 3.0)),
}


def inputs(rows, length, heads, kv_heads, width=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (rows, length, heads, width), dtype)
    k, v = (jax.random.normal(key, (rows, length, kv_heads, width), dtype) for key in keys[1:3])
    segments = np.ones((rows, length), np.int32)
    segments[0, length // 3 : length - 5] = 2
    segments[0, length - 5 :] = 0
    return q, k, v, jnp.asarray(segments)


def value_and_gradients(fn, q, k, v, segments, mask):
    def loss(q, k, v):
        out = fn(q, k, v, segments, mask)
        return jnp.sum(jnp.sin(out.astype(jnp.float32) * 3)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, grads


@pytest.mark.parametrize("form", ["short", "long"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name, form, monkeypatch):
    monkeypatch.setattr(attn, "TILE", 32)
    forms = {
        "short": attn.FORMS["panels"],
        "long": attn.blocked(attn._tile_forward, attn._tile_backward, 32),
    }
    rows, length, heads, kv_heads, mask = CASES[name]
    args = inputs(rows, length, heads, kv_heads)
    got, got_grads = value_and_gradients(forms[form], *args, mask)
    want, want_grads = value_and_gradients(attn.reference_attention, *args, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()))


@pytest.mark.parametrize("form", ["short", "long"])
@pytest.mark.parametrize("full", [True, False])
def test_equals_the_oracle_of_the_kind_that_is_chosen_while_it_runs(full, form):
    fn = attn.FORMS["panels"] if form == "short" else attn.blocked(attn._tile_forward, attn._tile_backward, 256)
    args, mask = inputs(1, 150, 2, 1), attn.Mask(17, 2.0)
    chosen = lambda *args: fn(*args[:4], mask, jnp.asarray(args[4]))  # noqa: E731
    got, got_grads = value_and_gradients(chosen, *args, full)
    want, want_grads = value_and_gradients(attn.reference_attention, *args, mask.full if full else mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()))


def test_padding_gives_zeros_and_no_gradient():
    q, k, v, segments = inputs(1, 24, 2, 1)
    out, grads = value_and_gradients(attn.FORMS["panels"], q, k, v, segments, attn.Mask(None, None))
    padding = np.asarray(segments[0]) == 0
    assert (np.asarray(out)[0, padding] == 0).all()
    assert all(np.isfinite(g).all() and (np.asarray(g)[0, padding] == 0).all() for g in grads)


def test_low_precision_keeps_its_dtype():
    args = inputs(1, 70, 4, 2, dtype=jnp.bfloat16)
    got = attn.attention(*args[:3], segments_BT=args[3])
    want = attn.reference_attention(*args, attn.Mask(None, None))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=3e-2)


def test_long_rows_need_no_square_of_scores():
    length = 8192
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, s):
        return attn.attention(q, k, v, segments_BT=s).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * 4 / 20


@pytest.mark.parametrize("form", ["short", "long"])
def test_inside_shards(form):
    fn = attn.FORMS["panels"] if form == "short" else attn.blocked(attn._tile_forward, attn._tile_backward, 256)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    args = inputs(4, 64, 4, 2)
    mask = attn.Mask(None, None)
    heads, rows = P("data", None, "tensor"), P("data")
    sharded = jax.shard_map(
        functools.partial(fn, mask=mask), mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads
    )
    got, got_grads = value_and_gradients(lambda q, k, v, s, m: sharded(q, k, v, s), *args, mask)
    want, want_grads = value_and_gradients(attn.reference_attention, *args, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()))
