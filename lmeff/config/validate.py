"""The whole config, checked against itself and the devices before anything is built, written or compiled."""

import re
from collections.abc import Mapping

from lmeff.compress.config import validate as validate_transforms
from lmeff.config.schema import Experiment, Stage
from lmeff.core.errors import ConfigError
from lmeff.core.precision import parse
from lmeff.data.config import vocab_size
from lmeff.models.config import ModelConfig
from lmeff.models.remat import parse as parse_remat
from lmeff.models.transformer import param_specs, sites
from lmeff.parallel.mesh import BATCH_AXES, indivisible
from lmeff.parallel.order import check_tokens

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def validate(experiment: Experiment, devices: int) -> dict[str, ModelConfig]:
    """The shape of every stage's model; raises `ConfigError` for the first thing that cannot work on so many devices."""
    _check_name("name", experiment.name)
    parse(experiment.precision)
    degrees = experiment.mesh.degrees(devices)
    _check_batches(experiment, degrees)
    check_tokens("data.sequence", experiment.mesh.sequence, experiment.data.sequence, degrees["context"])
    seen: dict[str, ModelConfig] = {}
    packed: set[str] = set()
    for position, stage in enumerate(experiment.recipe):
        _check_stage_names(stage, seen, f"recipe[{position}]")
        cfg = shape_of(experiment, stage, seen)
        parse_remat(experiment.train.remat, sites(cfg))
        _check_shape(experiment, stage, cfg, degrees)
        _check_stage(experiment, stage, cfg, seen, packed)
        seen[stage.name] = cfg
        if stage.export:
            packed.add(stage.name)
    _check_claims(experiment, seen)
    return seen


def shape_of(experiment: Experiment, stage: Stage, earlier: Mapping[str, ModelConfig]) -> ModelConfig:
    """The shape of a stage's model, known before anything is built."""
    cfg = earlier[stage.start] if stage.start is not None else stage.model or experiment.model
    return cfg if stage.shrink is None else stage.shrink.apply(cfg)


def _check_name(where: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: got '{name}', expected letters, digits, - and _: it becomes a folder")


def _check_batches(experiment: Experiment, degrees: Mapping[str, int]) -> None:
    ways = 1
    for axis in BATCH_AXES:
        ways *= degrees[axis]
    train = experiment.train
    if train.batch % (ways * train.accumulate):
        raise ConfigError(
            f"train.batch: got {train.batch} rows, expected a multiple of mesh.data x mesh.fsdp x train.accumulate = "
            f"{ways} x {train.accumulate}; every device takes equally many rows in every microbatch"
        )
    if experiment.evaluate.batch % ways:
        raise ConfigError(
            f"evaluate.batch: got {experiment.evaluate.batch} rows, expected a multiple of mesh.data x mesh.fsdp = {ways}"
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
    if stage.start is not None and stage.model is not None:
        raise ConfigError(
            f"{where} '{stage.name}': sets both start and model; a stage that begins from '{stage.start}' has its shape. Drop one of them."
        )


def _check_shape(experiment: Experiment, stage: Stage, cfg: ModelConfig, degrees: dict[str, int]) -> None:
    where = f"stage '{stage.name}'"
    needed = vocab_size(experiment.data)
    if cfg.vocab < needed:
        raise ConfigError(
            f"{where}: the model has a vocabulary of {cfg.vocab} and the tokenizer '{experiment.data.tokenizer}' makes {needed} ids; "
            f"expected at least as many. Set model.vocab to {needed} or more."
        )
    if cfg.moe is not None and degrees["pipe"] > 1:
        raise ConfigError(
            f"{where}: mesh.pipe: got {degrees['pipe']} for a model with experts, expected 1: what routers cost is not yet added up over stages. "
            "Cut experts over mesh.expert and weights over mesh.fsdp instead."
        )
    problems = indivisible(param_specs(cfg), degrees)
    if problems:
        raise ConfigError(
            f"{where}: the mesh cannot cut {' and '.join(problems)} evenly; expected divisors. Change the degree or the model's size."
        )
    ways = degrees["tensor"] * degrees["context"]
    if experiment.mesh.sequence == "ulysses" and cfg.heads % ways:
        raise ConfigError(
            f"{where}: got {cfg.heads} query heads, expected a multiple of mesh.tensor x mesh.context = {degrees['tensor']} x {degrees['context']}: "
            "mesh.sequence 'ulysses' gives every device whole heads. Set mesh.sequence to 'ring' or 'gather', or lower mesh.context."
        )


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
        if static and stage.start is None and steps:
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
