"""One stage of a recipe: artifacts in, one artifact out."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lmeff.compress.base import State
from lmeff.compress.calibrate import calibrate
from lmeff.compress.config import Quantize
from lmeff.compress.importance import scores
from lmeff.compress.shrink import ShrinkConfig, describe, plan, shrink
from lmeff.config import Experiment, Stage
from lmeff.config.loads import describe as describe_source
from lmeff.core.numerics import materialize
from lmeff.core.precision import Policy, parse
from lmeff.core.specs import abstract, initialize
from lmeff.data.loader import Corpus
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, shardings
from lmeff.parallel.rows import own_rows, place_batch
from lmeff.recipe.artifact import Artifact, Recipe
from lmeff.recipe.log import opener
from lmeff.recipe.measure import held_out
from lmeff.recipe.runtime import make_runtime
from lmeff.recipe.sources import load_numbers, load_packed
from lmeff.train.evaluate import make_eval_step
from lmeff.train.loop import Cost, Job, train
from lmeff.train.metrics import Row, read_metrics
from lmeff.train.optim import learning_rate_at
from lmeff.train.profile import Profile, Window
from lmeff.train.progress import Progress
from lmeff.train.runtime import Frozen, Runtime
from lmeff.train.sinks import Sinks
from lmeff.train.state import TrainState, create_state, with_compression
from lmeff.train.step import begin

Artifacts = Mapping[str, Artifact]


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What all stages of a run share.

    shapes:  of every stage's model.
    profile: the steps of each stage to trace.
    """

    experiment: Experiment
    shapes: Mapping[str, ModelConfig]
    corpus: Corpus
    layout: Layout
    directory: Path
    resume: bool
    profile: Window | None = None

    @property
    def policy(self) -> Policy:
        """The precision policy."""
        return parse(self.experiment.precision)

    def stage_dir(self, stage: Stage) -> Path:
        """Where a stage writes."""
        return self.directory / "stages" / stage.name

    def profile_of(self, stage: Stage) -> Profile | None:
        """The steps of a stage to trace, and where to."""
        return None if self.profile is None else Profile(self.profile, self.directory / "profile" / stage.name)

    def sinks_of(self, stage: Stage, tell: Callable[[str], None]) -> Callable[[Sequence[Row]], Sinks] | None:
        """Opens what the metrics of a stage go to besides its file."""
        config = self.experiment.log
        return opener(config, self.experiment, self.directory, stage, tell) if config.sinks else None

    def calibration(self, batches: int) -> list[Any]:
        """The first batches of the training data."""
        return [self.corpus.train.batch(step) for step in range(batches)]


class Start(NamedTuple):
    """Where a stage begins.

    state: the compression's state carried over from the earlier artifact; None where the stage compresses anew.
    note:  where it was loaded from and what was cut, in words.
    """

    cfg: ModelConfig
    params: Any
    recipe: Recipe
    state: State | None = None
    ranges: Any = None
    note: str = ""


def run_stage(shop: Workshop, stage: Stage, earlier: Artifacts, progress: Progress) -> Artifact:
    """Makes the artifact of a stage: starting weights, structure, compression, calibration, training, packing."""
    began = time.perf_counter()
    steps = shop.experiment.steps(stage)
    if packs_at_once(stage, steps):
        return _packed(shop, stage, began)
    start = starting_point(shop, stage, earlier)
    if steps == 0:
        params, state = start.params, _state(start)
        cost = Cost(time.perf_counter() - began, 0.0, 0)
    else:
        params, state, cost = _trained(shop, stage, start, earlier, progress)
    details = {"seconds": cost.seconds, "compile_seconds": cost.compile_seconds, "tokens": cost.tokens}
    artifact = Artifact(
        name=stage.name,
        cfg=start.cfg,
        recipe=start.recipe,
        params=params,
        state=state,
        ranges=start.ranges,
        details=details | {"curve": _curve(shop.stage_dir(stage)), "note": start.note},
    )
    return artifact.export() if stage.export else artifact


