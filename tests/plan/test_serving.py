"""Times of serving against closed forms and the Scaling Book's numbers (https://jax-ml.github.io/scaling-book/inference)."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmeff.compress.config import Quantize, build
from lmeff.core.errors import ConfigError
from lmeff.core.numerics import is_qtensor
from lmeff.core.specs import abstract
from lmeff.core.tree import flatten
from lmeff.models.config import ModelConfig, preset
from lmeff.models.transformer import param_specs
from lmeff.plan.hardware import chip
from lmeff.plan.serving import CACHES, WEIGHTS, cache_bytes, serving, table, weight_bytes

EIGHT = preset("llama3_8b")
V5E, H100 = chip("v5e"), chip("h100")
BLOCKS, HEAD = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336), 4096 * 128_256
NORMS = 65 * 4096


def test_llama_2_13b_caches_6_7_gigabytes_for_a_row_of_8192():
    """The book's example: 40 layers, 40 heads of 128, 8192 tokens in bfloat16 are 6.7 GB; in int8 half of it."""
    cfg = ModelConfig(vocab=32_000, width=5120, layers=40, heads=40, kv_heads=40, ffn=13_824)
    assert cache_bytes(cfg, "bfloat16", 1, 8192) == pytest.approx(6.7e9, rel=0.01)
    assert cache_bytes(cfg, "int8", 1, 8192) == pytest.approx(6.7e9 / 2 * (1 + 4 / 128), rel=0.01)
    assert cache_bytes(cfg, "int4", 1, 8192) == pytest.approx(6.7e9 / 4 * (1 + 8 / 128), rel=0.01)
    windowed = dataclasses.replace(cfg, window=1024)
    assert cache_bytes(windowed, "bfloat16", 1, 8192) == pytest.approx(6.7e9 / 8, rel=0.01)
    mixed = dataclasses.replace(windowed, full_layers=tuple(range(0, 40, 4)))
    assert cache_bytes(mixed, "bfloat16", 1, 8192) == pytest.approx(6.7e9 * (1 / 4 + 3 / 4 / 8), rel=0.01)


@pytest.mark.parametrize(
    ("cache", "bits"),
    [
        ("float32", 32),
        ("int8", 8 + 32 / 64),
        ("int4", 4 + 32 / 64),
        ("int4/g48", 4 + 64 / 64),
        ("int4-affine/g16", 4 + 64 / 16),
    ],
)
def test_a_cache_has_its_scales_and_zero_points(cache, bits):
    cfg = ModelConfig(vocab=96, width=64, layers=4, heads=8, kv_heads=4, head_width=64, ffn=128)
    assert cache_bytes(cfg, cache, 8, 100) == 2 * 4 * 8 * 100 * 4 * 64 * bits / 8
    assert cache_bytes(cfg, "int8/tensor", 8, 100) == 2 * 4 * (8 * 100 * 4 * 64 + 4)


def test_a_token_takes_as_long_as_its_bytes():
    found = serving(EIGHT, H100, context=1024)
    read = 2 * (BLOCKS + HEAD + NORMS) + cache_bytes(EIGHT, "bfloat16", 1, 1024)
    assert found.decode.bytes == found.bytes_per_token == read
    assert found.decode_ms == pytest.approx(1e3 * read / 3.35e12)
    assert found.decode.bound == "memory"
    assert found.tokens_per_second == pytest.approx(3.35e12 / read)
    assert found.weight_bytes == read - found.cache_bytes + 2 * HEAD  # the embedding is kept, not read
    assert found.fits


def test_a_prompt_takes_as_long_as_its_products():
    found = serving(EIGHT, H100, batch=4, context=8192)
    pairs = 8192 * 8193 / 2
    flops = 4 * (2 * BLOCKS * 8192 + 4 * 32 * 4096 * pairs + 2 * HEAD)
    assert found.prefill.bound == "compute"
    assert found.prefill.seconds == pytest.approx(flops / 989.4e12)
    assert found.prefill_ms == pytest.approx(1e3 * flops / 989.4e12 / (4 * 8192))


@pytest.mark.parametrize("weights", ["fp8", "int8", "int8/tensor", "int4/g32", "int4-affine/g64"])
def test_weights_are_as_large_as_exported_ones(weights):
    """Codes by their bits, scales and zero points as they are stored, the rest in bfloat16."""
    cfg = dataclasses.replace(preset("125m"), tied=False)
    specs = param_specs(cfg)
    compression = build((Quantize(rules=((r"blocks/(attn|mlp)/w.*|blocks/mlp/.*", weights), (".*", None))),))
    packed = jax.eval_shape(lambda p: compression.export(p, compression.init(p, specs)), abstract(specs))
    expected = 0.0
    for leaf in flatten(packed).values():
        expected += sum(_bytes(part) for part in jax.tree.leaves(leaf)) if is_qtensor(leaf) else 2 * leaf.size
    assert weight_bytes(cfg, weights) == pytest.approx(expected, rel=1e-3)


