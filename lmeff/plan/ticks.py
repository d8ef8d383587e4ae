"""How long a pipeline's table takes: a tick lasts as long as its slowest stage."""

from typing import NamedTuple

import numpy as np

from lmeff.parallel.stages import slice_layers
from lmeff.parallel.tables import B, F, Schedule, W
from lmeff.plan.job import Job


class Passes(NamedTuple):
    """Seconds of a step of one device, were all work evenly spread: the layers' forward pass, gradients of their inputs (with what runs again), gradients of
    their weights, and the embedding and loss."""

    forward: float
    inputs: float
    weights: float
    outer: float


def schedule_seconds(job: Job, passes: Passes) -> float:
    """Seconds of a step's computing, waiting stages included; without a pipeline the sum of the passes."""
    schedule = job.step().schedule
    if schedule is None:
        return sum(passes)
    return table_seconds(schedule, job.cfg.layers, passes)


def table_seconds(schedule: Schedule, layers: int, passes: Passes) -> float:
    """The same of a table. Stages with more layers than others, and the last one with the loss, hold up all; padding is run."""
    longest = slice_layers(layers, schedule.slices)
    slices = schedule.microbatches * schedule.chunks  # that a stage runs, of each pass
    padded = longest * schedule.slices / layers
    last = schedule.slices - 1
    each = np.zeros(4)
    each[[F, B, W]] = np.array(passes[:3]) * padded / slices
    loss = passes.outer * schedule.stages / schedule.microbatches
    ticks = np.array([[each[op.kind] for op in row] for row in schedule.table])
    for tick, row in enumerate(schedule.table):
        for stage, op in enumerate(row):
            if op.kind == F and schedule.slice_of(stage, op.chunk) == last:
                ticks[tick, stage] += loss
    return float(ticks.max(axis=1).sum())
