"""A training loop that is told to stop saves the step it is at, and resumed it ends bit for bit as if it had not been."""

import dataclasses
import functools
import threading

import pytest

from lmeff.core.errors import Preempted
from lmeff.parallel import preemption
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.rows import place_batch
from lmeff.train import loop
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.loop import UNMEASURED
from lmeff.train.metrics import read_metrics
from lmeff.train.optim import OptimConfig
from lmeff.train.runtime import Frozen
from tests.train.tiny_run import (
    OPTIM,
    ROWS,
    STEPS,
    endless,
    fingerprint,
    make_batch,
    make_job,
    make_runtime,
    make_state,
    run,
)

BATCHES = 3  # of an evaluation
COMPILE = loop.compile_step
CLOCK = ("time", "tokens_per_second")


@pytest.fixture
def hears(monkeypatch):
    """Gives the process that was not told yet; call it again for the one that the command starts next."""

    def again():
        monkeypatch.setattr(preemption, "_told", threading.Event())
        monkeypatch.setattr(preemption, "_ending", threading.Event())

    again()
    return again


def loss_of(state, tell_at=None):
    """A held-out loss that depends on the state; in its batch `tell_at` the process is told to stop."""
    for batch in range(BATCHES):
        preemption.safe_point()
        if batch == tell_at:
            preemption._told.set()
    preemption.safe_point()
    return float(sum(fingerprint(state).values()) % 1009)


@pytest.fixture
def tell(monkeypatch):
    """Tells the process to stop while a step is taken."""

    def at(step, compile_step=compile_once):
        def compiled(*given):
            program = compile_step(*given)

            def run(state, batch, frozen):
                if int(state.step) + 1 == step:
                    preemption._told.set()
                return program(state, batch, frozen)

            return run

        monkeypatch.setattr(loop, "compile_step", compiled)

    return at


@functools.cache
def program():
    """The step of all runs here but the slow ones."""
    rt = make_runtime(OPTIM, STEPS)
    return COMPILE(rt, make_state(rt), place_batch(make_batch(0), rt.layout, ROWS), Frozen())


def compile_once(*given):
    return program()


def job_of(directory, make=make_job, **fields):
    return make(directory, **{"evaluate": loss_of, "eval_every": 4, **fields})


def lines(directory):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run, compiled by itself."""
    directory = tmp_path_factory.mktemp("straight")
    state, cost = run(job_of(directory))
    return fingerprint(state), lines(directory), cost.tokens


def saved(directory):
    with Checkpointer(directory / "checkpoints", keep=2) as checkpointer:
        return checkpointer.latest_step(), checkpointer.metadata()


@pytest.mark.parametrize("step", [1, 2, STEPS])
def test_told_during_a_step(tmp_path, straight, hears, tell, step):
    """Steps whose line is due (1), none (2), whose held-out loss and checkpoint are (12)."""
    tell(step)
    with pytest.raises(Preempted, match=f"step {step} of {STEPS} is saved") as caught:
        run(job_of(tmp_path))
    assert caught.value.exit_code == 42
    at, metadata = saved(tmp_path)
    assert at == step
    cut = step % 4 == 0  # the first safe point of its evaluation comes before that of the step
    assert (UNMEASURED in metadata) == cut
    assert lines(tmp_path) == [row for row in straight[1] if row["step"] <= step - cut]
    hears()
    state, cost = run(job_of(tmp_path))
    assert (fingerprint(state), lines(tmp_path), cost.tokens) == straight


@pytest.mark.parametrize(("step", "batch"), [(8, 0), (STEPS, BATCHES - 1)])
def test_told_during_an_evaluation(tmp_path, straight, hears, tell, step, batch):
    """Its step is saved with the line that waits for the loss; told again in the very evaluation, it waits on."""
    tell(None)

    def evaluate(state):
        return loss_of(state, batch if int(state.step) == step else None)

    with pytest.raises(Preempted, match=f"step {step} of {STEPS} is saved"):
        run(job_of(tmp_path, evaluate=evaluate))
    assert saved(tmp_path)[0] == step
    assert saved(tmp_path)[1][UNMEASURED]["tokens"] == step * straight[2] // STEPS

    def interrupted(state):
        raise KeyboardInterrupt

    for _ in range(2):
        hears()
        with pytest.raises(KeyboardInterrupt):
            run(job_of(tmp_path, evaluate=interrupted))
        assert lines(tmp_path)[-1]["step"] < step
    hears()
    state, cost = run(job_of(tmp_path))
    assert (fingerprint(state), lines(tmp_path), cost.tokens) == straight


@pytest.mark.slow
def test_told_again_and_again(tmp_path, straight, hears, tell):
    """At every step once: one step a command."""
    for step in range(1, STEPS + 1):
        hears()
        tell(step)
        with pytest.raises(Preempted, match=f"step {step} of {STEPS} is saved"):
            run(job_of(tmp_path, keep=1))
    hears()
    state, cost = run(job_of(tmp_path))
    assert (fingerprint(state), lines(tmp_path), cost.tokens) == straight


def test_told_before_the_first_step(tmp_path, hears, tell):
    """Nothing is saved, and nothing has to be."""
    tell(None)
    with pytest.raises(Preempted, match="the same command goes on"):
        run(job_of(tmp_path, batches=lambda start: preemption._told.set() or endless(start)))
    assert not (tmp_path / "checkpoints").exists()


def test_what_evaluation_runs_is_compiled_before_there_is_something_to_lose(tmp_path, hears, tell):
    tell(None)
    seen = []
    job = job_of(tmp_path)
    run(dataclasses.replace(job, prepare=lambda state: seen.append((int(state.step), preemption._saved.is_set()))))
    assert seen == [(0, True)]


WORKERS = {"local": LocalUpdates(every=5, axis="data"), "mesh": MeshPlan(data=8)}
REDUCED = {"reduce": Reduce(method="powersgd", rank=2), "mesh": MeshPlan(data=8)}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [WORKERS, REDUCED], ids=["workers apart", "compressed reduction"])
def test_with_state_outside_of_the_model(tmp_path, hears, tell, fields):
    """Between two meetings of workers, and with an error that a reducer feeds back."""

    def job(name):
        return make_job(
            tmp_path / name, rt=make_runtime(OptimConfig(warmup_steps=4), STEPS, compressed=False, **fields)
        )

    whole, _ = run(job("whole"))
    tell(7, COMPILE)
    with pytest.raises(Preempted, match="step 7 of"):
        run(job("told"))
    hears()
    tell(None, COMPILE)
    state, _ = run(job("told"))
    assert fingerprint(state) == fingerprint(whole)
    assert lines(tmp_path / "told") == lines(tmp_path / "whole")
