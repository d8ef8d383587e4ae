"""Bytes kept for the backward pass, against JAX's own list and against what the compiler stacks; and the policy that a budget means."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.errors import ConfigError
from lmeff.parallel.activations import ORDER, choose, kept_bytes, refuse_without_host_memory
from lmeff.parallel.mesh import MeshPlan, make_layout, plan_layout
from tests.layouts.test_step import kept
from tests.layouts.trial import MODELS

ONE = make_layout(MeshPlan(), jax.devices()[:1])
CFG = MODELS["deep"]
ROWS, TOKENS = 8, 16


def bytes_of(remat, layout=ONE, dtype=jnp.float32, rows=ROWS):
    return kept_bytes(remat, CFG, layout, rows, TOKENS, dtype)


@pytest.mark.parametrize("remat", ["full", "names", "dots", "save:attn_out", "save:attn.q,mlp.up"])
def test_equals_the_list_of_jax(remat):
    stream = ROWS * TOKENS * CFG.width
    assert bytes_of(remat) == CFG.layers * 4 * (sum(kept(remat)) + stream)


@pytest.mark.parametrize("remat", ["full", "names", "dots", "save:attn_out"])
@pytest.mark.parametrize("model", ["gemma", "olmo", "gpt", "phi"])
def test_equals_the_list_of_jax_for_families(model, remat):
    cfg = MODELS[model]
    want = cfg.layers * 4 * (sum(kept(remat, model)) + ROWS * TOKENS * cfg.width)
    assert kept_bytes(remat, cfg, ONE, ROWS, TOKENS, jnp.float32) == want


@pytest.mark.parametrize("model", ["gemma", "olmo", "gpt", "phi", "tied"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_everything_that_is_kept_has_letters(model, platform):
    """Of a part of the channels that turn, of tables by head, and of a choice between kernels, too; in both forms on the CPU."""
    cfg = dataclasses.replace(MODELS[model], head_width=128, rope_scaling=None)
    layout = plan_layout(MeshPlan(), 1, platform)
    for tokens in (128, 4096):
        sizes = [kept_bytes(remat, cfg, layout, 1, tokens, jnp.bfloat16) for remat in ORDER]
        assert sizes == sorted(sizes, reverse=True)
        assert kept_bytes("none", cfg, layout, 2, tokens, jnp.bfloat16) == pytest.approx(2 * sizes[0], rel=1e-2)


def test_half_the_bytes_in_bfloat16_but_for_log_sum_exps():
    assert bytes_of("full", dtype=jnp.bfloat16) == bytes_of("full") // 2
    log_sum_exps = 4 * CFG.layers * ROWS * TOKENS * CFG.heads
    assert bytes_of("names", dtype=jnp.bfloat16) == (bytes_of("names") + log_sum_exps) // 2


@pytest.mark.parametrize("remat", ["full", "names", "dots"])
def test_divided_over_the_mesh(remat):
    for plan, parts in (
        (MeshPlan(data=2, fsdp=2, tensor=2), 8),
        (MeshPlan(tensor=4, data=2), 8),
        (MeshPlan(data=8), 8),
    ):
        assert bytes_of(remat, make_layout(plan)) * parts == bytes_of(remat)
    assert bytes_of(remat, make_layout(MeshPlan(pipe=4, data=2))) * 8 == bytes_of(remat)


def test_a_budget_takes_the_least_recomputation_that_fits():
    sizes = {name: bytes_of(name) for name in ORDER}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for name, size in sizes.items():
        assert choose(f"budget:{size / 2**10}KiB", CFG, ONE, ROWS, TOKENS, jnp.float32) == name
    assert choose("dots", CFG, ONE, ROWS, TOKENS, jnp.float32) == "dots"
    with pytest.raises(ConfigError, match=r"train\.remat: got 'budget:1KiB', expected at least"):
        choose("budget:1KiB", CFG, ONE, ROWS, TOKENS, jnp.float32)


def test_offloading_needs_memory_that_devices_reach():
    device = SimpleNamespace(addressable_memories=lambda: [SimpleNamespace(kind="device")])
    layout = SimpleNamespace(mesh=SimpleNamespace(devices=SimpleNamespace(flat=[device])), platform="npu", kind=None)
    with pytest.raises(
        ConfigError, match=r"optim\.offload: got True, expected .*'pinned_host'; npu devices here have device"
    ):
        refuse_without_host_memory(layout, "optim.offload: got True")
    assert choose("offload:attn_out", CFG, ONE, ROWS, TOKENS, jnp.float32) == "offload:attn_out"


def test_what_waits_on_the_host_is_not_on_the_device():
    layout = plan_layout(MeshPlan(), 1, "tpu")
    assert bytes_of("offload:attn_out", layout) == bytes_of("full", layout) < bytes_of("save:attn_out", layout)
