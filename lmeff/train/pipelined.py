"""The gradients of a step whose layers are pipelined: from what is trained to what a stage holds, and back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmeff.compress.base import State
from lmeff.core.batch import Batch
from lmeff.core.ops import Ranges
from lmeff.core.precision import Policy
from lmeff.models.moe import auxiliary as routing_loss
from lmeff.models.transformer import Output, param_specs, substate
from lmeff.parallel.mesh import Layout, is_cut, partitions
from lmeff.parallel.pipeline import Counts, Losses, Member, Share, run_pipeline
from lmeff.parallel.program import compile_schedule
from lmeff.parallel.region import split_rows
from lmeff.parallel.schedules import resolve
from lmeff.parallel.seam import layout_ops
from lmeff.parallel.slices import Slice, SliceModel
from lmeff.parallel.stages import layer_table, layers_present, own_layers, take_layers
from lmeff.parallel.stash import STASHES
from lmeff.parallel.tables import Schedule
from lmeff.train.runtime import Frozen, Metrics, Model, Runtime
from lmeff.train.state import Trainable


def pipelined_gradients(
    rt: Runtime, layout: Layout, trainable: Trainable, auxiliary: Any, batch: Batch, given: tuple[Frozen, Any]
) -> tuple[Trainable, Metrics, Counts]:
    """Gradients and sums of the rows of a group from this stage of the pipeline, and what the stage counted; inside a region.

    Weights are seen by the compression once a step. The pipeline differentiates by what is seen, and one pull takes that back to what is trained.
    """
    frozen, factor = given
    plan = layout.plan
    schedule = resolve(plan.schedule, layout.mesh.shape["pipe"], rt.accumulate, plan.chunks)

    def seen(trainable: Trainable) -> Any:
        state = State(trainable.compression, auxiliary)
        params = {k: rt.student.view(p, substate(state, k)) for k, p in trainable.params.items()}
        return staged(rt.student, layout, schedule, params)

    def loss(student: Output, teacher: Output | None, batch: Batch) -> tuple[jax.Array, Metrics]:
        objective, sums = rt.objective(layout, student, teacher, batch)
        return objective * factor, {**sums, "objective": objective}

    def layers(kept: Metrics) -> tuple[jax.Array, Metrics]:
        if not kept:
            return jnp.zeros(()), {}
        routing, told = routing_loss(kept, rt.student.cfg)
        return routing * factor, {**told, "objective": routing}

    shown, pull = jax.vjp(seen, trainable)
    student = member(rt.student, layout, schedule, shown, frozen.ranges, rt.policy, rt.remat)
    teacher = None
    if rt.teacher is not None:
        shown_teacher = staged(rt.teacher, layout, schedule, frozen.teacher)
        teacher = member(rt.teacher, layout, schedule, shown_teacher, frozen.teacher_ranges, rt.policy, "none")
    pieces = split_rows(batch, rt.accumulate)
    stash = STASHES[plan.stash]
    program = compile_schedule(schedule, stash.until)
    d_blocks, d_outer, sums, counts = run_pipeline(
        program, stash, layout, student, teacher, Losses(loss, layers), pieces
    )
    grads = {"blocks": d_blocks, **d_outer}
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, shown)
    return pull(grads)[0], sums, counts


def staged(model: Model, layout: Layout, schedule: Schedule, params: Any) -> Any:
    """Seen parameters with the layers that this stage holds, [v, n, ...]; what other axes cut stays cut on the way."""
    table, cut = layer_table(schedule, model.cfg.layers), model.cfg.layers % schedule.stages == 0
    parts = partitions(params, param_specs(model.cfg), layout)["blocks"]

    def take(part: P, x: jax.Array) -> jax.Array:
        own = functools.partial(take_layers, table=table, cut=cut)
        return layout.on_parts(own, (part,), P(None, None, *part[1:]))(x) if any(part) else own(x)

    return {**params, "blocks": jax.tree.map(take, parts, params["blocks"], is_leaf=is_cut)}


def member(
    model: Model, layout: Layout, schedule: Schedule, shown: Any, ranges: Ranges | None, policy: Policy, remat: str
) -> Member:
    """A model as the pipeline runs it, and this stage's share of it."""
    table = layer_table(schedule, model.cfg.layers)
    ranges = ranges or {}
    own = {site: take_layers(x, table, cut=False) for site, x in ranges.items() if site != "head"}
    chunks = Slice(shown["blocks"], own, layers_present(table), own_layers(table) if model.cfg.mixed else None)
    outer = {key: part for key, part in shown.items() if key != "blocks"}
    head = {site: x for site, x in ranges.items() if site == "head"}
    make = functools.partial(layout_ops, layout, model.numerics)
    static = SliceModel(model.cfg, make, policy.compute, policy.output, remat)
    return Member(static, Share(chunks, outer, head))
