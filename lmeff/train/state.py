"""What a run carries from step to step, and how it comes to life already sharded."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmeff.compress.base import Compression, State
from lmeff.core.batch import Batch
from lmeff.core.tree import Tree
from lmeff.models.remat import HOST
from lmeff.parallel.activations import refuse_without_host_memory
from lmeff.parallel.mesh import Layout, shardings


class Trainable(NamedTuple):
    """What is differentiated and given to the optimizer: the parameters and the trainable part of the compression."""

    params: Any
    compression: Any


class TrainState(NamedTuple):
    """The whole state of a run. Together with the config it determines every later step.

    auxiliary: the compression's other state (masks, ranges).
    ema:       exponential moving average of `trainable` in float32, from its start on; or None.
    step:      int32, steps taken; also the position in the data.
    reduction: what the reducer of gradients keeps, device by device; or None.
    outer:     with local updates (`train.local_updates`), what all workers share; `trainable`, `opt` and `reduction` then have a leading dim of
               workers. None otherwise.
    """

    trainable: Trainable
    opt: Any
    auxiliary: Any
    ema: Any
    step: jax.Array
    reduction: Any = None
    outer: Any = None

    @property
    def compression(self) -> State:
        """The compression's state, both parts."""
        return State(self.trainable.compression, self.auxiliary)

    @property
    def final(self) -> Trainable:
        """What the run gives: the average or the outer parameters where there are any, in the dtypes of `trainable`."""
        wide = self.ema if self.outer is None else self.outer.trainable
        if wide is None:
            return self.trainable
        return jax.tree.map(lambda found, x: found.astype(x.dtype), wide, self.trainable)


def build_state(
    params: Any, specs: Tree, compression: Compression, tx: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """A fresh state around `params`. Pure: runs under `jax.eval_shape` and `jax.jit`."""
    made = compression.init(params, specs)
    trainable = Trainable(params, made.trainable)
    average = _average(trainable) if ema else None
    return TrainState(trainable, tx.init(trainable), made.auxiliary, average, jnp.int32(0))


def _average(trainable: Trainable) -> Trainable:
    return jax.tree.map(lambda x: x.astype(jnp.float32), trainable)


def with_compression(state: TrainState, compression: State) -> TrainState:
    """A fresh state that goes on with the compression's state of an earlier one."""
    trainable = state.trainable._replace(compression=compression.trainable)
    ema = None if state.ema is None else _average(trainable)
    return state._replace(trainable=trainable, auxiliary=compression.auxiliary, ema=ema)


def state_shardings(state: TrainState, specs: Tree, layout: Layout, *, offload: bool = False) -> Any:
    """Where every leaf of a state lies; the optimizer's and the average by the stage of ZeRO.

    offload: the optimizer's arrays (its moments) lie in the host's memory between steps, cut in the same way.
    """
    placed = state._replace(opt=None, ema=None)
    owned = TrainState(None, state.opt, None, state.ema, None)  # type: ignore[arg-type]
    own, rest = shardings(owned, specs, layout.of_optimizer), shardings(placed, specs, layout)
    opt = on_host(state.opt, own.opt) if offload else own.opt
    return rest._replace(opt=opt, ema=own.ema)


def on_host(tree: Any, places: Any) -> Any:
    """Shardings with every array moved to the host's memory; scalars (counters) stay on the device."""
    return jax.tree.map(lambda x, place: place.with_memory_kind(HOST) if x.ndim else place, tree, places)


def abstract_batch(rows: int, tokens: int, layout: Layout) -> Batch:
    """A batch [B, T] as shapes with shardings, to compile for."""

    def leaf(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, tokens), dtype, sharding=layout.sharding("BS", (rows, tokens)))

    ids = leaf(jnp.int32)
    return Batch(ids, ids, ids, ids, leaf(jnp.float32))


def with_shardings(tree: Any, specs: Tree, layout: Layout) -> Any:
    """`jax.ShapeDtypeStruct`s with the layout's shardings in place of the leaves of `tree`."""
    return placed(tree, shardings(tree, specs, layout))


def placed(tree: Any, places: Any) -> Any:
    """The shapes and dtypes of a tree with these shardings."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def create_state(
    params: Any,
    specs: Tree,
    compression: Compression,
    tx: optax.GradientTransformation,
    layout: Layout,
    *,
    ema: bool,
    offload: bool = False,
    donate: bool = False,
) -> TrainState:
    """A state around `params` (host or device arrays), every leaf born with its sharding.

    donate: whether `params` become the state's own; they are not to be used again.
    """
    if offload:
        refuse_without_host_memory(layout, "optim.offload: got True")

    def build(params: Any) -> TrainState:
        return build_state(params, specs, compression, tx, ema=ema)

    out = state_shardings(jax.eval_shape(build, params), specs, layout, offload=offload)
    placed = jax.device_put(params, shardings(params, specs, layout), donate=donate)
    return jax.jit(build, out_shardings=out, donate_argnums=0 if donate else ())(placed)
