"""lmeff's own train step on one device, as a recipe's stage builds it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from shapes import Shape

from lmeff.core.batch import Batch
from lmeff.core.specs import initialize
from lmeff.core.tree import flatten, unflatten
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.plan.job import Job
from lmeff.plan.job import Shape as Planned
from lmeff.plan.program import runtime
from lmeff.train.loop import compile_step, place_batch
from lmeff.train.runtime import Frozen
from lmeff.train.state import create_state

STEPS = 1000  # that the learning rate is planned for


def initial_weights(shape: Shape) -> dict[str, np.ndarray]:
    """Random weights by path."""
    params = initialize(jax.random.key(0), param_specs(shape.model), jnp.float32)
    return {path: np.asarray(w) for path, w in flatten(params).items()}


def make_step(shape: Shape, weights: dict[str, np.ndarray], tokens: np.ndarray) -> Callable[[], float]:
    """A step on a fixed batch [B, T + 1] from these weights; gives the loss."""
    layout = make_layout(MeshPlan())
    rt = runtime(Job(name="step", student=Planned(cfg=shape.model), optim=shape.optim, steps=STEPS), layout)
    state = create_state(unflatten(weights), rt.specs, rt.compression, rt.tx, layout, ema=False)
    batch = place_batch(_one_document_a_row(tokens), layout)
    compiled = compile_step(rt, state, batch, Frozen())

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, Frozen())
        return float(metrics["loss"])

    return step


def _one_document_a_row(tokens: np.ndarray) -> Batch:
    inputs = tokens[:, :-1]
    ones = np.ones_like(inputs)
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return Batch(inputs, tokens[:, 1:], ones, positions, ones.astype(np.float32))
