"""One way to open a model that is to be run and not trained: an artifact of a run, a folder that `lmeff import` made, or one of Hugging Face."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from lmeff.config import Experiment, Stage
from lmeff.config.files import FILE, read
from lmeff.config.loads import Loaded, describe, is_huggingface, kept
from lmeff.config.validate import check_cuts, shapes
from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import parse_format
from lmeff.core.precision import Policy, parse
from lmeff.data import pretrained
from lmeff.data.shards import open_tokenizer
from lmeff.data.tokenizer import Tokenizer
from lmeff.infer.packing import quantized
from lmeff.infer.served import Served
from lmeff.interop.model_folder import TOKENIZER, is_model_folder
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, MeshPlan, make_layout
from lmeff.recipe import artifact as artifacts
from lmeff.recipe.artifact import Artifact, Recipe
from lmeff.recipe.sources import cast, check_vocab, load_weights, stored_dtype
from lmeff.recipe.stage import recipe_of

ANY_MESH = MeshPlan()


class OpenModel(NamedTuple):
    """A model, its tokenizer where there is one, and what it is, in words.

    family, keep: what an export should be told: the family of which it was imported, None for one that began with lmeff, and keys of its config.json.
    """

    served: Served
    tokenizer: Tokenizer | None
    source: str
    family: str | None = None
    keep: Mapping[str, Any] = {}


def open_model(
    path: Path,
    *,
    artifact: str | None = None,
    mesh: MeshPlan = ANY_MESH,
    devices: Sequence[Any] | None = None,
    precision: str | None = None,
    weights: str | None = None,
) -> OpenModel:
    """The model at `path`: a run's folder, a model folder, or a Hugging Face folder.

    devices:   all where none are named.
    artifact:  of a run, by name; None takes the last stage that is done.
    precision: a policy, as the config has it; None takes the run's own, or computes in float32 on CPUs and elsewhere in what is stored.
    weights:   quantizes the blocks' matrices and an untied head on opening: "int8", "int4/g32", ...

    Raises `CheckpointError` where there is no model or a damaged one, `ConfigError` for a mesh, precision or format that does not fit.
    """
    path = Path(path)
    format = None if weights is None else parse_format(weights)
    policy = None if precision is None else parse(precision)
    layout = make_layout(mesh, devices)
    if is_run(path):
        opened = _open_run(path, artifact, layout, policy)
    elif artifact is not None:
        raise ConfigError(f"{path}: is no run, expected no artifact to be named; got '{artifact}'. Drop it.")
    else:
        opened = _open_folder(path, layout, policy)
    if format is None:
        return opened
    served = dataclasses.replace(opened.served, params=quantized(opened.served, format, str(path)))
    return opened._replace(served=served, source=f"{opened.source}, weights {format}")


def is_model(path: Path) -> bool:
    """Whether this folder holds a model of others: imported, or as Hugging Face has it."""
    return is_model_folder(path) or is_huggingface(path)


def is_run(path: Path) -> bool:
    """Whether a run wrote this folder."""
    return (path / FILE).is_file() and not is_model(path)


def _open_folder(path: Path, layout: Layout, policy: Policy | None) -> OpenModel:
    """A model folder or a Hugging Face folder."""
    from_there = describe(path)
    check_cuts(layout.plan.sequence, from_there.cfg, dict(layout.mesh.shape), str(path))
    policy = policy or _policy(stored_dtype(path), layout)
    cfg, params, numerics = load_weights(path, layout, policy.params)
    place = path / TOKENIZER if is_model_folder(path) else path
    tokenizer = pretrained.load_tokenizer(place) if place.is_dir() and pretrained.holds_one(place) else None
    if tokenizer is not None:
        check_vocab(cfg, tokenizer, str(place))
    served = Served(cfg=cfg, params=params, numerics=numerics, layout=layout, policy=policy)
    return OpenModel(served, tokenizer, f"{path} ({from_there.words})", from_there.family, from_there.keep)


def _policy(stored: Any, layout: Layout) -> Policy:
    compute = jnp.float32 if layout.platform == "cpu" else stored
    return Policy(params=stored, compute=compute)


def _open_run(path: Path, name: str | None, layout: Layout, policy: Policy | None) -> OpenModel:
    experiment = dataclasses.replace(read(path), mesh=layout.plan)
    own = parse(experiment.precision)
    policy = policy or own
    found = load_done(experiment, path, name, layout)
    check_cuts(layout.plan.sequence, found.cfg, dict(layout.mesh.shape), str(path))
    served = Served(
        cfg=found.cfg,
        params=cast(found.effective(), param_specs(found.cfg), layout, policy.params),
        numerics=found.recipe.numerics,
        ranges=found.ranges,
        layout=layout,
        policy=policy,
    )
    tokenizer = open_tokenizer(experiment.data, path / "data")
    origin = _origin(experiment, path, experiment.stage(found.name))
    source = f"artifact '{found.name}' of the run {path}"
    if origin is None:
        return OpenModel(served, tokenizer, source)
    return OpenModel(served, tokenizer, source, origin.family, origin.keep)


def _origin(experiment: Experiment, directory: Path, stage: Stage) -> Loaded | None:
    """The model that a stage was loaded from, or the stage that it began from, or that one's; None for random weights."""
    while stage.start is not None:
        stage = experiment.stage(stage.start)
    return kept(directory)[stage.name] if stage.load is not None else None


def load_done(experiment: Experiment, directory: Path, name: str | None, layout: Layout) -> Artifact:
    """An artifact of a run that is done: by name, or the last; the arrays of no other are read."""
    cfgs = shapes(experiment, directory)
    done = [s.name for s in experiment.recipe if (directory / "stages" / s.name / "done.json").exists()]
    if name is not None:
        experiment.stage(name)
    if not done or (name is not None and name not in done):
        wanted = "at least one finished stage" if name is None else f"a finished stage, one of {done}"
        told = "no artifact is done" if name is None else f"artifact '{name}' is not done"
        raise CheckpointError(f"{directory}: {told}; expected {wanted}. Run it first: lmeff run.")
    name = done[-1] if name is None else name
    recipes: dict[str, Recipe] = {}
    for stage in experiment.recipe:
        recipe = recipe_of(stage, cfgs[stage.name], recipes)
        recipes[stage.name] = dataclasses.replace(recipe, packed=recipe.packed or stage.export)
        if stage.name == name:
            break
    place = directory / "stages" / name / "artifact"
    return artifacts.load(name, recipes[name], place, layout, parse(experiment.precision).params)