def _bytes(x):
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    return x.size * (jnp.iinfo(x.dtype).bits / 8 if integer else x.dtype.itemsize)


def test_int8_weights_halve_the_batch_from_which_arithmetic_binds():
    """Just below it a step is bound by memory, above by arithmetic: of the blocks alone, without a context."""
    cfg = dataclasses.replace(EIGHT, vocab=2)
    for weights, arithmetic, batch in (("bfloat16", "bfloat16", 241), ("int8", "bfloat16", 120), ("int8", "int8", 240)):
        found = serving(cfg, V5E, weights=weights, arithmetic=arithmetic, context=1)
        assert found.critical_batch == pytest.approx(batch, rel=0.005)
        below, above = (
            serving(cfg, V5E, weights=weights, arithmetic=arithmetic, batch=round(part * batch), context=1)
            for part in (0.8, 1.25)
        )
        assert (below.decode.bound, above.decode.bound) == ("memory", "compute")


def test_longer_contexts_and_smaller_batches_are_never_faster_a_token():
    contexts = [serving(EIGHT, V5E, batch=8, context=n).decode_ms for n in (1, 1024, 8192, 65_536)]
    assert contexts == sorted(contexts)
    batches = [serving(EIGHT, V5E, batch=n, context=1024).tokens_per_second for n in (1, 8, 64, 512)]
    assert batches == sorted(batches)


def test_every_pair_of_formats():
    rows = table(EIGHT, H100, batch=16, context=4096)
    assert len(rows) == len(WEIGHTS) * len(CACHES)
    assert len({(row.weights, row.arithmetic, row.cache) for row in rows}) == len(rows)
    found = {(row.weights, row.arithmetic, row.cache): row for row in rows}
    wide, narrow = found["bfloat16", "bfloat16", "bfloat16"], found["int4/g64", "bfloat16", "int8"]
    assert narrow.decode_ms < 0.5 * wide.decode_ms
    assert narrow.prefill_ms == pytest.approx(wide.prefill_ms)  # a prompt is arithmetic, in bfloat16 for both
    assert found["int8", "int8", "bfloat16"].prefill_ms < 0.6 * wide.prefill_ms


def test_tensor_parallelism_divides_bytes_and_adds_two_sums_a_layer():
    one, four = (serving(EIGHT, H100, devices=n, batch=64, context=2048) for n in (1, 4))
    assert four.weight_bytes == one.weight_bytes / 4
    assert four.decode.bytes == pytest.approx(one.decode.bytes / 4)
    assert four.decode.memory == pytest.approx(one.decode.memory / 4)
    assert four.decode.network == pytest.approx(32 * 4 * max(3 / 4 * 64 * 4096 * 2 / 450e9, 1e-6))
    wide = serving(EIGHT, H100, devices=16, batch=64, context=2048)
    assert wide.cache_bytes == one.cache_bytes / 8  # no more than 8 heads to share out
    with pytest.raises(ConfigError, match="got 3 devices, expected a number that divides 32 heads"):
        serving(EIGHT, H100, devices=3)


def test_two_devices_of_a_chip_are_one_chip():
    found = serving(EIGHT, chip("tpu7x"), devices=2, batch=8, context=1024)
    assert found.decode.memory == pytest.approx(found.decode.bytes * 2 / 7.38e12)
    assert found.tokens_per_second == pytest.approx(8 / found.decode.seconds)


def test_experts_are_read_where_a_token_goes_to_them():
    cfg = preset("mixtral_8x7b")
    one, many = (weight_bytes(cfg, "bfloat16", tokens=n, reads=True) for n in (1, 1000))
    experts = 2 * 32 * 8 * 3 * 4096 * 14_336
    assert many - one == pytest.approx(experts * (1 - 2 / 8))
    assert serving(cfg, H100, devices=8).decode.bytes < serving(cfg, H100, devices=8, batch=64).decode.bytes


def test_formats_are_told_apart():
    with pytest.raises(ConfigError, match=r"got 'float12'.*or one of float32, bfloat16"):
        serving(EIGHT, H100, weights="float12")
    with pytest.raises(ConfigError, match="got 'int3x'"):
        serving(EIGHT, H100, cache="int3x")
    assert not serving(preset("llama3_70b"), V5E).fits
