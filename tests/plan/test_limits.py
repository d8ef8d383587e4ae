"""The Scaling Book's bounds, at its published numbers (https://jax-ml.github.io/scaling-book/training, /inference)."""

import pytest

from lmeff.plan import limits
from lmeff.plan.hardware import chip
from lmeff.plan.links import Side, Torus


@pytest.mark.parametrize(("name", "tokens"), [("v4", 44e3), ("v5e", 63e3), ("v5p", 73.4e3), ("v6e", 294e3)])
def test_tokens_of_a_slice_at_25_gigabytes_a_host(name, tokens):
    assert limits.slice_limit(chip(name), dcn=25e9) == pytest.approx(tokens, rel=0.01)


def test_a_batch_of_48k_on_a_4x4x4():
    """FSDP 16 x tensor 4 is the nearest that a 4x4x4 slice has."""
    share = limits.fsdp_share(48 * 1024, 32_768, 64, 2, 1)
    assert share == pytest.approx(13.9, rel=0.01)
    assert min((4, 16, 64), key=lambda n: abs(n - share)) == 16


def test_tensor_parallelism_above_eleven_waits_for_the_network():
    assert int(limits.tensor_limit(chip("v5p"), 30_000)) == 11
    assert limits.tensor_limit(chip("v5p"), 30_000, axes=2) == 2 * limits.tensor_limit(chip("v5p"), 30_000)


@pytest.mark.parametrize(
    ("weights", "arithmetic", "published"),
    [(16, "bfloat16", 240), (8, "bfloat16", 120), (8, "int8", 240)],
    ids=["bfloat16", "int8 weights", "int8"],
)
def test_critical_batch_of_v5e(weights, arithmetic, published):
    """The book has 243 for the last, from a bandwidth that it rounds to 0.81 TB/s."""
    found = limits.critical_batch(chip("v5e"), weights=weights, arithmetic=arithmetic)
    assert found == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("axes", [1, 3])
def test_the_data_limit_is_where_gathers_and_arithmetic_take_equally_long(axes):
    """A layer of 2DF bytes is gathered twice and its gradient scattered once in the time of 6 x 2 DF FLOPs a token... of one of the book's matrices."""
    found, numbers = chip("v5p"), 8192 * 32_768
    tokens = limits.data_limit(found, axes)
    way = Torus((Side(2**20, found.ici / 2, True),) * axes)  # so long that (n - 1) / n is 1
    big = 2 * numbers * 1e12  # so large that hops do not count
    sent = 2 * way.gather(big) / 1e12  # of the backward pass: one gather, one reduction
    computed = 2 * 2 * numbers * tokens / found.rate("bfloat16")
    assert sent == pytest.approx(computed, rel=1e-5)


def test_the_mixed_limit_is_where_its_best_share_meets_both():
    """At `mixed_limit` tokens a chip, bytes at the best share take as long as arithmetic (the book's per-layer table)."""
    found, ffn, devices, width = chip("v5p"), 32_768, 4096, 8192
    tokens = limits.mixed_limit(found, ffn, 2, 1) * devices
    fsdp = limits.fsdp_share(tokens, ffn, devices, 2, 1)
    tensor = devices / fsdp
    # The forward pass of two matrices: 4DF / tensor bytes of weights over two axes, 4BD / fsdp of activations over one.
    sent = max(4 * width * ffn / tensor / (found.ici * 2), 4 * tokens * width / fsdp / found.ici)
    both = 4 * width * ffn / tensor / (found.ici * 2) + 4 * tokens * width / fsdp / found.ici
    computed = 4 * tokens * width * ffn / devices / found.rate("bfloat16")
    assert sent == pytest.approx(both / 2)
    assert both == pytest.approx(computed, rel=1e-6)
