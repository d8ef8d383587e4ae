"""Attention over a row that is cut over devices equals attention over the whole row, in every form; and what each form moves and keeps."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmeff.models import attention as attn
from lmeff.models.config import ModelConfig
from lmeff.models.mask import Mask
from lmeff.parallel.collective import volumes
from lmeff.parallel.context import FORMS, context_attention
from lmeff.parallel.hlo import collectives
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.order import token_order
from lmeff.parallel.volume import volume
from lmeff.parallel.workload import Step
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


SLOW = {"ring-wide-window", "gather-packed-grouped", "ulysses-packed-grouped"}


def slow_where(condition, *values):
    return pytest.param(*values, marks=pytest.mark.slow if condition else ())


def in_row_order(form, context, fn, *args):
    """Runs `fn` on the mesh on arguments in row order, gives results in row order: NumPy arrays, so that no two programs of the mesh run at a time."""
    order = token_order(form, args[0].shape[1], context)
    out = jax.jit(fn, compiler_options=UNOPTIMIZED)(*(x[:, order] for x in args))
    return jax.tree.map(lambda x: np.asarray(x)[:, np.argsort(order)], jax.block_until_ready(out))


@pytest.mark.parametrize("name", [slow_where(name in SLOW, name) for name in CASES])
def test_equals_attention_over_the_whole_row(name):
    form, context, tensor, tokens, heads, kv_heads, mask = CASES[name]
    args = inputs(tokens, heads, kv_heads)
    want = with_gradients(functools.partial(attn.reference_attention, mask=mask))(*args)
    assert_close(in_row_order(form, context, with_gradients(sharded(form, context, tensor, mask)), *args), want)


@pytest.mark.parametrize("form", [slow_where(form != "gather", form) for form in FORMS])
def test_equals_it_without_checks_and_in_low_precision(form):
    """As inside a region, where JAX does not check what varies; and in bfloat16, where sums stay in float32."""
    args = inputs(64, 8, 4)
    mask = Mask(20, None)
    fn = with_gradients(sharded(form, 4, 1, mask, checked=False))
    got = in_row_order(form, 4, fn, *args)
    assert_close(got, with_gradients(functools.partial(attn.reference_attention, mask=mask))(*args))
    low = [x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in args]
    for r, g in zip(jax.tree.leaves(in_row_order(form, 4, fn, *low)), jax.tree.leaves(got), strict=True):
        assert r.dtype == jnp.bfloat16
        np.testing.assert_allclose(r.astype(np.float32), g, atol=3e-2 * np.abs(g).max())


@pytest.mark.parametrize("form", [slow_where(form != "ring", form) for form in FORMS])
@pytest.mark.parametrize("checked", [slow_where(True, True), False])
def test_a_layer_that_learns_while_it_runs_whether_it_sees_all(form, checked):
    args, mask = inputs(64, 8, 4), Mask(7, 3.0)
    heads = P("data", "context", "tensor")
    specs = {"in_specs": (heads, heads, heads, ROW, P()), "out_specs": heads, "check_vma": checked}

    def local(q, k, v, segments, full):
        return context_attention(form, q, k, v, segments, mask, full=full, axis="context", devices=4)

    mixed = jax.shard_map(local, mesh=mesh_of(4, 1), **specs)

    def of_kind(full):
        return with_gradients(lambda q, k, v, segments: mixed(q, k, v, segments, full))

    def both(*args):
        return [of_kind(full)(*args) for full in jnp.asarray([True, False])]

    got = in_row_order(form, 4, both, *args)
    for found, seen in zip(got, (mask.full, mask), strict=True):
        assert_close(found, with_gradients(functools.partial(attn.reference_attention, mask=seen))(*args))


def layered(form, context, tensor, mask):
    """Gradients of several layers of attention, each with its own k and v."""
    attend = sharded(form, context, tensor, mask)

    def loss(q, k_L, v_L, segments):
        o, _ = jax.lax.scan(lambda q, kv: (attend(q, *kv, segments), None), q, (k_L, v_L))
        return jnp.square(o).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=UNOPTIMIZED)


@pytest.mark.parametrize(
    ("form", "context", "tensor", "window"),
    [
        ("ring", 8, 1, None),
        slow_where(True, "ring", 4, 2, None),
        ("ring", 8, 1, 5),  # the neighbours on both sides
        ("gather", 4, 2, None),
        ("ulysses", 4, 2, None),
    ],
)
def test_moves_what_the_formula_says(form, context, tensor, window):
    """Of the table's row for attention over context; documents are the same in all layers, and XLA gathers them once."""
    layers, tokens, heads, kv_heads, width = 3, 128, 16, 8, 8
    q, k, v, segments, _ = inputs(tokens, heads, kv_heads, width=width)
    args = (q, jnp.stack([k] * layers), jnp.stack([v] * layers), segments)
    text = layered(form, context, tensor, Mask(window, None)).lower(*args).compile().as_text()
    cfg = ModelConfig(width=heads * width, heads=heads, kv_heads=kv_heads, layers=layers, ffn=256, window=window)
    plan = MeshPlan(context=context, tensor=tensor, sequence=form)
    step = Step(cfg=cfg, plan=plan, devices=context * tensor, rows=len(q), tokens=tokens)
    assert volumes(collectives(text), step.degrees) == pytest.approx(volume(step, rows=("sequence",)))


def test_scores_and_all_else_of_a_device_are_an_eighth():
    """Scores of a ring's device are tiles of its chunks; a device alone, at this length, sees panels of a block against the whole row."""
    args, scores, memory = inputs(1024, 4, 2, width=12), {}, {}
    whole = functools.partial(attn.FORMS["panels"], mask=Mask(None, None))
    for name, fn in (("one", whole), ("eight", sharded("ring", 8, 1, Mask(None, None)))):
        compiled = jax.jit(with_gradients(fn)).lower(*args).compile(UNOPTIMIZED)
        shapes = [tuple(int(n) for n in dims.split(",")) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())]
        scores[name] = max(math.prod(shape) for shape in shapes if 12 not in shape)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    print(f"\nlargest scores {scores}, temporary bytes {memory}")
    assert scores["eight"] <= scores["one"] / 8
    assert memory["eight"] <= memory["one"] / 8


def test_programs_do_not_grow_with_the_ring():
    args = inputs(128, 2, 1)
    lines = {}
    for context in (4, 8):
        traced = jax.jit(with_gradients(sharded("ring", context, 1, Mask(None, None)))).lower(*args)
        lines[context] = len(traced.as_text().splitlines())
    assert lines[8] == lines[4]
