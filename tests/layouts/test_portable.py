"""A checkpoint belongs to no plan: saved under any, restored under any other bit for bit, and training goes on with the same numbers."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import pytest

from lmeff.parallel.rows import place_batch
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.digest import digests
from lmeff.train.runtime import Frozen
from lmeff.train.state import create_state, state_shardings
from tests.layouts.trial import MODELS, ROWS, Mesh, compile_step, make_batch, make_params, make_runtime

PLANS = {
    "one": Mesh(),
    "data": Mesh(data=8),
    "fsdp": Mesh(fsdp=8),
    "zero1": Mesh(fsdp=4, tensor=2, zero=1),
    "tensor": Mesh(tensor=4, data=2),
    "pipe4": Mesh(pipe=4, data=2, accumulate=2),  # six layers over four stages: not cut evenly
    "pipe2": Mesh(pipe=2, fsdp=2, tensor=2, accumulate=4, schedule="interleaved"),
    "context": Mesh(context=4, data=2),
    "expert": Mesh(expert=4, tensor=2),
    "dcn": Mesh(dcn=2, fsdp=4),
}
PLANS = {name: dataclasses.replace(mesh, model="six") for name, mesh in PLANS.items()} | {
    "moe-one": Mesh(model="moe"),
    "moe-expert": Mesh(expert=4, tensor=2, model="moe"),
    "moe-dcn": Mesh(dcn=2, fsdp=2, expert=2, model="moe"),
}


pytestmark = pytest.mark.slow


class Saved(NamedTuple):
    """A checkpoint after one step under a plan, the digests of its state, and the loss of the next step there."""

    directory: Any
    digests: dict[str, int]
    loss: float


class Bench(NamedTuple):
    """A compiled step, its state before the first step as specs, and two batches."""

    step: Any
    abstract: Any
    batches: list[Any]


def digests_of(state):
    """By the paths of a checkpoint, whose own digests are compiled for these."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return digests({jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat})


def runtime(mesh):
    return dataclasses.replace(make_runtime(mesh, "learned"), ema=0.9)


@functools.cache
def fresh(model):
    """A state before the first step, on the host."""
    rt = runtime(Mesh(model=model))
    params = make_params(MODELS[model], 0)
    return jax.device_get(create_state(params, rt.specs, rt.compression, rt.tx, rt.layout, ema=True))


@functools.cache
def bench(name):
    """The step of a plan."""
    rt, state = runtime(PLANS[name]), fresh(PLANS[name].model)
    where = state_shardings(state, rt.specs, rt.layout)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
    batches = [place_batch(make_batch(ROWS, seed=seed), rt.layout) for seed in (0, 1)]
    return Bench(compile_step(rt, abstract, batches[0], Frozen()), abstract, batches)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives a plan's checkpoint, made when it is first asked for."""

    @functools.cache
    def of(name):
        made = bench(name)
        state = jax.device_put(fresh(PLANS[name].model), jax.tree.map(lambda x: x.sharding, made.abstract))
        state, _ = made.step(state, made.batches[0], Frozen())
        directory = tmp_path_factory.mktemp(name)
        with Checkpointer(directory, keep=1) as checkpointer:
            checkpointer.save(1, state, {"plan": name})
        kept = digests_of(state)
        return Saved(directory, kept, float(made.step(state, made.batches[1], Frozen())[1]["loss"]))

    return of


@pytest.mark.parametrize("name", PLANS)
def test_goes_on_from_every_plan_s_checkpoint(name, saved):
    made = bench(name)
    for writer in (other for other, mesh in PLANS.items() if mesh.model == PLANS[name].model):
        directory, kept, loss = saved(writer)
        with Checkpointer(directory, keep=1) as checkpointer:
            state, metadata = checkpointer.restore(made.abstract)
        assert metadata == {"plan": writer}
        assert [x.sharding for x in jax.tree.leaves(state)] == [x.sharding for x in jax.tree.leaves(made.abstract)]
        assert digests_of(state) == kept, writer
        got = float(made.step(state, made.batches[1], Frozen())[1]["loss"])
        assert abs(got / loss - 1) <= 1e-6, writer
