"""The whole config, checked against itself and the devices before anything is built, written or compiled."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from lmeff.compress.config import validate as validate_transforms
from lmeff.config.loads import Loaded, absent, check_shape, kept, loads
from lmeff.config.schema import Experiment, Stage
from lmeff.core.errors import ConfigError
from lmeff.core.precision import parse
from lmeff.data.config import KEPT, DataConfig, vocab_size
from lmeff.models.config import ModelConfig
from lmeff.models.legal import check_context
from lmeff.models.remat import parse as parse_remat
from lmeff.models.transformer import param_specs, sites
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.mesh import BATCH_AXES, MeshPlan, indivisible
from lmeff.parallel.order import check_tokens
from lmeff.parallel.schedules import SCHEDULES, Size, is_file, size_of
from lmeff.parallel.stash import STASHES
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.optim import OptimConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def validate(
    experiment: Experiment, devices: int, directory: Path | None = None, *, planned: bool = False
) -> dict[str, ModelConfig]:
    """The shape of every stage's model; raises `ConfigError` for the first thing that cannot work on so many devices.

    directory: the run's folder, where it is another than the config says: it may hold copies of what the config names by place.
    planned:   only to be planned: models that are loaded, and their tokenizers, need not be here where `Stage.model` says their shape.
    """
    directory = Path(experiment.run_dir) if directory is None else directory
    _check_name("name", experiment.name)
    parse(experiment.precision)
    degrees = experiment.mesh.degrees(devices)
    train = experiment.train
    check_rows("train.batch", train.batch, degrees, train.accumulate)
    check_rows("evaluate.batch", experiment.evaluate.batch, degrees)
    schedule = check_schedule(experiment.mesh, degrees["pipe"], train.accumulate)
    check_tokens("data.sequence", experiment.mesh.sequence, experiment.data.sequence, degrees["context"])
    optims = {"optim": experiment.optim} | {f"stage '{s.name}'.optim": s.optim for s in experiment.recipe if s.optim}
    check_synchronization(train.reduce, train.local, experiment.precision, optims, degrees)
    seen: dict[str, ModelConfig] = {}
    packed: set[str] = set()
    for position, stage in enumerate(experiment.recipe):
        _check_origin(stage, f"recipe[{position}]")
    missing = absent(experiment, directory) if planned else {}
    needed = _ids(experiment.data, directory, {str(stage.load) for stage in missing.values()})
    there = tuple(stage for stage in experiment.recipe if stage.name not in missing)
    loaded = loads(dataclasses.replace(experiment, recipe=there), directory)
    for name, found in loaded.items():
        check_shape(experiment.stage(name), found)
    for position, stage in enumerate(experiment.recipe):
        _check_stage_names(stage, seen, f"recipe[{position}]")
        cfg = shape_of(experiment, stage, seen, loaded)
        parse_remat(train.remat, sites(cfg))
        _check_shape(experiment, stage, cfg, degrees, needed)
        _check_stage(experiment, stage, cfg, seen, packed)
        if schedule is not None and experiment.steps(stage):
            check_slices(schedule, cfg, f"stage '{stage.name}'")
        seen[stage.name] = cfg
        if stage.export:
            packed.add(stage.name)
    _check_claims(experiment, seen)
    return seen


def shape_of(
    experiment: Experiment, stage: Stage, earlier: Mapping[str, ModelConfig], loaded: Mapping[str, Loaded]
) -> ModelConfig:
    """The shape of a stage's model, known before anything is built."""
    if stage.load is not None and (stage.name in loaded or stage.model is None):
        cfg = loaded[stage.name].cfg
    else:
        cfg = earlier[stage.start] if stage.start is not None else stage.model or experiment.model
    return cfg if stage.shrink is None else stage.shrink.apply(cfg)


def shapes(experiment: Experiment, directory: Path) -> dict[str, ModelConfig]:
    """The shape of every stage's model in a run that is there, whose config was checked when it began."""
    seen: dict[str, ModelConfig] = {}
    for stage in experiment.recipe:
        seen[stage.name] = shape_of(experiment, stage, seen, kept(directory))
    return seen


def _ids(data: DataConfig, directory: Path, missing: Collection[str]) -> int:
    """How many ids the tokenizer makes; 0 for that of a model whose folder is missing: nobody can say."""
    unknown = data.tokenizer in missing and not (directory / "data" / KEPT).is_dir()
    return 0 if unknown else vocab_size(data, directory / "data")


