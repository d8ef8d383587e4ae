"""The training loop: the one impure place. Feeds batches to the step, logs, saves, resumes."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

from lmeff.core.batch import Batch
from lmeff.core.errors import CheckpointError, ConfigError, Preempted, UserError
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.preemption import agreed, unsaved
from lmeff.parallel.processes import sync
from lmeff.parallel.rows import place_batch
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.metrics import MetricsWriter, Row, read_metrics
from lmeff.train.profile import Profile, Tracer
from lmeff.train.progress import Progress
from lmeff.train.runtime import Frozen, Metrics, Runtime
from lmeff.train.sinks import Sinks
from lmeff.train.state import TrainState
from lmeff.train.step import make_train_step

UNMEASURED = "unmeasured"  # in a checkpoint's metadata: the metric line of its step, which waits for its held-out loss


class Diverged(UserError):
    """The loss stopped being a number."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how to train.

    batch:            rows of the global batch, of `data.sequence` tokens each.
    accumulate:       microbatches a step; the gradient is reduced once.
    remat:            what the backward pass keeps: none, dots, names, full, save:NAME,..., offload:NAME,... or budget:SIZE (see `models.remat`).
    log_every:        steps between metric lines.
    eval_every:       steps between held-out losses during training; None takes none.
    checkpoint_every: steps between checkpoints; None saves only at the end.
    keep:             checkpoints kept.
    reduce:           gradients cross the network in fewer bytes; None sums them in full.
    local:            workers take steps of their own and meet now and then; None reduces gradients every step.
    """

    steps: int = 200
    batch: int = 16
    accumulate: int = 1
    remat: str = "none"
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    reduce: Reduce | None = None
    local: LocalUpdates | None = None

    def __post_init__(self) -> None:
        """Refuses counts that are none."""
        if self.steps < 0:
            raise ConfigError(f"train.steps: got {self.steps}, expected 0 or more")
        for name in ("batch", "accumulate", "log_every", "eval_every", "checkpoint_every", "keep"):
            got = getattr(self, name)
            if got is not None and got < 1:
                raise ConfigError(f"train.{name}: got {got}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run: what is trained, on what, until when, and where it writes.

    batches:       the data from a step on, of each batch the rows of this process (`own_rows`); a pure function of the step, so a resumed run
                   takes the very batches of the uninterrupted one.
    learning_rate: what step number `step` (from 0) uses, for the log.
    metadata:      JSON-able facts stored with each checkpoint.
    evaluate:      the held-out loss in nats/token, for `config.eval_every`; it passes `preemption.safe_point` between batches.
    prepare:       compiles what `evaluate` runs, before there is work that a long compilation would keep from being saved.
    profile:       the steps to trace.
    sinks:         opens what the metric lines go to besides, with those that are there.
    """

    rt: Runtime
    frozen: Frozen
    batches: Callable[[int], Iterator[Batch]]
    config: TrainConfig
    steps: int
    directory: Path
    learning_rate: Callable[[int], float]
    metadata: dict[str, Any] = field(default_factory=dict)
    evaluate: Callable[[TrainState], float] | None = None
    prepare: Callable[[TrainState], object] | None = None
    profile: Profile | None = None
    sinks: Callable[[Sequence[Row]], Sinks] | None = None

    def logs(self, step: int) -> bool:
        """Whether a metric line is due after this step."""
        return step in (1, self.steps) or _due(self.config.log_every, step) or self._evaluates(step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step == self.steps or _due(self.config.checkpoint_every, step)

    def held_out(self, step: int, state: TrainState) -> dict[str, float]:
        """`{"eval_loss": nats/token}` where it is due after this step."""
        return {"eval_loss": self.evaluate(state)} if self.evaluate and self._evaluates(step) else {}

    def _evaluates(self, step: int) -> bool:
        return self.evaluate is not None and _due(self.config.eval_every, step)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


class Cost(NamedTuple):
    """What a run took: seconds of this process in the loop (compilation apart) and tokens consumed over the whole run."""

    seconds: float
    compile_seconds: float
    tokens: int


class Outlets(NamedTuple):
    """Where a run writes."""

    checkpointer: Checkpointer
    metrics: MetricsWriter
    progress: Progress
    tracer: Tracer

    def tell(self, step: int, line: dict[str, Any]) -> None:
        """The metric line of a step."""
        self.metrics.write(step, line)
        self.progress.update(step, loss=line["loss"], tokens_per_second=line["tokens_per_second"])


def compile_step(rt: Runtime, state: TrainState, batch: Batch, frozen: Frozen) -> Callable[..., Any]:
    """The jitted step, compiled for these arguments; the state is donated and keeps its shardings."""
    out = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_train_step(rt), donate_argnums=0, out_shardings=(out, None))
    return step.lower(state, batch, frozen).compile()


