"""Models that stages are loaded from: their shape and identity, known without reading a weight.

A run keeps both in `sources.json`: it goes on only from the very models that it began with, and once it has what it needs of them, without them.
A plan needs no more than the shape, so a stage may say it (`Stage.model` beside `Stage.load`) for machines where the folder is not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmeff.config.schema import Experiment, Stage
from lmeff.core.errors import CheckpointError, ConfigError, UserError
from lmeff.core.files import write_text
from lmeff.interop import compressed_load, hf
from lmeff.interop.model_folder import identity as folder_identity
from lmeff.interop.model_folder import is_model_folder, read_header
from lmeff.models.config import ModelConfig, read

FILE = "sources.json"
SAMPLE = 1 << 20  # bytes at each end of a file of weights that its identity is made of, with its size


class Loaded(NamedTuple):
    """A model on disk. identity: the same where its files are. words: what it is, in words. family, keep: what an export of it should be told."""

    cfg: ModelConfig
    identity: str
    words: str
    family: str
    keep: Mapping[str, Any]


def describe(path: Path) -> Loaded:
    """A model folder or a Hugging Face folder; raises `CheckpointError` where it is neither or damaged."""
    if is_model_folder(path):
        header = read_header(path)
        words = f"{header.family}, imported from {header.origin}"
        return Loaded(header.cfg, folder_identity(path), words, header.family, header.keep)
    if is_huggingface(path):
        words, told = f"{model_type(path)}, a Hugging Face folder", hf.details(path)
        if is_compressed(path):
            words += " of packed weights"
        return Loaded(read_config(path), huggingface_identity(path), words, told["family"], told["keep"])
    raise CheckpointError(
        f"{path}: holds no model, expected a folder that `lmeff import` made or a Hugging Face folder (config.json and .safetensors)"
    )


def is_huggingface(folder: Path) -> bool:
    """Whether it is a Hugging Face folder: its config.json names a model_type, which a run's does not."""
    return model_type(folder) is not None


def is_compressed(folder: Path) -> bool:
    """Whether it is a Hugging Face folder in the compressed-tensors layout."""
    return compressed_load.is_compressed(folder)


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, whatever its layout."""
    return compressed_load.read_config(folder) if is_compressed(folder) else hf.read_config(folder)


def model_type(folder: Path) -> str | None:
    """The model_type of a Hugging Face folder, None for anything else."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("model_type") if isinstance(found, dict) else None


def huggingface_identity(folder: Path) -> str:
    """A digest of its config and index, and of the name, size, beginning and end of every file of weights: reading all of them would take minutes."""
    made = hashlib.sha256()
    for file in sorted(
        [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), folder / "config.json"]
    ):
        size = file.stat().st_size
        made.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            made.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            made.update(stream.read(SAMPLE))
    return made.hexdigest()


def loads(experiment: Experiment, directory: Path) -> dict[str, Loaded]:
    """The models that stages are loaded from, by stage. directory: the run's; where a model is gone, what the run kept of it counts.

    Raises `ConfigError` where there is none.
    """
    before = kept(directory)
    return {s.name: _loaded(s, s.load, before.get(s.name)) for s in experiment.recipe if s.load is not None}


def absent(experiment: Experiment, directory: Path) -> dict[str, Stage]:
    """The stages, by name, whose folder is not here and whose run kept nothing of it, but that say its shape: enough for a plan, not for a run."""
    before = kept(directory)
    stages = {s.name: s for s in experiment.recipe if s.load is not None and s.model is not None}
    return {name: s for name, s in stages.items() if name not in before and not Path(str(s.load)).exists()}


def check_shape(stage: Stage, found: Loaded) -> None:
    """Refuses a folder with another shape than the stage says."""
    if stage.model is None or stage.model == found.cfg:
        return
    said, has = (dataclasses.asdict(cfg) for cfg in (stage.model, found.cfg))
    differ = [f"{name} {has[name]} (the stage says {said[name]})" for name in said if said[name] != has[name]]
    raise ConfigError(
        f"stage '{stage.name}'.model: got {', '.join(differ)} in {stage.load}, expected the shape that the stage says. "
        "Correct model, or drop it: the folder has its shape."
    )


def check_same(found: Mapping[str, Loaded], directory: Path) -> None:
    """Refuses to go on with a run from other models than it began with; they may lie elsewhere."""
    for name, before in kept(directory).items():
        if name in found and found[name].identity != before.identity:
            raise ConfigError(
                f"stage '{name}'.load: holds another model than the one that the run in {directory} began from, expected the same to go on. "
                "Put it back, choose another --name, or delete the folder to begin anew."
            )


def keep(found: Mapping[str, Loaded], directory: Path) -> None:
    """Keeps them with the run; those of stages that are no longer in the recipe stay."""
    if not found:
        return
    values = {
        name: {**one._asdict(), "cfg": dataclasses.asdict(one.cfg)}
        for name, one in (kept(directory) | dict(found)).items()
    }
    write_text(directory / FILE, json.dumps(values, indent=1) + "\n")


def _loaded(stage: Stage, path: str, before: Loaded | None) -> Loaded:
    if before is not None and not Path(path).exists():
        return before
    try:
        return describe(Path(path))
    except UserError as error:
        raise ConfigError(f"stage '{stage.name}'.load: {error}") from error


def kept(directory: Path) -> dict[str, Loaded]:
    """What a run kept, by stage; nothing where it began from random weights alone."""
    file = directory / FILE
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {name: Loaded(**{**one, "cfg": read(one["cfg"])}) for name, one in values.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: is damaged ({error!r}), expected what the run wrote; delete it, and see that its models are there"
        ) from error
