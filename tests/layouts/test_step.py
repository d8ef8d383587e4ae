"""The compiled step: traced once, and the same gradients whatever the backward pass keeps."""

import contextlib
import dataclasses
import io
import math
import re

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.batch import Batch
from lmeff.models.remat import FIXED, parse, wrapper
from lmeff.models.transformer import block, sites
from lmeff.parallel.region import Kept
from lmeff.parallel.seam import layout_ops
from lmeff.train.step import gradients, make_train_step
from tests.layouts.trial import MODELS, UNOPTIMIZED, Mesh, leaves, make_inputs, make_params, make_runtime, relative


@pytest.mark.parametrize("mesh", [Mesh(data=2, fsdp=2, tensor=2, accumulate=2)])
def test_a_step_is_traced_once_and_takes_over_its_state(mesh):
    rt = make_runtime(mesh, "all")
    state, batch, frozen = make_inputs(rt, mesh)
    traces = []

    def step(*args):
        traces.append(1)
        return make_train_step(rt)(*args)

    out = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(out, None), compiler_options=UNOPTIMIZED)
    first, _ = jitted(state, batch, frozen)
    second, _ = jitted(first, batch, frozen)
    third, _ = jitted(second, batch, frozen)
    assert len(traces) == 1
    assert int(third.step) == 3
    assert all(x.is_deleted() for x in jax.tree.leaves((first.trainable, second.opt[1], second.auxiliary)))
    assert jax.tree.map(lambda x: x.sharding, third) == out


@pytest.fixture(scope="module")
def policies():
    """`{policy: (gradients, temporary bytes)}` of a deeper model on one device."""
    mesh = Mesh(model="deep")
    found = {}
    for policy in (*FIXED, "save:attn_out,attn.q", "offload:attn_out,mlp_hidden"):
        rt = make_runtime(dataclasses.replace(mesh, remat=policy), "plain")
        state, batch, frozen = make_inputs(rt, mesh, rows=64)

        def grads(state, batch, frozen, rt=rt):
            return gradients(rt, state.trainable, state.auxiliary, batch, frozen, 1.0, Kept(None, state.step))[0]

        compiled = jax.jit(grads).lower(state, batch, frozen).compile(UNOPTIMIZED)
        found[policy] = leaves(compiled(state, batch, frozen)), compiled.memory_analysis().temp_size_in_bytes
    return found


def test_what_is_kept_does_not_change_gradients(policies):
    want = policies["none"][0]
    for policy, (got, _) in policies.items():
        for path, gradient in want.items():
            assert relative(got[path], gradient) <= 1e-6, (policy, path)


def test_keeping_less_takes_less_memory(policies):
    none, dots, names, full = (policies[policy][1] for policy in ("none", "dots", "names", "full"))
    print(f"\ntemporary bytes: none {none}, dots {dots}, names {names}, full {full}")
    assert none > dots > names > full


def kept(policy, model="deep"):
    """Elements of each array that the backward pass of one block is given, other than arguments and constants, from JAX's own list."""
    cfg, rows, length = MODELS[model], 8, 16
    p = jax.tree.map(lambda w: w[0], make_params(cfg, 0)["blocks"])
    ids = jnp.ones((rows, length), jnp.int32)
    ops = layout_ops(Mesh().layout)({}).ops

    def fn(p, x):
        return block(x, p, Batch(ids, ids, ids, ids, ids), cfg, ops, 0)

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        jax.ad_checkpoint.print_saved_residuals(
            wrapper(parse(policy, sites(cfg)))(fn), p, jnp.ones((rows, length, cfg.width))
        )
    lines = [line for line in text.getvalue().splitlines() if not re.search("from (the argument|a constant)", line)]
    found = [re.match(r"\w+\[([\d,]+)\]", line) for line in lines if line.startswith("f32")]
    return sorted(math.prod(map(int, match.group(1).split(","))) for match in found if match)


def test_policies_keep_what_they_say():
    cfg, tokens = MODELS["deep"], 8 * 16
    heads, width, ffn = cfg.heads, cfg.width, cfg.ffn
    assert kept("full") == []
    assert kept("names") == sorted(tokens * n for n in (width, heads, ffn)), (
        "attention outputs, log-sum-exps, ffn hidden states"
    )
    assert kept("dots") == sorted(tokens * n for n in (width, width, width, width, ffn, ffn)), "q, k, v, o, up, gate"
    assert sum(kept("none")) > sum(kept("dots"))
