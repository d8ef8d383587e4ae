"""Frequencies equal those of transformers, whose formulas checkpoints were trained with; what a layer takes of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.batch import Batch
from lmeff.models.config import ModelConfig, RopeScaling
from lmeff.models.rope import amplitude, document_lengths, rope

CFG = ModelConfig(width=128, heads=2, kv_heads=1, rope_theta=500_000.0)  # 64 channels a head
HALF = 32
DIVISORS = {"short": tuple(np.linspace(1, 2, HALF).tolist()), "long": tuple(np.geomspace(1, 30, HALF).tolist())}
SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=4.0),
    "dynamic": RopeScaling(kind="dynamic", factor=4.0, original=512),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original=8192),
    "llama3, other bounds": RopeScaling(kind="llama3", factor=32.0, original=8192, low=2.0, high=16.0),
    "yarn": RopeScaling(kind="yarn", factor=40.0, original=4096),
    "yarn, own bounds": RopeScaling(kind="yarn", factor=4.0, original=2048, beta_fast=20.0, beta_slow=2.0),
    "yarn, own amplitude": RopeScaling(kind="yarn", factor=4.0, original=2048, attention=1.25),
    "yarn, not truncated": RopeScaling(kind="yarn", factor=4.0, original=2048, truncate=False),
    "longrope": RopeScaling(kind="longrope", factor=32.0, original=1024, **DIVISORS),
    "longrope, own amplitude": RopeScaling(kind="longrope", factor=32.0, original=1024, attention=1.19, **DIVISORS),
}


def angles(cfg, length, full=None):
    """The frequency of each pair: the angle that a head of (1, 0) pairs turns by from one position to the next, and its length after."""
    turned, width = cfg.rotary_size, cfg.head_size
    x = jnp.zeros((1, 2, 1, width)).at[..., : turned // 2].set(1.0)
    positions = jnp.asarray([[1, length - 1]], jnp.int32)
    ones = jnp.ones_like(positions)
    out = np.asarray(rope(x, Batch(ones, ones, ones, positions, ones), cfg, full), np.float64)[0, 0, 0]
    cos, sin = out[: turned // 2], out[turned // 2 : turned]
    return np.arctan2(sin, cos), np.hypot(sin, cos), out[turned:]


def theirs(cfg, length):
    """Frequencies and amplitude as transformers has them."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    s = cfg.rope_scaling
    given = {"rope_theta": cfg.rope_theta, "partial_rotary_factor": cfg.rope_fraction, "rope_type": s.kind}
    given |= {"factor": s.factor, "original_max_position_embeddings": s.original, "attention_factor": s.attention}
    given |= {"low_freq_factor": s.low, "high_freq_factor": s.high, "beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
    given |= {"truncate": s.truncate, "short_factor": list(s.short), "long_factor": list(s.long)}
    context = s.original if s.kind == "dynamic" else int(s.factor * (s.original or 1024))
    made = transformers.LlamaConfig(
        hidden_size=cfg.width,
        num_attention_heads=cfg.heads,
        head_dim=cfg.head_size,
        max_position_embeddings=context,
        rope_parameters={key: value for key, value in given.items() if value is not None},
    )
    found, factor = ROPE_INIT_FUNCTIONS[s.kind](made, "cpu", seq_len=length)
    return np.asarray(found, np.float64), factor


@pytest.mark.oracle
@pytest.mark.parametrize("length", [200, 5000])
@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "none"])
def test_frequencies_are_those_of_transformers(scaling, length):
    cfg = dataclasses.replace(CFG, rope_scaling=SCALINGS[scaling])
    (turned, size, _), (want, factor) = angles(cfg, length), theirs(cfg, length)
    np.testing.assert_allclose(turned, want, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(size, factor, rtol=1e-6)
    assert amplitude(cfg.rope_scaling) == pytest.approx(factor)


@pytest.mark.oracle
def test_a_part_of_the_channels_turns_by_its_own_number_of_frequencies():
    scaling = RopeScaling(kind="yarn", factor=4.0, original=2048)
    cfg = dataclasses.replace(CFG, rope_fraction=0.75, rope_scaling=scaling)
    (turned, size, still), (want, factor) = angles(cfg, 200), theirs(cfg, 200)
    assert (cfg.rotary_size, len(want), still.size) == (48, 24, 16)
    np.testing.assert_allclose(turned, want, rtol=2e-5)
    np.testing.assert_allclose(size, factor, rtol=1e-6)
    assert (still == 0).all(), "what does not turn is not scaled"


@pytest.mark.parametrize("full", [True, False])
def test_layers_with_a_window_have_their_own_theta_and_no_scaling(full):
    scaling = SCALINGS["yarn"]
    cfg = dataclasses.replace(CFG, window=8, full_layers=(1,), rope_local_theta=1e4, rope_scaling=scaling)
    alone = dataclasses.replace(CFG, rope_scaling=scaling) if full else dataclasses.replace(CFG, rope_theta=1e4)
    for got, want in zip(angles(cfg, 200, jnp.asarray(full)), angles(alone, 200), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_lengths_are_those_of_documents_in_whatever_order_a_row_lies():
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 0, 0, 0]], np.int32)
    positions = np.array([[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 0, 0]], np.int32)
    order = np.array([5, 0, 3, 1, 4, 2])
    ones = np.ones_like(segments)
    want = np.array([[2, 2, 3, 3, 3, 1], [1, 2, 2, 1, 1, 1]])
    np.testing.assert_array_equal(document_lengths(Batch(ones, ones, segments, positions, ones)), want)
    moved = Batch(ones, ones, segments[:, order], positions[:, order], ones)
    np.testing.assert_array_equal(document_lengths(moved), want[:, order])