def train(job: Job, state: TrainState, *, progress: Progress, resume: bool) -> tuple[TrainState, Cost]:
    """Trains until `job.steps`, from the last checkpoint in the job's directory where there is one.

    Raises `CheckpointError` where there is one but `resume` is not set (its steps would be mixed with those of another run), `Diverged` where
    the loss stops being a number, `Preempted` where the process was told to stop: the last step is saved then. Stopped or killed at any moment
    and resumed on the same mesh, a run ends bit for bit as if it had not been; on GPUs where `--xla_gpu_deterministic_ops` tells XLA to add in a fixed order.
    """
    with Checkpointer(job.directory / "checkpoints", keep=job.config.keep) as checkpointer:
        latest, line = checkpointer.latest_step(), None
        if latest is not None:
            if not resume:
                raise CheckpointError(
                    f"{checkpointer.directory}: holds a checkpoint of step {latest}, and resuming is off; expected none. Delete it, or resume."
                )
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, metadata = checkpointer.restore(abstract)
            line = metadata.get(UNMEASURED)
        start = int(state.step)
        kept = start - (line is not None)
        writer = MetricsWriter(job.directory / "metrics.jsonl", resume_step=kept, sinks=job.sinks)
        tracer = Tracer(job.profile, progress.tell, start=start, steps=job.steps)
        with contextlib.closing(writer) as metrics, tracer:
            outlets = Outlets(checkpointer, metrics, progress, tracer)
            if line is not None:
                _measure(job, start, state, line, outlets)
            return _run(job, start, state, outlets)


def _run(job: Job, start: int, state: TrainState, outlets: Outlets) -> tuple[TrainState, Cost]:
    if start >= job.steps:
        rows = read_metrics(job.directory / "metrics.jsonl")
        return state, Cost(0.0, 0.0, rows[-1]["tokens"] if rows else 0)
    began = time.perf_counter()
    batches = job.batches(start)
    batch = place_batch(next(batches), job.rt.layout, job.config.batch)
    compiled = compile_step(job.rt, state, batch, job.frozen)
    if job.prepare is not None:
        job.prepare(state)
    sync("compiled")  # one may take minutes longer, and collectives wait half a minute
    compile_seconds = time.perf_counter() - began
    log = Log(job, outlets, start, batch.tokens.size)
    with unsaved():
        for step in range(start + 1, job.steps + 1):
            outlets.tracer.begin(step)
            state, values = compiled(state, batch, job.frozen)
            _conclude(job, step, state, values, outlets, log)
            if step < job.steps:
                batch = place_batch(next(batches), job.rt.layout, job.config.batch)
            outlets.tracer.end(step, state)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began - compile_seconds
        outlets.checkpointer.wait()
    return state, Cost(seconds, compile_seconds, job.steps * batch.tokens.size)


def _measure(job: Job, step: int, state: TrainState, line: dict[str, Any], outlets: Outlets) -> None:
    """Completes the line of a step whose held-out loss was cut off. Its checkpoint says so until a later one is there."""
    if job.prepare is not None:
        job.prepare(state)
    sync("prepared")
    outlets.tell(step, line | job.held_out(step, state))


