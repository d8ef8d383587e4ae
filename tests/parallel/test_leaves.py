"""The table of leaves: bytes a device, copies, and what lies uncut though the plan would cut it."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from lmeff.core.specs import ParamSpec, initialize
from lmeff.core.tree import flatten
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.leaves import leaf_table, print_leaves
from lmeff.parallel.mesh import MeshPlan, make_layout, shardings

CFG = ModelConfig(vocab=96, width=64, layers=2, heads=8, kv_heads=4, ffn=128, tied=False)


@pytest.mark.parametrize("plan", [MeshPlan(), MeshPlan(fsdp=4, tensor=2), MeshPlan(data=2, fsdp=2, tensor=2, zero=1)])
def test_bytes_and_copies_are_those_of_the_arrays(plan):
    layout, specs = make_layout(plan), param_specs(CFG)
    params = initialize(jax.random.key(0), specs)
    arrays = flatten(jax.device_put(params, shardings(params, specs, layout)))
    for leaf in leaf_table(specs, layout):
        x = arrays[leaf.path]
        assert leaf.bytes == x.addressable_shards[0].data.nbytes
        assert leaf.copies == 1 + max(shard.replica_id for shard in x.addressable_shards)


def test_copies_nobody_asked_for():
    specs = {
        "odd": ParamSpec(letters="DF", shape=(1024, 4098)),
        "even": ParamSpec(letters="DF", shape=(1024, 4096)),
        "small": ParamSpec(letters="C", shape=(64,)),
    }
    layout = make_layout(MeshPlan(data=2, tensor=4))
    odd, even, small = sorted(leaf_table(specs, layout, jnp.bfloat16), key=lambda leaf: leaf.path != "odd")[:3]
    assert (odd.path, odd.partition, odd.copies, odd.unasked) == ("odd", "-,-", 8, ("tensor",))
    assert odd.warning is not None
    assert "odd (DF = 1024x4098) is not cut over tensor: 8.0 MiB" in odd.warning
    assert (even.partition, even.copies, even.unasked, even.warning) == ("-,tensor", 2, (), None)
    assert small.unasked == ("tensor",)
    assert small.warning is None, "too small for a word"


def test_stages_of_zero_that_keep_parameters_whole_ask_for_it():
    specs = {"w": ParamSpec(letters="DF", shape=(1024, 4096))}
    for zero in (0, 1, 2):
        (leaf,) = leaf_table(specs, make_layout(MeshPlan(fsdp=8, zero=zero)))
        assert (leaf.copies, leaf.unasked) == (8, ())
    (leaf,) = leaf_table(specs, make_layout(MeshPlan(fsdp=8)))
    assert (leaf.copies, leaf.partition) == (1, "fsdp,-")


def test_the_table_is_printed_with_its_sum():
    out = io.StringIO()
    leaves = leaf_table(param_specs(CFG), make_layout(MeshPlan(fsdp=8)))
    print_leaves(leaves, Console(file=out, width=120))
    text = out.getvalue()
    assert all(leaf.path in text for leaf in leaves)
    assert f"parameters: {sum(leaf.bytes for leaf in leaves) / 2**20:,.1f} MiB on each device" in text