def packs_at_once(stage: Stage, steps: int) -> bool:
    """Whether a stage does nothing but pack the weights that it loads: each can then be packed before the next one is read."""
    plain = stage.shrink is None and stage.activations is None and steps == 0
    return plain and stage.export and stage.load is not None and [type(t) for t in stage.compress] == [Quantize]


def _packed(shop: Workshop, stage: Stage, began: float) -> Artifact:
    path = Path(str(stage.load))
    (transform,) = stage.compress
    assert isinstance(transform, Quantize)
    cfg, params = load_packed(path, shop.layout, shop.policy.params, transform)
    seconds = time.perf_counter() - began
    return Artifact(
        name=stage.name,
        cfg=cfg,
        recipe=dataclasses.replace(recipe_of(stage, cfg, {}), packed=True),
        params=params,
        state=State({}, {}),
        details={"seconds": seconds, "compile_seconds": 0.0, "tokens": 0, "curve": [], "note": _loaded_from(path)},
    )


def _loaded_from(path: Path) -> str:
    return f"loaded from {path} ({describe_source(path).words})"


def recipe_of(stage: Stage, cfg: ModelConfig, earlier: Mapping[str, Recipe]) -> Recipe:
    """What is static of the artifact that a stage of this shape makes, before it is packed."""
    recipe = Recipe(transforms=stage.compress)
    if stage.start is not None and stage.continues:
        recipe = earlier[stage.start]
    if stage.activations is not None:
        recipe = dataclasses.replace(recipe, numerics=stage.activations.resolve(cfg))
    return recipe


def starting_point(shop: Workshop, stage: Stage, earlier: Artifacts) -> Start:
    """Shape, weights and numerics before training.

    Random weights depend on the seed and the shape alone: two students that differ in their objective start alike. A stage that
    neither shrinks nor compresses goes on with its start's own compression and state; otherwise it begins from the weights as the start's
    forward pass saw them.
    """
    recipes = {name: artifact.recipe for name, artifact in earlier.items()}
    if stage.start is None and stage.load is None:
        cfg = stage.model or shop.experiment.model
        start = Start(cfg, _random(shop, cfg), recipe_of(stage, cfg, recipes))
    elif stage.start is not None and stage.continues:
        origin = earlier[stage.start]
        start = Start(origin.cfg, origin.params, recipe_of(stage, origin.cfg, recipes), origin.state, origin.ranges)
    else:
        cfg, params, notes = _seen(shop, stage, earlier)
        if stage.shrink is not None:
            cfg, params, cut = _shrunk(shop, stage.shrink, cfg, params)
            notes.append(cut)
        start = Start(cfg, params, recipe_of(stage, cfg, recipes), note="; ".join(notes))
    return _calibrated(shop, stage, start)


def _seen(shop: Workshop, stage: Stage, earlier: Artifacts) -> tuple[ModelConfig, Any, list[str]]:
    """The weights of a stage's start as its forward pass saw them, or those that are loaded; and where from, in words."""
    if stage.load is not None:
        cfg, params = load_numbers(Path(stage.load), shop.layout, shop.policy.params)
        return cfg, params, [_loaded_from(Path(stage.load))]
    assert stage.start is not None
    origin = earlier[stage.start]
    return origin.cfg, materialize(origin.effective()), []


def _random(shop: Workshop, cfg: ModelConfig) -> Any:
    specs = param_specs(cfg)
    dtype = shop.policy.params
    out = shardings(abstract(specs, dtype), specs, shop.layout)
    return jax.jit(lambda key: initialize(key, specs, dtype), out_shardings=out)(jax.random.key(shop.experiment.seed))


def _shrunk(shop: Workshop, config: ShrinkConfig, cfg: ModelConfig, params: Any) -> tuple[ModelConfig, Any, str]:
    batches = shop.calibration(config.calibration_batches)
    found = scores(config.importance, cfg, params, batches, shop.layout, seed=config.seed)
    cut = plan(config, cfg, found)
    smaller, params, _ = shrink(cfg, params, None, cut, layout=shop.layout)
    note = ", ".join(f"{what} {before} to {after}" for what, before, after, _ in describe(cut, cfg))
    return smaller, params, f"{note}; by {config.importance}"


