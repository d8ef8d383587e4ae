"""Formats from texts: what is packed, what is not, and in which dtypes arithmetic and the cache are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.bench.variants import make_variant, make_variants, random_model
from lmeff.core.errors import ConfigError, UsageError
from lmeff.core.numerics import is_qtensor, materialize
from lmeff.core.precision import Policy
from lmeff.core.tree import flatten
from lmeff.models.cache import CacheFormat
from lmeff.models.config import ModelConfig
from lmeff.parallel.mesh import MeshPlan, make_layout

CFG = ModelConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, ffn=64)
UNTIED = ModelConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, ffn=64, tied=False)
BLOCKS = {f"blocks/attn/w{name}" for name in "qkvo"} | {f"blocks/mlp/{name}" for name in ("up", "gate", "down")}


@functools.cache
def model(cfg=CFG, devices=1, **plan):
    return random_model(cfg, make_layout(MeshPlan(**plan), jax.devices()[:devices]), Policy())


PACKED = {
    "tied": (CFG, "int8", BLOCKS),
    "tied, table": (CFG, "int4/g32+table", BLOCKS | {"embed/table"}),
    "untied": (UNTIED, "int8", BLOCKS | {"head/w"}),
    "untied, table": (UNTIED, "int8/tensor+table", BLOCKS | {"head/w"}),
}


@pytest.mark.parametrize("case", PACKED)
def test_matrices_are_packed_and_nothing_else(case):
    cfg, text, wanted = PACKED[case]
    served = model(cfg)
    made = make_variant(served, text)
    leaves = flatten(made.served.params)
    assert {path for path, leaf in leaves.items() if is_qtensor(leaf)} == wanted
    assert {str(leaves[path].format) for path in wanted} == {text.removesuffix("+table")}
    for path, w in flatten(materialize(made.served.params)).items():
        whole = np.asarray(flatten(served.params)[path])
        coarse = 0.6 * np.abs(whole).max() / (7 if "int4" in text else 127)
        np.testing.assert_allclose(w, whole, atol=coarse if path in wanted else 0)
    assert made.cache == CacheFormat(numbers="float32")


def test_floats_are_cast_and_the_cache_follows():
    served = model()
    made = make_variants(served, ["f32", "bf16", "bf16@int8", "int8@int4/channel16"])
    assert list(made) == ["f32", "bf16", "bf16@int8", "int8@int4/channel16"]
    for name, dtype in (("f32", jnp.float32), ("bf16", jnp.bfloat16), ("bf16@int8", jnp.bfloat16)):
        assert {x.dtype for x in jax.tree.leaves(made[name].served.params)} == {jnp.dtype(dtype)}
        assert made[name].served.policy.compute == dtype
    assert [str(one.cache) for one in made.values()] == ["float32", "bfloat16", "int8", "int4/channel16"]


def test_packed_leaves_lie_as_the_mesh_cuts_them():
    made = make_variant(model(devices=4, data=2, tensor=2), "int8")
    up = made.served.params["blocks"]["mlp"]["up"]
    assert up.q.sharding.shard_shape(up.q.shape) == (2, 32, 32)
    assert up.scale.sharding.shard_shape(up.scale.shape) == (2, 1, 32)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "got ''"),
        ("int9", "int9"),
        ("f32+table", "behind a packed format alone"),
        ("int8@x", "cache: got 'x'"),
        ("int8+", "got 'int8"),
    ],
)
def test_texts_that_mean_nothing_are_refused(text, word):
    with pytest.raises((UsageError, ConfigError), match=word):
        make_variant(model(), text)


def test_what_is_packed_is_not_packed_again():
    packed = make_variant(model(), "int8").served
    with pytest.raises(UsageError, match="packed already"):
        make_variant(packed, "int8")
    with pytest.raises(UsageError, match="int8 is given twice"):
        make_variants(model(), ["f32", "int8", "int8"])