def _conclude(job: Job, step: int, state: TrainState, values: Metrics, outlets: Outlets, log: "Log") -> None:
    """What follows a step: its held-out loss, line and checkpoint where they are due; raises `Preempted` where all stop here."""
    log.flush()
    if job.logs(step) or job.saves(step):
        try:
            held_out = job.held_out(step, state)
        except Preempted:
            _stop(job, step, state, {UNMEASURED: log.line(step, values)}, outlets)
        log.add(step, values, held_out)
    if job.saves(step):
        log.flush()  # a checkpoint vouches for the lines before it, and for a loss that was a number
        outlets.checkpointer.save(step, state, job.metadata)
    if agreed():
        if not (job.logs(step) or job.saves(step)):
            log.add(step, values, {})  # no line is due, but it has to be a number
        log.flush()
        _stop(job, step, state, None if job.saves(step) else {}, outlets)


def _stop(job: Job, step: int, state: TrainState, more: dict[str, Any] | None, outlets: Outlets) -> NoReturn:
    """Saves the state with more metadata, None where it is saved already, and raises `Preempted` once all processes have."""
    checkpointer = outlets.checkpointer
    if more is not None:
        checkpointer.save(step, state, {**job.metadata, **more})
    checkpointer.wait()
    sync("stopped")
    raise Preempted(
        f"told to stop (SIGTERM): step {step} of {job.steps} is saved in {checkpointer.directory}; the same command goes on from there"
    )


class Log:
    """The metric lines of a run. Each is written once the next step is on its way: waiting for it earlier would leave the device idle."""

    def __init__(self, job: Job, outlets: Outlets, start: int, tokens: int) -> None:
        """`tokens`: of one step."""
        self._job, self._outlets, self._tokens = job, outlets, tokens
        self._late: tuple[int, Metrics, dict[str, float]] | None = None
        self._marked, self._told = time.perf_counter(), start

    def add(self, step: int, values: Metrics, more: dict[str, float]) -> None:
        """Keeps the numbers of a step, still on the device, until `flush`."""
        self._late = (step, values, more)

    def flush(self) -> None:
        """Writes what was added; raises `Diverged` where it is not a number."""
        if self._late is None:
            return
        (step, values, more), self._late = self._late, None
        found = _numbers(values)
        if self._job.logs(step):
            self._outlets.tell(step, self._line(step, found, more))
        _refuse_divergence(found, step, self._outlets.checkpointer.directory)

    def line(self, step: int, values: Metrics) -> dict[str, float]:
        """The line of a step whose held-out loss is still to come; raises `Diverged` where it is not a number."""
        found = _numbers(values)
        _refuse_divergence(found, step, self._outlets.checkpointer.directory)
        return self._line(step, found, {})

    def _line(self, step: int, found: dict[str, float], more: dict[str, float]) -> dict[str, float]:
        now = time.perf_counter()
        rate = (step - self._told) * self._tokens / max(now - self._marked, 1e-9)
        self._marked, self._told = now, step
        taken = step - 1 - int(found.get("skipped", 0))
        told = {"learning_rate": self._job.learning_rate(max(taken, 0)), "tokens_per_second": rate}
        return {**found, **more, **told, "tokens": step * self._tokens}


def _numbers(values: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(values).items()}


def _refuse_divergence(values: dict[str, float], step: int, directory: Path) -> None:
    """A loss that overflowed float16 is no divergence while loss scaling still skips such steps."""
    for name in ("update_norm",) if "skipped" in values else ("loss", "update_norm"):
        if not math.isfinite(values[name]):
            raise Diverged(
                f"training: the {name} is {values[name]} at step {step}; expected a finite number. Lower optim.learning_rate, set optim.clip_norm, "
                f"or use a wider precision. Earlier checkpoints are kept in {directory}."
            )
