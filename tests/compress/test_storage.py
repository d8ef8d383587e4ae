"""Stored sizes against counts made by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.config import MATRICES, Prune, Quantize, build, pruned
from lmeff.compress.storage import Sparse, effective_bits, leaf_bits, quantized_bytes, storage_bits
from lmeff.core.numerics import parse_format, quantize
from lmeff.core.specs import ParamSpec, count, initialize
from lmeff.models.config import preset
from lmeff.models.transformer import param_specs

W = jax.random.normal(jax.random.key(0), (2, 64, 10))
SIZE = 2 * 64 * 10


def test_dense_leaves_are_their_dtype():
    assert leaf_bits(W) == SIZE * 32
    assert leaf_bits(W.astype(jnp.bfloat16)) == SIZE * 16
    assert leaf_bits(jax.ShapeDtypeStruct((3, 5), jnp.float32)) == 15 * 32


@pytest.mark.parametrize(
    ("format", "slot", "scales", "zeros"),
    [
        ("int8", 8, 20, 0),
        ("int5", 8, 20, 0),
        ("int4", 4, 20, 0),
        ("int3", 4, 20, 0),
        ("int2-affine", 4, 20, 20),
        ("int4/g16", 4, 80, 0),
        ("int4-affine/g24", 4, 60, 60),
        ("int8/tensor", 8, 2, 0),
        ("fp8", 8, 20, 0),
        ("fp8/g16", 8, 80, 0),
    ],
)
def test_packed_leaves_count_scales_and_zero_points(format, slot, scales, zeros):
    format = parse_format(format)
    packed = quantize(W, format, (-2, -1) if format.granularity == "tensor" else (-2,))
    want = SIZE * slot + scales * 32 + zeros * 8
    assert leaf_bits(packed) == want
    assert leaf_bits(jax.eval_shape(lambda: packed)) == want  # known before any weight exists


def masked(keep):
    """`keep` of each 8 weights along the contracted dim, spread over all channels."""
    index = (jnp.arange(64)[:, None] + jnp.arange(10)) % 8
    return jnp.where(index < keep, W, 0.0)


def test_masked_leaves_take_the_smallest_form():
    assert leaf_bits(masked(2)) == SIZE * 32  # no mask was declared
    assert leaf_bits(masked(2), Sparse()) == SIZE + SIZE // 4 * 32
    assert leaf_bits(masked(8), Sparse()) == SIZE * 32  # a bitmask would only add
    index = math.ceil(math.log2(math.comb(8, 2)))
    assert index == 5
    assert leaf_bits(masked(2), Sparse(2, 8, -2)) == SIZE // 8 * (2 * 32 + index)
    # A pattern that the zeros do not have is not believed: here 3 of 8.
    assert leaf_bits(masked(3), Sparse(2, 8, -2)) == SIZE + SIZE * 3 // 8 * 32


def test_masked_codes_take_the_smallest_form():
    for text, zero_bits in (("int8", 0), ("int8-affine", 8)):
        packed = quantize(masked(2), parse_format(text), (-2,))
        nonzero = int(np.sum(np.asarray(packed.q) != (0 if packed.zero is None else np.asarray(packed.zero))))
        assert 0.9 * SIZE / 4 < nonzero <= SIZE / 4
        overhead = 20 * (32 + zero_bits)
        assert leaf_bits(packed, Sparse()) == overhead + SIZE + nonzero * 8
        assert leaf_bits(packed, Sparse(2, 8, -2)) == min(
            overhead + SIZE // 8 * (16 + 5), overhead + SIZE + nonzero * 8
        )
        assert leaf_bits(packed) == overhead + SIZE * 8
    dense = quantize(W, parse_format("int4"), (-2,))
    nonzero = int(np.sum(np.asarray(dense.q) != 0))
    assert SIZE + nonzero * 4 > SIZE * 4
    assert leaf_bits(dense, Sparse()) == 20 * 32 + SIZE * 4  # a bitmask would only add


def test_whole_models():
    cfg = preset("small", width=64, ffn=192)
    specs = param_specs(cfg)
    params = initialize(jax.random.key(0), specs)
    total = count(specs)
    assert effective_bits(params, total) == 32

    def packed(*transforms):
        compression = build(transforms)
        made = jax.jit(lambda p: compression.export(p, compression.init(p, specs)))(params)
        return made, pruned(transforms, specs)

    int8, _ = packed(Quantize(rules=((MATRICES, "int8"), ("embed/table", "int8"), (".*", None))))
    stored, dense = quantized_bytes(int8)
    assert stored <= 0.27 * dense
    norms = sum(
        math.prod(s.shape)
        for s in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
        if not s.is_matmul
    )
    assert storage_bits(int8) == stored * 8 + norms * 32

    sparse, patterns = packed(Prune(pattern="2:4"))
    matrices = sum(w.size for name in ("attn", "mlp") for w in sparse["blocks"][name].values())
    want = (total - matrices) * 32 + matrices // 4 * (2 * 32 + 3)
    assert storage_bits(sparse, patterns) == want
    both, patterns = packed(Prune(pattern="2:4"), Quantize())
    assert storage_bits(both, patterns) < storage_bits(both) < storage_bits(sparse, patterns) < storage_bits(params)
