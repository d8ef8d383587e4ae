"""The TPU kernel, run step by step, equals the plain oracle; and which form of attention is taken where."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.models import attention as attn
from lmeff.models import splash
from tests.models.test_attention import inputs, value_and_gradients


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "mask"),
    [
        (4, 2, 128, attn.Mask(None, None)),
        (2, 1, 64, attn.Mask(100, None)),
        (2, 2, 128, attn.Mask(None, 3.0)),
    ],
)
def test_equals_the_oracle(heads, kv_heads, width, mask):
    args = inputs(1, 128, heads, kv_heads, width=width)
    got, got_grads = value_and_gradients(splash.interpreted, *args, mask)
    want, want_grads = value_and_gradients(attn.reference_attention, *args, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert (np.asarray(got)[np.asarray(args[3]) == 0] == 0).all(), "padding"
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()))


@pytest.mark.parametrize("full", [True, False])
def test_equals_the_oracle_where_layers_differ(full):
    mask, args = attn.Mask(100, 3.0), inputs(1, 128, 2, 1, width=64)
    chosen = functools.partial(splash.interpreted, full=jnp.asarray(full))
    got, got_grads = value_and_gradients(chosen, *args, mask)
    want, want_grads = value_and_gradients(attn.reference_attention, *args, mask.full if full else mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()))


@pytest.mark.parametrize(
    ("platform", "length", "width", "form"),
    [
        ("tpu", 4096, 128, "splash"),
        ("tpu", 128, 64, "splash"),
        ("tpu", 4000, 128, "tiles"),
        ("tpu", 256, 80, "panels"),
        ("cpu", 4096, 128, "tiles"),
        ("cpu", 256, 128, "panels"),
        ("gpu", 4096, 128, "tiles"),
    ],
)
def test_form_by_platform_and_shapes(platform, length, width, form):
    assert attn.form_of(platform, (1, length, 8, width), (1, length, 2, width)) == form
