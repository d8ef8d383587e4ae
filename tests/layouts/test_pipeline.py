"""The pipeline executor: what it counts, holds, compiles to, and multiplies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmeff.core.ops import FLOATING
from lmeff.models.transformer import sites
from lmeff.parallel.hlo import collectives, computations
from lmeff.parallel.mesh import partitions
from lmeff.parallel.schedule_csv import to_csv
from lmeff.parallel.schedules import build
from lmeff.parallel.seam import layout_ops
from lmeff.parallel.simulate import simulate
from lmeff.parallel.slices import (
    Out,
    Slice,
    SliceModel,
    forward_slice,
    products_of,
    pull_slice,
    save_slice,
    split_weights,
    weight_gradients,
)
from lmeff.parallel.stages import layer_table
from lmeff.train.pipelined import pipelined_gradients
from lmeff.train.step import frozen_partitions, make_train_step
from tests.hurry import OPTIMIZED
from tests.layouts.trial import (
    MODELS,
    UNOPTIMIZED,
    Mesh,
    compile_step,
    make_batch,
    make_inputs,
    make_params,
    make_runtime,
)

ROWS = 8  # of a microbatch


@functools.cache
def program(schedule, microbatches, stash="residuals"):
    """(HLO text, bytes of temporaries) of a step over 4 stages of one layer each."""
    mesh = Mesh(pipe=4, accumulate=microbatches, schedule=schedule, stash=stash, model="four")
    rt = make_runtime(mesh, "plain")
    compiled = compile_step(rt, *make_inputs(rt, mesh, rows=ROWS * microbatches))
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_microbatches():
    few, many = (program("1f1b", m)[1] for m in (8, 32))
    gpipe = program("gpipe", 32)[1]
    print(f"\ntemporary bytes: 1f1b {few} at m=8, {many} at m=32; gpipe {gpipe}, {gpipe / many:.1f} times as much")
    assert many <= 1.02 * few
    assert gpipe >= 4 * many


def test_the_loop_has_one_switch_and_two_permutes():
    text, _ = program("1f1b", 32)
    permutes = [c for c in collectives(text) if c.kind == "collective-permute"]
    assert len(permutes) == 2
    assert permutes[0].loop
    assert permutes[0].inside == permutes[1].inside
    body = computations(text)[permutes[0].inside]
    switches = [line for line in body if re.search(r" conditional\(", line)]
    assert len(switches) == 1
    assert len(re.search(r"branch_computations=\{([^}]*)\}", switches[0]).group(1).split(",")) == 4
    assert len(text) < 1.05 * len(program("1f1b", 8)[0])


def test_a_table_in_a_file_gives_the_program_of_its_schedule(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text(to_csv(build("zb-h1", 4, 4)))

    def lowered(schedule):
        mesh = Mesh(pipe=4, accumulate=4, schedule=schedule, model="four")
        rt = make_runtime(mesh, "plain")
        return jax.jit(make_train_step(rt)).lower(*make_inputs(rt, mesh, rows=ROWS)).as_text()

    assert lowered(str(file)) == lowered("zb-h1") != lowered("1f1b")


@pytest.mark.parametrize(
    ("schedule", "chunks", "stash"), [("1f1b", 1, "residuals"), ("zb-h1", 1, "input"), ("interleaved", 2, "input")]
)
def test_what_the_executor_counts_is_in_the_table(schedule, chunks, stash):
    mesh = Mesh(pipe=2, accumulate=4, schedule=schedule, chunks=chunks, stash=stash, model="four")
    rt = make_runtime(mesh, "plain")
    state, batch, frozen = make_inputs(rt, mesh, rows=8)
    layout = rt.layout.within(("pipe",))

    def count(trainable, auxiliary, batch, given):
        return jax.tree.map(lambda x: x[None], pipelined_gradients(rt, layout, trainable, auxiliary, batch, given)[2])

    cuts = (
        *(partitions(x, rt.specs, rt.layout) for x in (state.trainable, state.auxiliary)),
        P(),
        frozen_partitions(rt, frozen),
    )
    run = jax.shard_map(
        count, mesh=rt.layout.mesh, in_specs=cuts, out_specs=P("pipe"), axis_names={"pipe"}, check_vma=False
    )
    counts = jax.jit(run, compiler_options=UNOPTIMIZED)(state.trainable, state.auxiliary, batch, (frozen, 1.0))
    want = simulate(build(schedule, 2, 4, chunks))
    np.testing.assert_array_equal(counts.idle, want.idle)
    np.testing.assert_array_equal(counts.peak, want.in_flight)
    np.testing.assert_array_equal(counts.live, 0)


@pytest.fixture(scope="module")
def passes():
    """The three passes of a slice of two layers, jitted, with their arguments: F, F that saves, B, W, and plain automatic differentiation."""
    cfg = MODELS["grouped"]
    layout = Mesh().layout
    model = SliceModel(cfg, functools.partial(layout_ops, layout, FLOATING), jnp.float32, jnp.float32)
    piece = Slice(jax.tree.map(jnp.asarray, make_params(cfg, 0)["blocks"]), {}, None)
    batch = jax.tree.map(jnp.asarray, make_batch(4))
    x, d_y = (jax.random.normal(jax.random.key(i), (4, 16, cfg.width)) for i in (0, 1))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), piece)
    products = products_of(model, shapes, x, batch)

    def plain(blocks, x, d_y):
        return jax.vjp(lambda b, x: forward_slice(model, Slice(b, {}, None), x, batch).y_BTD, blocks, x)[1](d_y)

    jit = functools.partial(jax.jit, compiler_options=OPTIMIZED)
    made = {
        "F": jit(lambda: forward_slice(model, piece, x, batch)),
        "save": jit(lambda: save_slice(model, products, piece, x, batch)),
        "B": jit(lambda saved: pull_slice(model, products, piece, saved, batch, Out(d_y, {}))),
        "W": jit(lambda inputs, d: weight_gradients(model, products, piece, inputs, d, batch)),
        "plain": jit(plain),
    }
    return made, model, piece, products, x, d_y


def test_weight_gradients_are_bit_equal_and_cost_as_many_products_as_the_forward_pass(passes):
    made, model, piece, products, x, d_y = passes
    out, saved = made["save"]()
    np.testing.assert_array_equal(out.y_BTD, made["F"]().y_BTD)
    d_x, d_others, cotangents = made["B"](saved)
    d_matrices = made["W"](saved.inputs, cotangents)
    want_blocks, want_x = made["plain"](piece.blocks, x, d_y)
    want_matrices, want_others = split_weights(model, want_blocks)
    jax.tree.map(np.testing.assert_array_equal, d_matrices, want_matrices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), d_others, want_others)
    np.testing.assert_allclose(d_x, want_x, rtol=1e-5, atol=1e-5)
    weights = made["W"].lower(saved.inputs, cotangents).compile().as_text()
    assert len(re.findall(r" dot\(", weights)) == len(products.outputs) == len(sites(model.cfg)) - 1


@pytest.mark.parametrize(
    ("schedule", "stages", "chunks", "layers"), [("1f1b", 4, 1, 6), ("interleaved", 2, 3, 12), ("zbv", 2, 2, 7)]
)
def test_every_layer_has_one_home(schedule, stages, chunks, layers):
    made = build(schedule, stages, stages, chunks)
    table = layer_table(made, layers)
    assert sorted(table[table >= 0]) == list(range(layers))
    in_order = [table[made.home(index)] for index in range(made.slices)]
    assert [n for row in in_order for n in row if n >= 0] == list(range(layers))
    sizes = [(row >= 0).sum() for row in in_order]
    assert max(sizes) - min(sizes) <= 1
