"""Formulas against numbers that papers give and against the code's own arrays."""

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.numerics import parse_format, quantize, stored_bits
from lmeff.plan.bytes import quantized_bytes, zero_bytes_per_parameter
from lmeff.plan.flops import attention_backward, attention_forward, mfu, palm_per_token
from lmeff.plan.sizing import BESIROGLU, HOFFMANN, by_ratio, compute_optimal, distillation


@pytest.mark.parametrize(
    ("stage", "devices", "gigabytes"),
    [(0, 1, 120), (1, 4, 52.5), (2, 4, 41.3), (3, 4, 30), (1, 64, 31.4), (2, 64, 16.6), (3, 64, 1.88), (3, 1024, 0.12)],
)
def test_zero_as_the_papers_table_has_it(stage, devices, gigabytes):
    """Rajbhandari et al. 2020, table 1, 7.5 billion parameters."""
    assert 7.5 * zero_bytes_per_parameter(stage, devices) == pytest.approx(gigabytes, rel=0.03)


def test_gpt2_takes_24_gigabytes_without_zero():
    """The same, section 3.1: 1.5 billion parameters."""
    assert 1.5 * zero_bytes_per_parameter(0, 64) == 24
    assert 1.5 * zero_bytes_per_parameter(3, 64) == 0.375


@pytest.mark.parametrize("text", ["int8/g32", "int4/g32", "int4-affine/g64"])
def test_quantized_bytes_are_those_of_a_packed_weight(text):
    format = parse_format(text)
    packed = jax.eval_shape(lambda w: quantize(w, format, (-2,)), jax.ShapeDtypeStruct((256, 96), jnp.float32))
    zero_bits = 0 if format.symmetric else 8
    assert quantized_bytes(256 * 96, format.bits, format.group, zero_bits=zero_bits) == stored_bits(packed) / 8


@pytest.mark.parametrize("window", [None, 5, 40])
def test_causal_attention_is_that_of_the_pairs_that_see_each_other(window):
    pairs = sum(1 for t in range(32) for s in range(32) if s <= t and (window is None or t - s < window))
    assert attention_forward(3, 32, 4, 8, causal=True, window=window) == pytest.approx(4 * 3 * pairs * 4 * 8)
    assert attention_backward(attention_forward(3, 32, 4, 8)) == 10 * 3 * 32 * 32 * 4 * 8


def test_palm_reaches_46_2_percent():
    """Chowdhery et al. 2022, appendix B and table 3: PaLM 540B on 6,144 TPU v4; 46.2% with attention, 45.7% without."""
    per_token = palm_per_token(540.35e9, layers=118, heads=48, head_width=256, tokens=2048)
    assert mfu(238.3e3, per_token, 6144, 275e12) == pytest.approx(0.462, abs=5e-4)
    assert mfu(238.3e3, 6 * 540.35e9, 6144, 275e12) == pytest.approx(0.457, abs=5e-4)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU], ids=["Hoffmann", "Besiroglu"])
@pytest.mark.parametrize("flops", [1e19, 1e24])
def test_no_other_size_has_less_loss(law, flops):
    best = compute_optimal(flops, law)
    assert best.flops == pytest.approx(flops)
    others = [(best.parameters * f, best.tokens / f) for f in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0)]
    assert all(law.loss(*other) > law.loss(best.parameters, best.tokens) for other in others)


def test_chinchilla():
    """70B parameters and 1.4T tokens (Hoffmann et al. 2022, table 3), which the corrected law also asks for."""
    flops = 6 * 70e9 * 1.4e12
    assert by_ratio(flops).parameters == pytest.approx(70e9)
    assert compute_optimal(flops).tokens_per_parameter == pytest.approx(20, rel=0.15)
    assert compute_optimal(flops, HOFFMANN).tokens_per_parameter > 80


def test_a_cache_is_shared_by_students_and_epochs():
    alone = distillation(1e9, 8e9, 1e10, epochs=3)
    cached = distillation(1e9, 8e9, 1e10, epochs=3, students=4, cached=True)
    assert alone.student == cached.student == 6 * 1e9 * 1e10 * 3
    assert alone.teacher == 12 * cached.teacher == 2 * 8e9 * 1e10 * 3
