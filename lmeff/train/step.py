"""The train step: one pure function, whatever is composed in it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmeff.compress.base import State
from lmeff.core.batch import Batch
from lmeff.core.specs import abstract
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, partitions, shardings
from lmeff.parallel.region import EXACT, Kept, accumulated, gradient, regional
from lmeff.train.local_updates import by_workers, spread, spread_shardings
from lmeff.train.loss_scale import PATIENCE, current_scale, find
from lmeff.train.optim import ema_update
from lmeff.train.pipelined import pipelined_gradients
from lmeff.train.runtime import Frozen, Metrics, Runtime
from lmeff.train.state import Trainable, TrainState, build_state, on_host, placed, state_shardings


def begin(rt: Runtime, state: TrainState) -> TrainState:
    """A fresh state with what the reducer and separate workers keep besides."""
    if rt.reducer is EXACT and rt.local is None:
        return state
    make, places = _beginning(rt, state)
    return jax.jit(make, out_shardings=places)(state)


def abstract_begin(rt: Runtime, state: TrainState) -> TrainState:
    """The state that a run begins with, as shapes with shardings; `state` is what `build_state` makes, as shapes."""
    if rt.reducer is EXACT and rt.local is None:
        return placed(state, state_shardings(state, rt.specs, rt.layout, offload=rt.offload))
    make, places = _beginning(rt, state)
    return placed(jax.eval_shape(make, state), places)


def abstract_start(rt: Runtime) -> TrainState:
    """The same from the runtime alone: all that a step's compilation has to know of the state. Nothing is allocated."""
    build = functools.partial(build_state, specs=rt.specs, compression=rt.compression, tx=rt.tx, ema=rt.ema is not None)
    return abstract_begin(rt, jax.eval_shape(build, abstract(rt.specs, rt.policy.params)))


def _beginning(rt: Runtime, state: TrainState) -> tuple[Callable[[TrainState], TrainState], TrainState]:
    """What makes the state that a run begins with of a fresh one, and where its leaves lie."""
    axes = () if rt.local is None else (rt.local.axis,)
    region = dataclasses.replace(rt, layout=rt.layout.within(axes)).region(state.trainable)

    def make(state: TrainState) -> TrainState:
        state = state._replace(reduction=rt.reducer.init(region, state.trainable))
        return spread(state, rt.layout.size(axes)) if axes else state

    reduction = jax.eval_shape(lambda: rt.reducer.init(region, state.trainable))
    cuts = rt.reducer.cuts(region, reduction)
    places = state_shardings(state, rt.specs, rt.layout, offload=rt.offload)
    places = places._replace(reduction=jax.tree.map(lambda _, cut: NamedSharding(rt.layout.mesh, cut), reduction, cuts))
    return make, spread_shardings(places, *axes) if axes else places


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
    with jax.named_scope("optimizer"):
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
        with jax.named_scope("teacher"):
            teacher = rt.teacher.run(layout, params, (), batch, frozen.teacher_ranges, rt.policy, "none")
        teacher = jax.lax.stop_gradient(teacher)
    return rt.objective(layout, student, teacher, batch)