def _check_name(where: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: got '{name}', expected letters, digits, - and _: it becomes a folder")


def check_rows(where: str, rows: int, degrees: Mapping[str, int], accumulate: int = 1) -> None:
    """Refuses a global batch that the mesh and the microbatches cannot cut evenly."""
    factors = {f"mesh.{axis}": degrees[axis] for axis in BATCH_AXES if degrees[axis] > 1}
    why = "every device takes equally many rows"
    if accumulate > 1:
        factors["train.accumulate"] = accumulate
        why += " in every microbatch"
    if rows % math.prod(factors.values()):
        names, sizes = (" x ".join(map(str, part)) for part in (factors, factors.values()))
        raise ConfigError(f"{where}: got {rows} rows, expected a multiple of {names} = {sizes}; {why}")


def check_schedule(plan: MeshPlan, stages: int, microbatches: int) -> Size | None:
    """What a plan's schedule comes to, None without a pipeline; refuses names and numbers that no schedule takes. Builds no table but that of a file."""
    if not is_file(plan.schedule) and plan.schedule not in SCHEDULES:
        raise ConfigError(
            f"mesh.schedule: got '{plan.schedule}', expected one of {', '.join(SCHEDULES)}, or a .csv file with a table"
        )
    if plan.stash not in STASHES:
        raise ConfigError(f"mesh.stash: got '{plan.stash}', expected one of {', '.join(STASHES)}")
    if stages == 1:
        if plan.chunks is not None:
            raise ConfigError(
                f"mesh.chunks: got {plan.chunks} without a pipeline, expected None; chunks are slices on a stage of mesh.pipe. Set mesh.pipe too."
            )
        return None
    try:
        return size_of(plan.schedule, stages, microbatches, plan.chunks)
    except ConfigError as error:
        raise ConfigError(
            f"mesh.schedule: {error}. Its stages are mesh.pipe, its microbatches train.accumulate, its chunks mesh.chunks."
        ) from error


def check_slices(size: Size, cfg: ModelConfig, where: str) -> None:
    """Refuses a pipeline with more slices than the model has layers."""
    if cfg.layers < size.slices:
        raise ConfigError(
            f"{where}: the model has {cfg.layers} layers, expected at least mesh.pipe x chunks = {size.stages} x {size.chunks}: "
            f"schedule {size.name} cuts it into {size.slices} slices. Lower mesh.pipe or mesh.chunks."
        )


def check_synchronization(
    reduce: Reduce | None,
    local: LocalUpdates | None,
    precision: str,
    optims: Mapping[str, OptimConfig],
    degrees: Mapping[str, int],
) -> None:
    """Refuses ways to meet that the precision, the mesh or an optimizer (by where it is set) does not go with."""
    if reduce is not None and reduce.method == "powersgd" and parse(precision).needs_loss_scale:
        raise ConfigError(
            f"train.reduce: got method powersgd with precision {precision}, expected no float16: what PowerSGD has not sent yet would be in "
            "units of a loss scale that changes. Use bfloat16, or method int8."
        )
    if local is None:
        return
    if degrees[local.axis] == 1:
        raise ConfigError(
            f"train.local.axis: got '{local.axis}', along which the mesh has one worker, expected at least two to train apart. "
            f"Set mesh.{local.axis}, choose the other axis, or drop train.local."
        )
    if local.axis == "data" and degrees["dcn"] > 1:
        raise ConfigError(
            f"train.local.axis: got 'data' with mesh.dcn = {degrees['dcn']}, expected 'dcn': workers that rarely meet belong along the slowest axis, "
            "and would reduce gradients over it every step."
        )
    for where, optim in optims.items():
        if optim.ema is not None:
            raise ConfigError(
                f"{where}.ema: got {optim.ema} with train.local, expected None: the outer parameters, which the run gives, are an average of the workers "
                "already. Drop one of them."
            )
        if optim.offload:
            raise ConfigError(
                f"{where}.offload: got True with train.local, expected False: each worker's moments lie apart from the others' on its own devices. "
                "Drop one of them."
            )


def check_cuts(sequence: str, cfg: ModelConfig, degrees: dict[str, int], where: str) -> None:
    """Refuses a model whose dims the mesh cannot cut evenly; `sequence` as `mesh.sequence` has it."""
    problems = indivisible(param_specs(cfg), degrees)
    if problems:
        raise ConfigError(
            f"{where}: the mesh cannot cut {' and '.join(problems)} evenly; expected divisors. Change the degree or the model's size."
        )
    ways = degrees["tensor"] * degrees["context"]
    if sequence == "ulysses" and cfg.heads % ways:
        raise ConfigError(
            f"{where}: got {cfg.heads} query heads, expected a multiple of mesh.tensor x mesh.context = {degrees['tensor']} x {degrees['context']}: "
            "mesh.sequence 'ulysses' gives every device whole heads. Set mesh.sequence to 'ring' or 'gather', or lower mesh.context."
        )


def _check_stage_names(stage: Stage, seen: Mapping[str, ModelConfig], where: str) -> None:
    _check_name(f"{where}.name", stage.name)
    if stage.name in seen:
        raise ConfigError(f"{where}.name: '{stage.name}' is used twice, expected a name of its own for every stage")
    for parent in stage.parents:
        if parent not in seen:
            raise ConfigError(
                f"{where} '{stage.name}': reads artifact '{parent}', expected the name of an earlier stage, one of {list(seen)}"
            )


def _check_origin(stage: Stage, where: str) -> None:
    """A stage begins from one place, and has its shape; that of a folder may be said besides."""
    named = {name: getattr(stage, name) for name in ("start", "load", "model") if getattr(stage, name) is not None}
    if len(named) > 1 and stage.start is not None:
        first, second = list(named)[:2]
        raise ConfigError(
            f"{where} '{stage.name}': sets both {first} and {second}; a stage that begins from '{named[first]}' has its shape. Drop one of them."
        )


def _check_shape(experiment: Experiment, stage: Stage, cfg: ModelConfig, degrees: dict[str, int], needed: int) -> None:
    where = f"stage '{stage.name}'"
    if cfg.vocab < needed:
        remedy = f"Set model.vocab to {needed} or more" if stage.load is None else "Set data.tokenizer to its own"
        raise ConfigError(
            f"{where}: the model has a vocabulary of {cfg.vocab} and the tokenizer '{experiment.data.tokenizer}' makes {needed} ids; "
            f"expected at least as many. {remedy}."
        )
    check_context(cfg, experiment.data.sequence, f"{where}: data.sequence")
    check_cuts(experiment.mesh.sequence, cfg, degrees, where)


def _check_stage(
    experiment: Experiment, stage: Stage, cfg: ModelConfig, seen: Mapping[str, ModelConfig], packed: set[str]
) -> None:
    where = f"stage '{stage.name}'"
    steps = experiment.steps(stage)
    if steps < 0:
        raise ConfigError(f"{where}.steps: got {steps}, expected 0 (no training) or more")
    validate_transforms(stage.compress, param_specs(cfg), steps, where=f"{where}.compress")
    if stage.activations is not None:
        static = stage.activations.resolve(cfg).static_sites
        if static and stage.start is None and stage.load is None and steps:
            raise ConfigError(
                f"{where}.activations: {', '.join(static)} take one calibrated range, but the stage begins from random weights, whose ranges say "
                "nothing of the trained ones; expected a stage with a start. Train first, or use a format per token, such as int8."
            )
    if stage.start in packed and steps and not (stage.compress or stage.shrink):
        raise ConfigError(
            f"{where}: would train '{stage.start}', whose weights are packed integers; expected a start that was not exported. "
            f"Begin from the artifact that '{stage.start}' was made from, or set steps=0."
        )
    if stage.distill is not None:
        teacher = seen[stage.distill.teacher]
        if teacher.vocab != cfg.vocab:
            raise ConfigError(
                f"{where}.distill: teacher '{stage.distill.teacher}' has a vocabulary of {teacher.vocab}, the student {cfg.vocab}; expected the same"
            )
        if steps == 0:
            raise ConfigError(
                f"{where}.distill: the stage trains for 0 steps; expected steps to learn from the teacher in, or no distill"
            )


def _check_claims(experiment: Experiment, seen: Mapping[str, ModelConfig]) -> None:
    for position, claim in enumerate(experiment.claims):
        for name in (claim.artifact, claim.of):
            if name not in seen:
                raise ConfigError(
                    f"claims[{position}]: got artifact '{name}', expected the name of a stage, one of {list(seen)}"
                )
