"""Train steps of four layers, compiled for real TPU topologies: bytes of arguments, collectives, and nothing large left whole."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.precision import parse
from lmeff.models.transformer import param_specs
from lmeff.parallel.collective import volumes
from lmeff.parallel.devices import topology
from lmeff.parallel.hlo import collectives
from lmeff.parallel.leaves import LARGE, leaf_table
from lmeff.parallel.mesh import AXES, MeshPlan, make_layout
from lmeff.parallel.volume import volume
from lmeff.parallel.workload import Step
from lmeff.train.state import abstract_batch
from tests.tpu.programs import CFG, MIXED, TOKENS, arguments, compiled, needs_libtpu, shard_bytes

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow, needs_libtpu]


class Case(NamedTuple):
    """A plan on a topology, and the collectives that its step must have: kind, axes, whether a loop over layers repeats it."""

    topology: str
    plan: MeshPlan
    rows: int
    expected: tuple[tuple[str, tuple[str, ...], bool], ...]


GATHERED = ("all-gather", ("fsdp",), True)  # a layer's weights
TURNED = ("all-to-all", ("fsdp",), False)  # embedded rows, and the head from a part of D to a part of V
ONCE = ("all-gather", ("fsdp",), False)  # in a region: a stage's weights before its loops, their gradients after
SUMMED = ("reduce-scatter", ("fsdp",), False)
STREAM = ("all-gather", ("tensor",), True)  # the residual stream on its way into a sublayer

CASES = {
    "v5e, fsdp x tensor": Case("v5e:4x4", MeshPlan(fsdp=4, tensor=4), 8, (GATHERED, TURNED, STREAM)),
    "v5p, pipe x fsdp x tensor": Case("v5p:4x4x4", MeshPlan(pipe=4, fsdp=4, tensor=4), 32, (ONCE, SUMMED, STREAM)),
    "two slices of v5e, dcn x fsdp": Case("v5e:4x4:2", MeshPlan(dcn=2, fsdp=16), 32, (GATHERED, TURNED)),
    "v6e, context x tensor": Case("v6e:4x4", MeshPlan(context=4, tensor=4), 4, (STREAM,)),
}


def program(name):
    case = CASES[name]
    return case, *compiled(case.topology, case.plan, case.rows)


def groups_over(layout, axes):
    """The groups of positions in the mesh that a collective over these axes joins; of the first slice, whose program each slice runs."""
    shape = [layout.mesh.shape[axis] for axis in AXES]
    own = [AXES.index(axis) for axis in axes]
    moved = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), own, range(-len(own), 0))
    rows = moved.reshape(-1, math.prod(shape[i] for i in own))
    chips = layout.mesh.size // layout.mesh.shape["dcn"]
    return frozenset(frozenset(map(int, row)) for row in rows if max(row) < chips)


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_the_shards_of_state_and_batch(name):
    case, state, step = program(name)
    layout = make_layout(case.plan, topology(case.topology))
    given = jax.tree.leaves((state, abstract_batch(case.rows, TOKENS, layout)))
    found = arguments(step.as_text())
    assert sorted(shape for shape, _, _ in found) == sorted(x.sharding.shard_shape(x.shape) for x in given)
    memory = step.memory_analysis()
    assert memory.argument_size_in_bytes == sum(size for _, size, _ in found), (
        "its own part, in tiles, and nothing else"
    )
    assert memory.alias_size_in_bytes >= sum(shard_bytes(x) for x in jax.tree.leaves(state)), (
        "the state is donated whole"
    )


@pytest.mark.parametrize("name", CASES)
def test_collectives_and_the_kernel(name):
    case, _, step = program(name)
    text, layout = step.as_text(), make_layout(case.plan, topology(case.topology))
    found = {(c.kind, c.groups, c.loop) for c in collectives(text)}
    for kind, axes, loop in case.expected:
        assert (kind, groups_over(layout, axes), loop) in found, (kind, axes, loop)
    kernels = sum('custom_call_target="tpu_custom_call"' in line and "splash" in line for line in text.splitlines())
    # Forward, again for the backward pass, and two gradients; between slices XLA peels a turn off the loops.
    assert kernels == 0 if case.plan.context > 1 else kernels >= 4


@pytest.mark.parametrize("name", CASES)
def test_nothing_large_lies_whole_where_it_should_be_cut(name):
    case, state, _ = program(name)
    layout = make_layout(case.plan, topology(case.topology))
    assert not [leaf.warning for leaf in leaf_table(param_specs(CFG), layout) if leaf.warning]
    ways = layout.size(("fsdp", "tensor"))
    leaves: Any = jax.tree_util.tree_leaves_with_path(state)
    large = [(path, x) for path, x in leaves if math.prod(x.shape) * jnp.dtype(x.dtype).itemsize > LARGE]
    assert len(large) == 15, "the embedding, the head and three stacked matrices, with two moments each"
    for path, x in large:
        own = ways * case.plan.pipe if "blocks" in jax.tree_util.keystr(path) else ways
        assert shard_bytes(x) * own == math.prod(x.shape) * jnp.dtype(x.dtype).itemsize, jax.tree_util.keystr(path)


def test_a_pipeline_has_one_switch_and_two_permutes_a_tick():
    _, _, step = program("v5p, pipe x fsdp x tensor")
    text = step.as_text()
    permutes = [c for c in collectives(text) if c.kind == "collective-permute" and "ppermute" in c.origin]
    assert len(permutes) == 2
    assert all(c.loop and not c.branches for c in permutes)
    assert all((a // 4) % 4 != (b // 4) % 4 or a // 16 != b // 16 for c in permutes for a, b in c.pairs)


def test_slices_exchange_gradients_alone():
    """Within a slice weights are gathered; over the network between slices go sums, and no collective of the chips spans both."""
    _, _, step = program("two slices of v5e, dcn x fsdp")
    text = step.as_text()
    kinds = {
        line.split('_xla_megascale_reduce_operation="')[1].split('"')[0]
        for line in text.splitlines()
        if "_xla_megascale_reduce_operation" in line
    }
    assert kinds == {"SUM"}
    for c in collectives(text):
        assert all(len({position // 16 for position in group}) == 1 for group in c.groups)


def by_use(moved):
    """Bytes over each set of axes, of all kinds of sums together: the compiler may scatter in float32 or sum in bfloat16, for the same bytes."""
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    for (kind, axes), sent in moved.items():
        use = "sum" if kind in ("all-reduce", "reduce-scatter") else kind
        found[use, axes] = found.get((use, axes), 0) + sent
    return found


@pytest.mark.parametrize("name", ["v5e, fsdp x tensor", "v6e, context x tensor"])
def test_large_volumes_are_near_what_the_formula_says(name):
    """In mixed precision, which no program for the CPU has. The compiler gathers this or that once more."""
    case, _, step = program(name)
    some = Step(cfg=CFG, plan=case.plan, devices=16, rows=case.rows, tokens=TOKENS, remat="full", policy=parse(MIXED))
    want, got = by_use(volume(some)), by_use(volumes(collectives(step.as_text()), some.degrees))
    small = 0.02 * sum(want.values())
    rows = {key: (got.get(key, 0), want.get(key, 0)) for key in got.keys() | want.keys()}
    print(
        f"\n{name}", *(f"{key}: {found:.0f} bytes, formula {told:.0f}" for key, (found, told) in rows.items()), sep="\n"
    )
    for key, (found, told) in rows.items():
        assert found == pytest.approx(told, rel=0.2, abs=small), key


def test_offloaded_moments_are_arguments_in_the_host_memory():
    case = CASES["v5e, fsdp x tensor"]
    state, step = compiled(case.topology, case.plan, case.rows, offload=True)
    moments = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.opt) if x.ndim]
    memory, found = step.memory_analysis(), arguments(step.as_text())
    assert sorted(shape for shape, _, host in found if host) == sorted(moments)
    assert memory.host_argument_size_in_bytes == sum(size for _, size, host in found if host)
    assert memory.argument_size_in_bytes == sum(size for _, size, host in found if not host)


def test_layers_that_differ_choose_between_kernels():
    """Once forward and once backward, with norms over heads that are on several chips."""
    cfg = dataclasses.replace(CFG, head_width=128, window=64, full_layers=(1,), norm_at="both", qk_norm="width")
    _, step = compiled("v5e:2x2", MeshPlan(fsdp=2, tensor=2), 4, "names", cfg=cfg)
    text = step.as_text()
    assert "splash" in text
    assert len(re.findall(r" conditional\(", text)) == 2
