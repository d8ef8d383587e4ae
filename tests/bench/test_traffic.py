"""Bytes that a pass reads, against sums by hand."""

import functools

import jax
import pytest

from lmeff.bench.traffic import decode_traffic, prefill_flops, prefill_traffic, weight_bytes
from lmeff.bench.variants import make_variant, random_model
from lmeff.core.precision import Policy
from lmeff.infer.engine import make_engine
from lmeff.models.cache import CacheFormat, empty_cache
from lmeff.models.config import ModelConfig, MoE
from lmeff.parallel.mesh import MeshPlan, make_layout

V, D, L, H, K, C, F = 64, 32, 2, 4, 2, 8, 64
MATRIX = L * (2 * D * H * C + 2 * D * K * C + 3 * D * F)  # numbers of the blocks' matrices
NORMS = (2 * L + 1) * D
OUTPUTS = L * (H * C + 2 * K * C + D + 2 * F + D)  # output channels of the blocks' matrices: scales of "int8"


@functools.cache
def model(devices=1, *, plan=None, **changes):
    cfg = ModelConfig(vocab=V, width=D, layers=L, heads=H, kv_heads=K, ffn=F, **changes)
    return random_model(cfg, make_layout(plan or MeshPlan(), jax.devices()[:devices]), Policy())


def cache_of(served, format="float32", batch=2, length=10):
    return empty_cache(make_engine(served, batch=batch, length=length, cache=CacheFormat(numbers=format)).specs)


def test_a_tied_table_is_read_whole():
    served = model()
    traffic = decode_traffic(served, cache_of(served), 2, 10)
    assert traffic.stored == traffic.weights == 4 * (MATRIX + NORMS + V * D)
    assert traffic.cache == 4 * 2 * L * 2 * 10 * K * C
    assert traffic.total == traffic.weights + traffic.cache


def test_of_an_embedding_rows_are_read():
    served = model(tied=False)
    traffic = decode_traffic(served, cache_of(served), 2, 10)
    assert traffic.stored == 4 * (MATRIX + NORMS + 2 * V * D)
    assert traffic.weights == pytest.approx(4 * (MATRIX + NORMS + V * D + 2 * D))
    assert prefill_traffic(served, cache_of(served), 2, 1000).weights == traffic.stored


def test_packed_weights_count_their_codes_and_scales():
    served = model()
    rest = 4 * (NORMS + V * D)
    assert weight_bytes(make_variant(served, "int8").served.params) == rest + MATRIX + 4 * OUTPUTS
    groups = L * (2 * D * K * C + D * H * C + 2 * D * F) // 32 + L * (H * 1 * D) + L * F * D // 32
    assert weight_bytes(make_variant(served, "int4/g32").served.params) == rest + MATRIX / 2 + 4 * groups


@pytest.mark.parametrize(
    ("format", "number", "scale"), [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 4), ("int4", 0.5, 4)]
)
def test_keys_and_values_that_are_seen_count(format, number, scale):
    served = model()
    for seen in (10, 4.5):
        found = decode_traffic(served, cache_of(served, format), 2, seen).cache
        assert found == pytest.approx(2 * L * 2 * K * seen * (C * number + scale))


def test_a_window_is_all_that_is_seen():
    served = model(window=4)
    assert decode_traffic(served, cache_of(served), 2, 10).cache == 4 * 2 * L * 2 * 4 * K * C


def test_experts_that_are_expected():
    served = model(moe=MoE(experts=4, top_k=2, shared=0))
    all_of_them = 4 * L * 4 * 3 * D * F
    one, many = (decode_traffic(served, cache_of(served), batch, 1).weights for batch in (1, 1000))
    assert many - one == pytest.approx(all_of_them / 2)
    two = decode_traffic(served, cache_of(served), 2, 1).weights
    assert two - one == pytest.approx(all_of_them / 4)


def test_a_device_reads_its_part():
    served = model(4, plan=MeshPlan(data=2, tensor=2))
    alone = model()
    parts = decode_traffic(served, cache_of(alone), 2, 10)
    whole = decode_traffic(alone, cache_of(alone), 2, 10)
    assert parts.weights == 4 * (MATRIX / 2 + NORMS + V * D / 2)
    assert whole.weights == 4 * (MATRIX + NORMS + V * D)


def test_flops_of_a_prompt():
    cfg = model().cfg
    attention = L * 4 * H * C * (5 + 1) / 2
    assert prefill_flops(cfg, 3, 5) == 3 * (5 * (2 * MATRIX + attention) + 2 * V * D)
