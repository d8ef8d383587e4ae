"""The training loop: the one impure place. Feeds batches to the step, logs, saves, resumes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.core.errors import UserError
from lmeff.parallel.mesh import place_batch
from lmeff.train.checkpoint import Checkpointer
from lmeff.train.metrics import MetricsWriter
from lmeff.train.progress import Progress
from lmeff.train.state import TrainState
from lmeff.train.step import Frozen, Runtime, make_train_step


class Diverged(UserError):
    """The loss stopped being a number."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how to train.

    batch:            rows of the global batch, of `data.sequence` tokens each.
    accumulate:       microbatches a step; the gradient is reduced once.
    remat:            what the backward pass keeps: "none", "dots", "names" or "full" (see `models.transformer.forward`).
    log_every:        steps between metric lines.
    checkpoint_every: steps between checkpoints; None saves only at the end.
    keep:             checkpoints kept.
    """

    steps: int = 200
    batch: int = 16
    accumulate: int = 1
    remat: str = "none"
    log_every: int = 10
    checkpoint_every: int | None = None
    keep: int = 2


class Cost(NamedTuple):
    """What a run took: seconds of this process in the loop (compilation apart) and tokens consumed over the whole run."""

    seconds: float
    compile_seconds: float
    tokens: int


def compile_step(rt: Runtime, state: TrainState, batch: Batch, frozen: Frozen) -> Callable[..., Any]:
    """The jitted step, compiled for these arguments; the state is donated and keeps its shardings."""
    out = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_train_step(rt), donate_argnums=0, out_shardings=(out, None))
    return step.lower(state, batch, frozen).compile()


def train(
    rt: Runtime,
    state: TrainState,
    frozen: Frozen,
    batches: Callable[[int], Iterator[Batch]],
    config: TrainConfig,
    *,
    steps: int,
    directory: Path,
    progress: Progress,
    learning_rate: Callable[[int], float],
    metadata: dict[str, Any],
    resume: bool,
) -> tuple[TrainState, Cost]:
    """Trains until `steps`, from the last checkpoint in `directory` where there is one and `resume` is set.

    The data is a pure function of the step, so a resumed run takes the very batches that the uninterrupted one would have taken.
    """
    checkpointer = Checkpointer(directory / "checkpoints", keep=config.keep)
    try:
        if resume and checkpointer.latest_step() is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, _ = checkpointer.restore(abstract)
        start = int(state.step)
        metrics = MetricsWriter(directory / "metrics.jsonl", resume_step=start)
        state, cost = _run(
            rt,
            state,
            frozen,
            batches(start),
            config,
            start,
            steps,
            checkpointer,
            metrics,
            progress,
            learning_rate,
            metadata,
        )
        metrics.close()
        return state, cost
    finally:
        checkpointer.close()


def _run(
    rt: Runtime,
    state: TrainState,
    frozen: Frozen,
    batches: Iterator[Batch],
    config: TrainConfig,
    start: int,
    steps: int,
    checkpointer: Checkpointer,
    metrics: MetricsWriter,
    progress: Progress,
    learning_rate: Callable[[int], float],
    metadata: dict[str, Any],
) -> tuple[TrainState, Cost]:
    compiled, compile_seconds, tokens = None, 0.0, 0
    began = marked = time.perf_counter()
    for step in range(start, steps):
        host = next(batches)
        batch = place_batch(host, rt.layout)
        if compiled is None:
            before = time.perf_counter()
            compiled = compile_step(rt, state, batch, frozen)
            compile_seconds = time.perf_counter() - before
            marked = time.perf_counter()
        state, values = compiled(state, batch, frozen)
        tokens += host.tokens.size
        done = step + 1
        if done % config.log_every == 0 or done in (1, steps):
            values = {name: float(value) for name, value in values.items()}
            _refuse_divergence(values, done, checkpointer.directory)
            elapsed = time.perf_counter() - marked
            rate = tokens / max(elapsed, 1e-9)
            values |= {"learning_rate": learning_rate(step), "tokens_per_second": rate}
            metrics.write(done, {**values, "tokens": done * host.tokens.size})
            progress.update(done, loss=values["loss"], tokens_per_second=rate)
        if config.checkpoint_every is not None and done % config.checkpoint_every == 0 and done < steps:
            checkpointer.save(done, state, metadata)
    if start < steps:
        checkpointer.save(steps, state, metadata)
    jax.block_until_ready(state)
    return state, Cost(time.perf_counter() - began - compile_seconds, compile_seconds, tokens)


def _refuse_divergence(values: dict[str, float], step: int, directory: Path) -> None:
    if not jnp.isfinite(values["loss"]):
        raise Diverged(
            f"training: the loss is {values['loss']} at step {step}; expected a finite number. Lower optim.learning_rate, set optim.clip_norm, "
            f"or use a wider precision. Earlier checkpoints are kept in {directory}."
        )