def _calibrated(shop: Workshop, stage: Stage, start: Start) -> Start:
    """Adds the ranges of the stage's static activation formats: from training data, with the weights compressed as they will be."""
    if stage.activations is None:
        return start
    if not start.recipe.numerics.static_sites:
        return start._replace(ranges=None)
    ranges = calibrate(
        stage.activations,
        start.cfg,
        start.params,
        shop.calibration(stage.activations.batches),
        shop.layout,
        view=start.recipe.compression.apply,
        view_state=_state(start),
        compute_dtype=shop.policy.compute,
    )
    return start._replace(ranges=ranges)


def _state(start: Start) -> State:
    """The compression's state that a stage begins with."""
    if start.state is not None:
        return start.state
    specs = param_specs(start.cfg)
    return jax.jit(lambda p: start.recipe.compression.init(p, specs))(start.params)


def _trained(
    shop: Workshop, stage: Stage, start: Start, earlier: Artifacts, progress: Progress
) -> tuple[Any, State, Cost]:
    teacher = earlier[stage.distill.teacher] if stage.distill else None
    optim, steps = stage.optim or shop.experiment.optim, shop.experiment.steps(stage)
    rt = make_runtime(
        start,
        teacher,
        train=shop.experiment.train,
        optim=optim,
        distill=stage.distill,
        steps=steps,
        tokens=shop.experiment.data.sequence,
        policy=shop.policy,
        layout=shop.layout,
    )
    options = {"ema": rt.ema is not None, "offload": rt.offload, "donate": stage.start is None}
    state = create_state(start.params, rt.specs, rt.compression, rt.tx, shop.layout, **options)
    if start.state is not None:
        state = with_compression(state, start.state)
    state = begin(rt, state)
    frozen = Frozen(ranges=start.ranges)
    if teacher is not None:
        frozen = frozen._replace(teacher=_placed(teacher, shop.layout), teacher_ranges=teacher.ranges)
    rows = own_rows(shop.layout, shop.experiment.train.batch)
    job = Job(
        rt=rt,
        frozen=frozen,
        batches=lambda start: shop.corpus.train.batches(start, rows),
        config=shop.experiment.train,
        steps=steps,
        directory=shop.stage_dir(stage),
        learning_rate=lambda step: learning_rate_at(optim, steps, step),
        metadata={"stage": stage.name},
        profile=shop.profile_of(stage),
        sinks=shop.sinks_of(stage, progress.tell),
        **({} if shop.experiment.train.eval_every is None else validation(shop, rt, start.ranges)),
    )
    state, cost = train(job, state, progress=progress, resume=shop.resume)
    return state.final.params, State(state.final.compression, state.auxiliary), cost


def _placed(teacher: Artifact, layout: Layout) -> Any:
    """The teacher's weights as its forward pass sees them, where `abstract_frozen` says; XLA might have left a result elsewhere."""
    effective = teacher.effective()
    return jax.device_put(effective, shardings(effective, param_specs(teacher.cfg), layout))


def validation(shop: Workshop, rt: Runtime, ranges: Any) -> dict[str, Callable[[TrainState], Any]]:
    """`Job.evaluate`, nats per token of the model in training on the validation split, and `Job.prepare` for it."""
    step, options = make_eval_step(rt.student, rt.layout, rt.policy), shop.experiment.evaluate
    data = shop.corpus.validation

    def given(state: TrainState) -> tuple[Any, State, Any]:
        return state.final.params, State(state.final.compression, state.auxiliary), ranges

    def evaluate(state: TrainState) -> float:
        return held_out(lambda batch: step(*given(state), batch), data, rt.layout, options.batch, options.batches).mean

    def prepare(state: TrainState) -> Any:
        batch, _ = next(iter(data.evaluation(options.batch)))
        return step.lower(*given(state), place_batch(batch, rt.layout)).compile()

    return {"evaluate": evaluate, "prepare": prepare}


def _curve(directory: Path) -> list[list[float]]:
    """The learning curve as [step, tokens, loss] from the metrics on disk."""
    return [[row["step"], row["tokens"], row["loss"]] for row in read_metrics(directory / "metrics.jsonl")]
