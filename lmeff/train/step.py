"""The train step: one pure function, whatever is composed in it."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmeff.compress.base import Compression, State
from lmeff.core.batch import Batch
from lmeff.core.ops import FLOATING, Numerics, Ranges
from lmeff.core.precision import Policy
from lmeff.core.tree import Tree
from lmeff.distill.objectives import Objective
from lmeff.models.config import ModelConfig
from lmeff.models.moe import auxiliary as routing_loss
from lmeff.models.transformer import Output, View, forward, identity_view, param_specs, substate
from lmeff.parallel.layers import layer_scan
from lmeff.parallel.mesh import Layout, partitions, shardings
from lmeff.parallel.pipeline import Counts, Losses, Member, Share, run_pipeline
from lmeff.parallel.program import compile_schedule
from lmeff.parallel.region import EXACT, Kept, Reducer, Region, accumulated, gradient, regional, split_rows
from lmeff.parallel.schedules import resolve
from lmeff.parallel.seam import layout_ops
from lmeff.parallel.slices import Slice, SliceModel
from lmeff.parallel.stages import layer_table, layers_present, take_layers
from lmeff.parallel.stash import STASHES
from lmeff.parallel.tables import Schedule
from lmeff.parallel.tiles import pinned
from lmeff.train.local_updates import LocalUpdates, by_workers, spread, spread_shardings
from lmeff.train.loss_scale import PATIENCE, current_scale, find
from lmeff.train.optim import ema_update
from lmeff.train.state import Trainable, TrainState, on_host, state_shardings

Metrics = dict[str, jax.Array]


class Model(NamedTuple):
    """A model as a step sees it: its shape, its numerics, and how its weights are viewed."""

    cfg: ModelConfig
    numerics: Numerics = FLOATING
    view: View = identity_view

    def run(
        self, layout: Layout, params: Any, state: Any, batch: Batch, ranges: Ranges | None, policy: Policy, remat: str
    ) -> Output:
        """Runs `forward` on a layout under the precision policy."""
        return forward(
            params,
            batch,
            self.cfg,
            make_ops=layout_ops(layout, self.numerics),
            view=self.view,
            view_state=state,
            ranges=ranges,
            remat=remat,
            unroll=layout.layers_at_once(remat),
            scan=layer_scan(layout),
            enter=functools.partial(pinned, layout),
            compute_dtype=policy.compute,
            output_dtype=policy.output,
        )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Everything static of a run, built once from the config and closed over by the step.

    steps: the last step of the run, after which workers with updates of their own (`local`) are brought together.
    """

    student: Model
    teacher: Model | None
    specs: Tree
    compression: Compression
    objective: Objective
    tx: optax.GradientTransformationExtraArgs
    layout: Layout
    policy: Policy
    accumulate: int = 1
    remat: str = "none"
    ema: float | None = None
    offload: bool = False
    reducer: Reducer = EXACT
    local: LocalUpdates | None = None
    steps: int = 0

    def region(self, trainable: Any) -> Region:
        """Where gradients are summed, if it is not left to XLA."""
        axes = self.layout.axes("BL")
        return Region(self.layout.within(axes), axes, partitions(trainable, self.specs, self.layout))


class Frozen(NamedTuple):
    """Arrays a step reads and never changes.

    teacher:        the teacher's parameters (arrays or packed leaves), or None.
    teacher_ranges: its calibrated activation ranges, or None; `ranges` are the student's.
    """

    teacher: Any = None
    teacher_ranges: Any = None
    ranges: Any = None


