"""Workers that train apart: equal to data parallelism where they should be, silent between meetings, resumed bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.parallel.compressed import Reduce, make_reducer
from lmeff.parallel.mesh import MeshPlan, place_batch
from lmeff.train.local_updates import LocalUpdates, turns
from lmeff.train.optim import OptimConfig
from lmeff.train.step import Frozen, make_train_step
from tests.layouts.hlo import collectives
from tests.layouts.trial import UNOPTIMIZED
from tests.train.tiny_run import dying, fingerprint, make_batch, make_job, make_runtime, make_state, run

MESH = MeshPlan(data=4, fsdp=2)
WORKERS = 4
ADAM = OptimConfig(warmup_steps=2)
SGD = OptimConfig(
    name="sgd", learning_rate=0.5, schedule="constant", warmup_steps=0, weight_decay=0.0, b1=0.0, clip_norm=None
)


def compiled(rt):
    """The step, a fresh state, and the compiled text."""
    state = make_state(rt)
    out = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_train_step(rt), donate_argnums=0, out_shardings=(out, None), compiler_options=UNOPTIMIZED)
    made = step.lower(state, place_batch(make_batch(0), rt.layout), Frozen()).compile()
    return made, state, made.as_text()


def steps(rt, step, state, count, start=0):
    for i in range(start, start + count):
        state, metrics = step(state, place_batch(make_batch(i), rt.layout), Frozen())
    return state, metrics


def numbers(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_meeting_every_step_is_data_parallel():
    plain = make_runtime(SGD, 5, mesh=MESH, compressed=False)
    local = LocalUpdates(every=1, outer_learning_rate=1.0, outer_momentum=0.0)
    apart = make_runtime(SGD, 5, mesh=MESH, compressed=False, local=local, steps=5)
    found = []
    for rt in (plain, apart):
        step, state, _ = compiled(rt)
        start = numbers(state.final)
        state, metrics = steps(rt, step, state, 5)
        found.append((numbers(state.final), float(metrics["loss"])))
    (want, loss), (got, own_loss) = found
    for before, a, b in zip(start, got, want, strict=True):
        assert np.abs(b - before).max() > 1e-3
        assert np.abs(a - b).max() <= 1e-6
    assert own_loss == pytest.approx(loss, rel=1e-6)


FRAGMENTS = LocalUpdates(every=4, fragments=2)


@functools.cache
def streaming():
    """Two fragments, gradients within a worker in eight bits, learned scales and masks."""
    rt = make_runtime(ADAM, 20, mesh=MESH, reducer=make_reducer(Reduce(), ()), local=FRAGMENTS, steps=20)
    return rt, *compiled(rt)


def crosses(c):
    """Whether a collective joins devices of different workers."""
    return any(len({device // (8 // WORKERS) for device in group}) > 1 for group in c.groups)


def test_between_meetings_only_metrics_cross_workers():
    _, _, _, text = streaming()
    across = [c for c in collectives(text) if crosses(c)]
    always = [c for c in across if not c.branches]
    assert always
    assert all(shape == () for c in always for shape in c.shapes), "scalars"
    assert {c.kind for c in across} == {"all-reduce"}
    within = [c for c in collectives(text) if not crosses(c)]
    assert {"all-gather", "all-to-all"} <= {c.kind for c in within}, "fsdp goes on inside a worker"


def test_a_fragment_is_its_part_of_the_bytes():
    _, _, state, text = streaming()
    whole = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.outer.trainable))
    found = {}
    for c in collectives(text):
        for branch in c.branches if crosses(c) else ():
            found[branch] = found.get(branch, 0) + c.bytes
    print(f"\nbytes of each branch {sorted(found.values())}, of all parameters on a device {whole}")
    assert sorted(found.values()) == [whole // 2, whole // 2, whole], "each fragment, and all after the last step"


def test_workers_meet_fragment_by_fragment():
    rt, step, state, _ = streaming()
    assert turns(FRAGMENTS) == (2, 0)
    state = jax.tree.map(jnp.copy, state)
    start = jax.tree.map(np.asarray, state.outer.trainable)

    def seen(state):
        up = np.asarray(state.trainable.params["blocks"]["mlp"]["up"])
        outer = np.asarray(state.outer.trainable.params["blocks"]["mlp"]["up"])
        moved = outer != start.params["blocks"]["mlp"]["up"]
        agree = (up == outer).all((0, 2, 3))
        return agree.tolist(), moved.any((1, 2)).tolist()

    state, _ = steps(rt, step, state, 1)
    assert seen(state) == ([False, False], [False, False])
    state, _ = steps(rt, step, state, 1, 1)
    assert seen(state) == ([True, False], [True, False]), "layer 0 after step 2"
    state, _ = steps(rt, step, state, 2, 2)
    assert seen(state) == ([False, True], [True, True]), "layer 1 after step 4"
    state, metrics = steps(rt, step, state, 16, 4)
    assert seen(state) == ([True, True], [True, True]), "all after the last"
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state.final, state.outer.trainable))
    for x in jax.tree.leaves(state.auxiliary):
        assert x.sharding.is_fully_replicated or x.ndim == 3, "one mask for all workers"
    assert np.isfinite(float(metrics["loss"]))


class Killed(Exception):
    pass


def killed():
    raise Killed


@pytest.mark.parametrize(
    "fields",
    [{"local": LocalUpdates(every=4, fragments=2)}, {"reduce": "int8"}, {"reduce": "powersgd"}],
    ids=["local", "int8", "powersgd"],
)
def test_resumed_is_bitwise_the_uninterrupted(tmp_path, fields):
    reduce = fields.pop("reduce", None)
    if reduce:
        fields = {"reducer": make_reducer(Reduce(method=reduce), make_runtime(ADAM, 7).specs)}
    rt = make_runtime(ADAM, 7, mesh=MESH, steps=7, **fields)
    config = {"rt": rt, "steps": 7, "checkpoint_every": 3}
    whole, _ = run(make_job(tmp_path / "whole", **config))
    with pytest.raises(Killed):
        run(make_job(tmp_path / "part", batches=dying(5, killed), **config))
    resumed, _ = run(make_job(tmp_path / "part", **config))
    assert fingerprint(resumed) == fingerprint(whole)
    assert fingerprint(resumed) != fingerprint(make_state(rt))


def test_config_refuses():
    for values, message in (
        ({"every": 0}, r"train\.local\.every: got 0, expected at least 1"),
        ({"axis": "fsdp"}, r"train\.local\.axis: got fsdp, expected one of dcn, data"),
        ({"outer_learning_rate": 0.0}, r"outer_learning_rate: got 0\.0, expected a positive number"),
        ({"outer_momentum": 1.0}, r"outer_momentum: got 1\.0, expected 0 to below 1"),
        ({"fragments": 51}, r"fragments: got 51, expected 1 to every"),
    ):
        with pytest.raises(ConfigError, match=message):
            LocalUpdates(**values)
