"""Configs on disk: Python files that give an `Experiment`, and the resolved config that a run keeps."""

import importlib.util
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.strategies import configure_tagged_union

from lmeff.config.schema import Experiment, Transform, flat_values
from lmeff.core.decode import explain
from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.files import write_text
from lmeff.models.config import ModelConfig, current

FILE = "config.json"

# Settings that may change between a run and its continuation: they change where, in which order or how often, never what.
FREE = (
    "name",
    "runs",
    "mesh.",
    "train.accumulate",
    "train.remat",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "evaluate.",
    "log.",
    "claims.",
)


def load_experiment(path: Path) -> Experiment:
    """Runs a config file and returns what its `experiment()` gives."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ConfigError(f"config: got '{path}', expected a Python file with a function experiment(); here: {near}")
    spec = importlib.util.spec_from_file_location(f"lmeff_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config: got '{path}', expected a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "experiment", None)
        if make is None:
            raise ConfigError(
                f"{path}: defines no function experiment(); expected one that returns lmeff.config.Experiment"
            )
        made = make()
    except ConfigError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{path}: {type(error).__name__}: {error} (line {where.lineno} of {where.filename})"
        ) from error
    if not isinstance(made, Experiment):
        raise ConfigError(f"{path}: experiment() gave a {type(made).__name__}, expected an lmeff.config.Experiment")
    return made


def origins(experiment: Experiment, from_file: Experiment, file: str) -> dict[str, str]:
    """Where each value comes from, `{dotted path: "default" | file | "command line"}`."""
    written, defaults = dict(flat_values(from_file)), dict(flat_values(Experiment(name="")))
    found = {}
    for path, value in flat_values(experiment):
        if path not in written or written[path] != value:
            found[path] = "command line"
        elif path in defaults and defaults[path] == value:
            found[path] = "default"
        else:
            found[path] = file
    return found


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    model = make_dict_structure_fn(ModelConfig, converter, _cattrs_forbid_extra_keys=True)
    converter.register_structure_hook(ModelConfig, lambda values, kind: model(current(values), kind))
    configure_tagged_union(Transform, converter, tag_name="transform")
    return converter


def to_json(experiment: Experiment) -> dict[str, Any]:
    """The resolved config as nested JSON values."""
    return _converter().unstructure(experiment)


def write(experiment: Experiment, directory: Path) -> None:
    """Keeps the resolved config with its run."""
    write_text(directory / FILE, json.dumps(to_json(experiment), indent=1) + "\n")


def read(directory: Path) -> Experiment:
    """The config of a run."""
    file = directory / FILE
    if not file.is_file():
        raise CheckpointError(
            f"{directory}: holds no run ({FILE} is missing); expected a folder that `lmeff run` or `lmeff train` made"
        )
    try:
        return _converter().structure(json.loads(file.read_text(encoding="utf-8")), Experiment)
    except (json.JSONDecodeError, cattrs.BaseValidationError) as error:
        reason = explain(error, "config") if isinstance(error, cattrs.BaseValidationError) else str(error)
        raise CheckpointError(
            f"{file}: is not a config of this version of lmeff ({reason}); expected what the run wrote"
        ) from error


def check_resume(experiment: Experiment, directory: Path) -> None:
    """Refuses to go on with a run under another config; says what differs. Meshes may differ, and stages may be added or taken away."""
    if not (directory / FILE).exists():
        return
    old = read(directory)
    kept = {stage.name for stage in old.recipe} & {stage.name for stage in experiment.recipe}
    before, now = (_comparable(config, kept) for config in (old, experiment))
    changed = [path for path in before | now if before.get(path) != now.get(path)]
    if changed:
        told = "; ".join(f"{path}: {_told(before, path)} then, {_told(now, path)} now" for path in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ConfigError(
            f"{directory}: holds a run with another config ({told}{more}); expected the same one to go on. "
            f"Choose another --name, or delete the folder to begin anew."
        )


def _comparable(experiment: Experiment, stages: set[str]) -> dict[str, Any]:
    """The settings that must not change, of the stages that both configs have. Where a model is loaded from may change, if it is the same (`loads`), and
    so may whether its shape is said besides."""
    said = tuple(f"recipe.{s.name}.model" for s in experiment.recipe if s.load is not None)

    def counts(path: str) -> bool:
        return not path.startswith((*FREE, *said)) and (not path.startswith("recipe.") or path.split(".")[1] in stages)

    def comparable(path: str, value: Any) -> Any:
        return value is not None if path.startswith("recipe.") and path.endswith(".load") else value

    return {path: comparable(path, value) for path, value in flat_values(experiment) if counts(path)}


def _told(values: Mapping[str, Any], path: str) -> str:
    return repr(values[path]) if path in values else "absent"
