"""The real train step at one layer, compiled and run on one device."""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from lmeff.compress.base import identity
from lmeff.config import Experiment
from lmeff.core.batch import Batch
from lmeff.core.precision import parse
from lmeff.core.specs import ParamSpec, count
from lmeff.core.tree import Tree, map_with_path
from lmeff.distill.objectives import Projection, head_objective
from lmeff.doctor.check import Check, Problem, judge
from lmeff.models.config import ModelConfig, preset, with_layers
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.rows import place_batch
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import create_state
from lmeff.train.step import make_train_step

ROWS, TOKENS, STEPS = 2, 64, 3
VOCABULARY = 256
FAR = 3.0  # nats/token: logits of wide models with tied heads spread at the start
LARGEST = {
    "cpu": 2**22,
    "gpu": 2**28,
    "tpu": 2**28,
}  # parameters of a layer that take seconds there, compilation included


class Trial(NamedTuple):
    """What came of a few steps. traces: of the step's Python code. donated: whether the first state's memory was given on."""

    compile_seconds: float
    step_seconds: float
    losses: tuple[float, ...]
    traces: int
    donated: bool


def small(cfg: ModelConfig | None, platform: str) -> tuple[ModelConfig, str]:
    """A config's model at one layer and a small vocabulary, and its words; a tiny one where there is none or its layer is too large for the device."""
    tiny = dataclasses.replace(preset("tiny"), vocab=VOCABULARY, layers=1)
    if cfg is None:
        return tiny, "a tiny model"
    one = dataclasses.replace(with_layers(cfg, (0,)), vocab=VOCABULARY)
    if count(param_specs(one)) > LARGEST.get(platform, LARGEST["cpu"]):
        return tiny, "a tiny model (the config's layer takes too long here)"
    return one, "the config's model"


def attempt(cfg: ModelConfig, optim: OptimConfig, precision: str, device: Any) -> Trial:
    """Compiles the step of a recipe for one device and takes `STEPS` steps on random tokens, always the same ones."""
    specs, policy = param_specs(cfg), parse(precision)
    layout = make_layout(MeshPlan(), [device])
    tx = make_optimizer(optim, STEPS, policy=policy, specs=specs)
    compression = identity()
    rt = Runtime(
        student=Model(cfg, view=compression.apply),
        teacher=None,
        specs=specs,
        compression=compression,
        objective=head_objective(Projection(cfg)),
        tx=tx,
        layout=layout,
        policy=policy,
        ema=optim.ema,
        steps=STEPS,
    )
    params = _random_params(specs, policy.params)
    state = create_state(params, specs, compression, tx, layout, ema=optim.ema is not None)
    tokens = min(TOKENS, cfg.context or TOKENS)
    batch, traces, inner = place_batch(_random_batch(tokens), layout), 0, make_train_step(rt)

    def counted(*given: Any) -> Any:
        nonlocal traces
        traces += 1
        return inner(*given)

    places = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(counted, donate_argnums=0, out_shardings=(places, None))
    began, first = time.perf_counter(), state
    state, metrics = jax.block_until_ready(step(state, batch, Frozen()))
    compiled, losses = time.perf_counter() - began, [float(metrics["loss"])]
    donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(first.trainable))
    for _ in range(STEPS - 1):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch, Frozen()))
        losses.append(float(metrics["loss"]))
    return Trial(compiled, time.perf_counter() - began, tuple(losses), traces, donated)


def _random_params(specs: Tree, dtype: Any) -> dict[str, Any]:
    """Parameters made on the host: JAX would compile longer for their random numbers than for the step."""
    rng = np.random.default_rng(0)

    def leaf(path: str, spec: ParamSpec) -> np.ndarray:
        if spec.init == "normal":
            return (spec.scale * rng.standard_normal(spec.shape, np.float32)).astype(dtype)
        return np.full(spec.shape, {"ones": 1, "zeros": 0}[spec.init], dtype)

    return map_with_path(leaf, specs)


def _random_batch(length: int) -> Batch:
    shape = (ROWS, length)
    tokens, targets = np.random.default_rng(0).integers(0, VOCABULARY, (2, *shape), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(tokens, targets, np.ones(shape, np.int32), positions, np.ones(shape, np.float32))


def train_step(cfg: ModelConfig | None, experiment: Experiment, device: Any) -> Check:
    """Trains one layer on one device, with the config's optimizer and precision. cfg: the config's model, None for a tiny one."""
    made, words = small(cfg, device.platform)
    optim = dataclasses.replace(experiment.optim, warmup_steps=0, offload=False)
    return verdict(attempt(made, optim, experiment.precision, device), words)


def verdict(trial: Trial, words: str) -> Check:
    """What a trial says: losses are numbers and near that of a uniform guess, memory is given on, nothing is traced twice."""
    report = "reinstall jax and jaxlib; where it stays so, report it"
    first, expected, problems = trial.losses[0], math.log(VOCABULARY), []
    if not all(map(math.isfinite, trial.losses)):
        problems.append(Problem("FAIL", f"losses {_told(trial)}: expected numbers", report))
    elif abs(first - expected) > FAR:
        problems.append(Problem("FAIL", f"first loss {first:.2f}: expected about {expected:.2f}", report))
    if trial.traces != 1:
        problems.append(Problem("look", f"the step was traced {trial.traces} times: every step may compile", report))
    if not trial.donated:
        problems.append(Problem("look", "the state was not donated: it takes twice its memory", report))
    told = (
        f"1 layer of {words}: compiled in {trial.compile_seconds:.1f} s, a step takes {trial.step_seconds * 1e3:.1f} ms"
    )
    return judge("train step", f"{told}, loss {_told(trial)}", problems)


def _told(trial: Trial) -> str:
    return " ".join(f"{loss:.2f}" for loss in trial.losses)