def begin(rt: Runtime, state: TrainState) -> TrainState:
    """A fresh state with what the reducer and separate workers keep besides."""
    if rt.reducer is EXACT and rt.local is None:
        return state
    axes = () if rt.local is None else (rt.local.axis,)
    region = dataclasses.replace(rt, layout=rt.layout.within(axes)).region(state.trainable)

    def make(state: TrainState) -> TrainState:
        state = state._replace(reduction=rt.reducer.init(region, state.trainable))
        return spread(state, rt.layout.size(axes)) if axes else state

    reduction = jax.eval_shape(lambda: rt.reducer.init(region, state.trainable))
    cuts = rt.reducer.cuts(region, reduction)
    places = state_shardings(state, rt.specs, rt.layout, offload=rt.offload)
    places = places._replace(reduction=jax.tree.map(lambda _, cut: NamedSharding(rt.layout.mesh, cut), reduction, cuts))
    return jax.jit(make, out_shardings=spread_shardings(places, *axes) if axes else places)(state)


def make_train_step(rt: Runtime) -> Callable[[TrainState, Batch, Frozen], tuple[TrainState, Metrics]]:
    """The step `(state, batch, frozen) -> (state, metrics)`, to be jitted with the state donated."""
    if rt.local is None:
        return functools.partial(advance, rt)
    # Masks belong to all workers: they follow the outer parameters.
    apart = rt.compression._replace(update=lambda params, grads, state, step: state.auxiliary)
    layout = rt.layout.within((rt.local.axis,))
    own = functools.partial(advance, dataclasses.replace(rt, layout=layout, compression=apart, local=None))
    return by_workers(own, rt.local, rt.layout, rt.compression, rt.steps)


