"""The loop: resuming is exact, metrics have neither gaps nor doubles, a run that diverges stops."""

import json

import jax
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.parallel.mesh import MeshPlan
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.loop import Diverged, TrainConfig
from lmeff.train.metrics import read_metrics
from lmeff.train.state import with_compression
from tests.train.tiny_run import OPTIM, STEPS, dying, fingerprint, make_batch, make_job, make_runtime, make_state, run

LOGGED = [1, 3, 4, 6, 8, 9, 12]


class Killed(Exception):
    pass


def killed():
    raise Killed


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run: its folder and its final state."""
    directory = tmp_path_factory.mktemp("straight")
    evaluations = []
    state, cost = run(make_job(directory, evaluate=lambda s: evaluations.append(int(s.step)) or 0.5, eval_every=4))
    return directory, state, cost, evaluations


def test_the_state_moves(straight):
    _, state, _, _ = straight
    start = make_state(make_runtime(OPTIM, STEPS))
    masks = jax.tree.leaves(state.auxiliary)
    assert 0.02 < 1 - np.mean([np.mean(m) for m in masks]) < 0.6  # the masks followed the weights
    for part in ("trainable", "ema"):
        before, after = jax.tree.leaves(getattr(start, part)), jax.tree.leaves(getattr(state, part))
        assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True)), part
    assert len(jax.tree.leaves(state.trainable.compression)) == 7  # a learned scale for each matrix of the blocks
    assert int(state.step) == STEPS


@pytest.mark.parametrize("at", [3, 8, 11])
def test_resumed_is_bitwise_the_uninterrupted(straight, tmp_path, at):
    whole, state, cost, _ = straight
    with pytest.raises(Killed):
        run(make_job(tmp_path, batches=dying(at, killed), evaluate=lambda s: 0.5, eval_every=4))
    resumed, again = run(make_job(tmp_path, evaluate=lambda s: 0.5, eval_every=4))
    assert fingerprint(resumed) == fingerprint(state)
    assert jax.tree.structure(resumed) == jax.tree.structure(state)
    rows, expected = read_metrics(tmp_path / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == LOGGED
    exact = ("step", "loss", "objective", "grad_norm", "update_norm", "learning_rate", "tokens")
    assert [[row[k] for k in exact] for row in rows] == [[row[k] for k in exact] for row in expected]
    assert again.tokens == cost.tokens == STEPS * 8 * 32


def test_resumed_on_another_mesh(straight, tmp_path):
    _, state, _, _ = straight
    with pytest.raises(Killed):
        run(make_job(tmp_path, batches=dying(9, killed)))
    mesh = MeshPlan(data=2, fsdp=2, tensor=2)
    resumed, _ = run(make_job(tmp_path, mesh=mesh))
    assert len(resumed.trainable.params["blocks"]["mlp"]["up"].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(resumed.trainable), jax.tree.leaves(state.trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_evaluates_between_steps(straight):
    directory, _, _, evaluations = straight
    assert evaluations == [4, 8, 12]
    rows = read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12]
    assert {row["eval_loss"] for row in rows if "eval_loss" in row} == {0.5}


def test_finished_run_trains_no_more(straight):
    directory, state, cost, _ = straight
    before = (directory / "metrics.jsonl").read_text()
    again, nothing = run(make_job(directory, batches=dying(0, killed)))
    assert fingerprint(again) == fingerprint(state)
    assert nothing == (0.0, 0.0, cost.tokens)
    assert [json.loads(x) for x in before.splitlines()] == read_metrics(directory / "metrics.jsonl")


def test_refuses_to_mix_runs(straight):
    with pytest.raises(CheckpointError, match="step 12, and resuming is off"):
        run(make_job(straight[0]), resume=False)


def test_checkpoints_hold_the_state_of_their_step_though_it_was_donated(straight, tmp_path):
    """Writing goes on while the next steps overwrite the buffers of the state that is being written."""
    rt = make_runtime(OPTIM, STEPS)
    with pytest.raises(Killed):
        run(make_job(tmp_path, rt=rt, checkpoint_every=1, keep=20, batches=dying(6, killed)))
    short, _ = run(make_job(tmp_path / "short", rt=rt, steps=5))
    for step in range(6, 5, -1):  # drop the latest, so that step 5 is
        with Checkpointer(tmp_path / "checkpoints", keep=20) as c:
            assert c.latest_step() == step
            c._manager(writing=True).delete(step)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), short)
    with Checkpointer(tmp_path / "checkpoints", keep=20) as c:
        assert fingerprint(c.restore(abstract)[0]) == fingerprint(short)


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    def poisoned(start):
        for step in range(start, STEPS):
            batch = make_batch(step)
            yield batch if step < 5 else batch._replace(weights=np.full_like(batch.weights, np.nan))

    with pytest.raises(Diverged, match=r"(loss|update_norm) is nan at step 6.*Lower optim.learning_rate"):
        run(make_job(tmp_path, batches=poisoned))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 6
    assert rows[-1]["loss"] is None
    with Checkpointer(tmp_path / "checkpoints", keep=2) as c:
        assert c.latest_step() == 4
    # The same where the step that diverges is saved but not logged.
    with pytest.raises(Diverged, match="at step 6"):
        run(make_job(tmp_path / "b", batches=poisoned, log_every=100, checkpoint_every=2))
    with Checkpointer(tmp_path / "b" / "checkpoints", keep=2) as c:
        assert c.latest_step() == 4


def test_logging_waits_for_no_step_that_is_not_logged(tmp_path, monkeypatch):
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or get(x))
    run(make_job(tmp_path, log_every=6, checkpoint_every=None))
    assert len(fetched) == 3 + 1  # steps 1, 6 and 12, and the digests of the checkpoint at the end


def test_config_refuses():
    for field in ("batch", "accumulate", "log_every", "eval_every", "checkpoint_every", "keep"):
        with pytest.raises(ConfigError, match=f"train.{field}: got 0, expected at least 1"):
            TrainConfig(**{field: 0})
    assert TrainConfig(steps=0).steps == 0


def test_what_goes_on_with_an_earlier_compression_averages_from_there(straight):
    earlier = straight[1]
    state = with_compression(make_state(make_runtime(OPTIM, STEPS)), earlier.compression)
    for part in (state.trainable, state.ema):
        jax.tree.map(np.testing.assert_array_equal, part.compression, earlier.trainable.compression)
    jax.tree.map(np.testing.assert_array_equal, state.auxiliary, earlier.auxiliary)
