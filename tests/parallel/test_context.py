"""Attention over a row that is cut over devices equals attention over the whole row, in every form; and what each form moves and keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmeff.models import attention as attn
from lmeff.models.mask import Mask
from lmeff.parallel.context import FORMS, context_attention
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.order import CHUNKS, token_order
from tests.layouts.trial import UNOPTIMIZED

ROW = P("data", "context")
CASES = {
    # form, context, tensor, tokens, heads, key-value heads, mask
    "ring-packed-grouped": ("ring", 8, 1, 128, 4, 2, Mask(None, None)),
    "ring-window-softcap": ("ring", 8, 1, 128, 4, 2, Mask(11, 3.0)),
    "ring-wide-window": ("ring", 4, 2, 64, 4, 2, Mask(30, None)),
    "ring-two": ("ring", 2, 2, 64, 4, 2, Mask(None, 2.0)),
    "gather-packed-grouped": ("gather", 8, 1, 128, 4, 2, Mask(None, None)),
    "gather-window-softcap": ("gather", 4, 2, 64, 4, 2, Mask(11, 3.0)),
    "ulysses-packed-grouped": ("ulysses", 4, 1, 64, 8, 4, Mask(None, None)),
    "ulysses-multi-query": ("ulysses", 4, 1, 64, 8, 1, Mask(None, None)),
    "ulysses-window-softcap": ("ulysses", 4, 2, 64, 24, 6, Mask(11, 3.0)),
}


def inputs(tokens, heads, kv_heads, rows=2, width=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(key, (rows, tokens, heads, width), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (rows, tokens, kv_heads, width), dtype) for key in keys[2:])
    segments = np.ones((rows, tokens), np.int32)
    segments[0, tokens // 3 : tokens - 5] = 2
    segments[0, tokens - 5 :] = 0
    return q, k, v, jnp.asarray(segments), g


def mesh_of(context, tensor):
    return make_layout(MeshPlan(context=context, tensor=tensor), jax.devices()[: context * tensor]).mesh


def sharded(form, context, tensor, mask, *, checked=True):
    """`(q, k, v, segments) -> o` of tokens in the form's order."""
    heads = P("data", "context", "tensor")
    local = functools.partial(context_attention, form, mask=mask, axis="context", devices=context)
    specs = {"in_specs": (heads, heads, heads, ROW), "out_specs": heads, "check_vma": checked}
    return jax.shard_map(local, mesh=mesh_of(context, tensor), **specs)


def with_gradients(fn):
    """`(q, k, v, segments, g) -> (o, (d_q, d_k, d_v))`"""

    def run(q, k, v, segments, g):
        o, pull = jax.vjp(lambda q, k, v: fn(q, k, v, segments), q, k, v)
        return o, pull(g)

    return run


def assert_close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()))


@pytest.mark.parametrize("name", CASES)
def test_equals_attention_over_the_whole_row(name):
    form, context, tensor, tokens, heads, kv_heads, mask = CASES[name]
    args = inputs(tokens, heads, kv_heads)
    want = with_gradients(functools.partial(attn.reference_attention, mask=mask))(*args)
    order = token_order(form, tokens, context)
    run = jax.jit(with_gradients(sharded(form, context, tensor, mask)), compiler_options=UNOPTIMIZED)
    got = run(*(x[:, order] for x in args))
    assert_close(jax.tree.map(lambda x: x[:, np.argsort(order)], got), want)
