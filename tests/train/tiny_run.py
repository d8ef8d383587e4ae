"""A tiny training run with everything in its state: masks, learned scales, averages. As a script it is the process that the fault tests kill.

python tests/train/tiny_run.py DIRECTORY KILL_AT    trains, kills itself when the batch of step KILL_AT is asked for (-1: never), prints a digest
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (devices and cache, before JAX starts)

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lmeff.compress.base import LeafTransform, identity, only, per_leaf
from lmeff.core.batch import Batch
from lmeff.core.numerics import QFormat, fake_quantize, find_scale
from lmeff.core.precision import Policy
from lmeff.core.specs import initialize
from lmeff.distill.objectives import Projection, head_objective
from lmeff.models.config import PRESETS
from lmeff.models.transformer import param_specs
from lmeff.parallel.compressed import make_reducer
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.train.checkpoint import _leaves
from lmeff.train.digest import digests
from lmeff.train.loop import Job, TrainConfig, train
from lmeff.train.optim import OptimConfig, learning_rate_at, make_optimizer
from lmeff.train.progress import LineProgress
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import create_state
from lmeff.train.step import begin

CFG = PRESETS["tiny"]
SPECS = param_specs(CFG)
ROWS, LENGTH = 8, 32
INT4 = QFormat(bits=4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    mask: jax.Array
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def masked_lsq():
    """Four-bit weights with learned scales (trainable) under a magnitude mask that follows the weights (auxiliary)."""

    def init(w, spec):
        return find_scale(w, INT4, spec.axes)[0], Masked(jnp.ones(w.shape, bool), spec.axes)

    def update(w, grad, scale, entry, step):
        return dataclasses.replace(entry, mask=jnp.abs(w) > 0.2 * jnp.abs(w).mean(entry.axes, keepdims=True))

    def apply(w, scale, entry):
        return fake_quantize(jnp.where(entry.mask, w, 0), scale, None, INT4, entry.axes)

    transform = LeafTransform(init, apply, update, lambda w, scale, entry: apply(w, scale, entry))
    return only((("blocks/(attn|mlp)/.*", True), (".*", None)), per_leaf(transform))


def make_batch(step, rows=ROWS, length=LENGTH):
    """Rows of a noisy affine walk over the vocabulary: learnable, and a pure function of the step."""
    rng = np.random.default_rng(step)
    tokens = np.zeros((rows, length + 1), np.int32)
    tokens[:, 0] = rng.integers(0, CFG.vocab, rows)
    for t in range(length):
        noise = rng.integers(0, CFG.vocab, rows)
        tokens[:, t + 1] = np.where(rng.random(rows) < 0.05, noise, (5 * tokens[:, t] + 3) % CFG.vocab)
    ones, positions = np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, np.ones((rows, length), np.float32))


def make_runtime(optim, steps, *, policy=None, mesh=None, compressed=True, reduce=None, **fields):
    policy = policy or Policy()
    compression = masked_lsq() if compressed else identity()
    return Runtime(
        student=Model(CFG, view=compression.apply),
        teacher=None,
        specs=SPECS,
        compression=compression,
        objective=head_objective(Projection(CFG)),
        tx=make_optimizer(optim, steps, policy=policy, specs=SPECS),
        layout=make_layout(mesh or MeshPlan(data=1), None if mesh else jax.devices()[:1]),
        policy=policy,
        ema=optim.ema,
        reducer=make_reducer(reduce, SPECS),
        steps=steps,
        **fields,
    )


def make_state(rt):
    params = initialize(jax.random.key(0), SPECS, rt.policy.params)
    return begin(rt, create_state(params, SPECS, rt.compression, rt.tx, rt.layout, ema=rt.ema is not None))


OPTIM = OptimConfig(ema=0.9, warmup_steps=4)
STEPS = 12


def make_job(directory, *, batches=None, steps=STEPS, optim=OPTIM, mesh=None, evaluate=None, rt=None, **config):
    config = TrainConfig(steps=steps, batch=ROWS, **{"log_every": 3, "checkpoint_every": 4, **config})
    return Job(
        rt=rt or make_runtime(optim, steps, mesh=mesh),
        frozen=Frozen(),
        batches=batches or endless,
        config=config,
        steps=steps,
        directory=Path(directory),
        learning_rate=lambda step: learning_rate_at(optim, steps, step),
        metadata={"stage": "tiny"},
        evaluate=evaluate,
    )


def endless(start):
    step = start
    while True:
        yield make_batch(step)
        step += 1


def dying(at, die):
    """The data of a run that ends when it asks for the batch of step `at`."""

    def batches(start):
        for step in range(start, at):
            yield make_batch(step)
        die()

    return batches


def quiet(steps=STEPS):
    return LineProgress("tiny", steps, Console(quiet=True))


def run(job, *, resume=True):
    return train(job, make_state(job.rt), progress=quiet(job.steps), resume=resume)


def fingerprint(state):
    return digests(_leaves(state))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    at = int(sys.argv[2])
    final, _ = run(make_job(sys.argv[1], batches=dying(at, kill) if at >= 0 else None))
    print("digest", sum(fingerprint(final).values()))