def advance(rt: Runtime, state: TrainState, batch: Batch, frozen: Frozen) -> tuple[TrainState, Metrics]:
    """One step of one model."""
    state = move_moments(rt, state, to_host=False)
    scaled, scale = find(state.opt) is not None, current_scale(state.opt)
    kept = Kept(state.reduction, state.step)
    grads, sums, reduction = gradients(rt, state.trainable, state.auxiliary, batch, frozen, scale, kept)
    if scaled:
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
    grads = place_gradients(rt, grads)
    updates, opt = rt.tx.update(grads, state.opt, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    auxiliary = rt.compression.update(
        trainable.params, grads.params, State(trainable.compression, state.auxiliary), state.step + 1
    )
    ema = None if rt.ema is None else ema_update(state.ema, trainable, rt.ema)
    metrics = {**sums, "grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    made = TrainState(trainable, opt, auxiliary, ema, state.step + 1, reduction)
    if scaled:
        made, metrics = skip_overflow(state, made, metrics)
    return move_moments(rt, made, to_host=True), metrics


def move_moments(rt: Runtime, state: TrainState, *, to_host: bool) -> TrainState:
    """Where the optimizer's state is offloaded: its arrays to the host's memory, or to the device's."""
    if not rt.offload:
        return state
    places = shardings(state.opt, rt.specs, rt.layout.of_optimizer)
    if to_host:
        places = on_host(state.opt, places)
    else:
        places = jax.tree.map(lambda place: place.with_memory_kind("device"), places)
    return state._replace(opt=jax.device_put(state.opt, places))


def place_gradients(rt: Runtime, grads: Trainable) -> Trainable:
    """Gradients where the optimizer's state is: each device reduces, and updates, its part of them.

    At stage 1 of ZeRO they are reduced whole first.
    """
    layout = rt.layout
    if layout.plan.zero in (0, 3) or layout.single:
        return grads
    for place in (layout, layout.of_optimizer)[layout.plan.zero - 1 :]:
        where = partitions if layout.manual else shardings
        grads = jax.lax.with_sharding_constraint(grads, where(grads, rt.specs, place))
    return grads


def skip_overflow(old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """`new`, or where its gradient overflowed, `old` bit for bit but for the loss scale and the position in the data.

    Metrics: "loss_scale", the factor of the next step, and "skipped", how many updates were skipped in all.
    """
    loss_scale = find(new.opt)
    assert loss_scale is not None
    guard = loss_scale.guarded
    taken = guard.last_finite | (guard.notfinite_count > PATIENCE)
    kept = jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)
    told = {"loss_scale": loss_scale.scale, "skipped": guard.total_notfinite.astype(jnp.float32)}
    return kept._replace(opt=new.opt, step=new.step), {**metrics, **told}


def gradients(
    rt: Runtime, trainable: Trainable, auxiliary: Any, batch: Batch, frozen: Frozen, scale: Any, kept: Kept
) -> tuple[Trainable, Metrics, Any]:
    """Gradients (times `scale`), mean metrics over all weighted tokens of the global batch, and the reducer's next state.

    The divisor is the weight of the whole batch and not of a shard or microbatch, so every mesh and every accumulation gives the same numbers.
    """
    total = jnp.maximum(batch.weights.sum(), 1.0)

    def loss_fn(
        layout: Layout, trainable: Trainable, auxiliary: Any, batch: Batch, given: tuple[Frozen, Any]
    ) -> tuple[jax.Array, Metrics]:
        frozen, factor = given
        objective, sums = loss_sums(rt, layout, trainable, auxiliary, batch, frozen)
        return objective * factor, {**sums, "objective": objective}

    given, axes = (frozen, scale / total), rt.layout.axes("BL")
    if rt.accumulate > 1 or "pipe" in axes or rt.reducer is not EXACT:
        cuts = (*(partitions(x, rt.specs, rt.layout) for x in (trainable, auxiliary)), frozen_partitions(rt, frozen))
        local = functools.partial(accumulated, loss_fn, rt.accumulate)
        if "pipe" in axes:
            local = lambda *given: pipelined_gradients(rt, *given)[:2]  # noqa: E731
        run = regional(local, rt.layout, axes, cuts, rt.reducer)
        grads, sums, reduction = run(trainable, auxiliary, batch, given, kept)
    else:
        grads, sums = gradient(loss_fn, rt.layout, trainable, auxiliary, batch, given)
        reduction = kept.state
    return grads, {name: value / total for name, value in sums.items()}, reduction


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

    return {**params, "blocks": jax.tree.map(take, parts, params["blocks"], is_leaf=lambda x: isinstance(x, P))}


def member(
    model: Model, layout: Layout, schedule: Schedule, shown: Any, ranges: Ranges | None, policy: Policy, remat: str
) -> Member:
    """A model as the pipeline runs it, and this stage's share of it."""
    table = layer_table(schedule, model.cfg.layers)
    ranges = ranges or {}
    own = {site: take_layers(x, table, cut=False) for site, x in ranges.items() if site != "head"}
    chunks = Slice(shown["blocks"], own, layers_present(table))
    outer = {key: part for key, part in shown.items() if key != "blocks"}
    head = {site: x for site, x in ranges.items() if site == "head"}
    make = functools.partial(layout_ops, layout, model.numerics)
    static = SliceModel(model.cfg, make, policy.compute, policy.output, remat)
    return Member(static, Share(chunks, outer, head))


def frozen_partitions(rt: Runtime, frozen: Frozen) -> Any:
    """How what `gradients` is given besides the state lies on the mesh."""
    whole = jax.tree.map(lambda _: P(), (frozen.teacher_ranges, frozen.ranges))
    teacher = None if rt.teacher is None else partitions(frozen.teacher, param_specs(rt.teacher.cfg), rt.layout)
    return Frozen(teacher, *whole), P()


def loss_sums(
    rt: Runtime, layout: Layout, trainable: Trainable, auxiliary: Any, batch: Batch, frozen: Frozen
) -> tuple[jax.Array, Metrics]:
    """The objective and its metrics, summed over weighted tokens."""
    state = State(trainable.compression, auxiliary)
    student = rt.student.run(layout, trainable.params, state, batch, frozen.ranges, rt.policy, rt.remat)
    teacher = None
    if rt.teacher is not None:
        params = jax.lax.stop_gradient(frozen.teacher)
        teacher = rt.teacher.run(layout, params, (), batch, frozen.teacher_ranges, rt.policy, "none")
        teacher = jax.lax.stop_gradient(teacher)
    return rt.objective(layout, student, teacher, batch)
