"""Models in and out: someone else's becomes a model folder, and whatever `open_model` opens is written in a format that others read."""

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.config.loads import is_compressed, is_huggingface
from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.files import passing, refuse_existing
from lmeff.core.numerics import is_qtensor, materialize
from lmeff.core.specs import count
from lmeff.data import pretrained
from lmeff.data.portable import carried, special_ids, write_portable
from lmeff.data.scored_bpe import ScoredBpe
from lmeff.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer
from lmeff.interop import compressed_folder, gguf, hf, llama2c
from lmeff.interop.families import FAMILIES
from lmeff.interop.model_folder import TOKENIZER, Header, is_model_folder
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, MeshPlan, make_layout
from lmeff.recipe.open import OpenModel, is_run, open_model
from lmeff.recipe.sources import check_vocab, stored_dtype, write_model


class Foreign(NamedTuple):
    """A model of others that can be imported. load: `(layout, dtype) -> (cfg, params)`. dtype: as stored."""

    cfg: ModelConfig
    family: str
    keep: Mapping[str, Any]
    dtype: Any
    load: Callable[[Layout, Any], tuple[ModelConfig, Any]]


def foreign(source: Path) -> Foreign:
    """What lies at `source`, without its weights; raises `CheckpointError` where it is no model that can be imported."""
    if source.is_dir() and is_huggingface(source):
        if is_compressed(source):
            raise ConfigError(
                f"{source}: its weights are packed (compressed-tensors), expected plain ones to import; every command takes this folder as it is"
            )
        found = hf.details(source)
        return Foreign(
            cfg=hf.read_config(source),
            family=found["family"],
            keep=found["keep"],
            dtype=stored_dtype(source),
            load=lambda layout, dtype: hf.load(source, layout, dtype),
        )
    if source.is_file() and source.suffix == ".bin":
        cfg = llama2c.read_file(source).cfg
        return Foreign(cfg, "llama2.c", {}, jnp.float32, lambda layout, dtype: llama2c.load(source, layout, dtype))
    told = "does not exist" if not source.exists() else "holds no model that can be imported"
    raise CheckpointError(
        f"{source}: {told}, expected a Hugging Face folder (config.json and .safetensors) or a model file of llama2.c (.bin); check the path"
    )


def import_model(source: Path, out: Path, *, tokenizer: Path | None = None, dtype: Any = None) -> Header:
    """Writes the model at `source` as the model folder `out`, complete or not at all.

    tokenizer: its file or folder; None takes what lies in the source's folder, if anything does. dtype: of the parameters; None keeps what is stored.
    Raises `CheckpointError` where `out` exists, and for whatever the source's readers refuse; all but damaged weights before any weight is read.
    """
    refuse_existing(out)
    found = foreign(source)
    if tokenizer is None and source.is_dir() and pretrained.holds_one(source):
        tokenizer = source
    if tokenizer is not None:
        check_vocab(found.cfg, pretrained.load_tokenizer(tokenizer), str(tokenizer))
    layout = make_layout(MeshPlan(data=1), jax.devices()[:1])
    cfg, params = found.load(layout, found.dtype if dtype is None else dtype)
    return write_model(out, cfg, params, family=found.family, origin=str(source), keep=found.keep, tokenizer=tokenizer)


def export_model(
    path: Path,
    out: Path,
    *,
    artifact: str | None = None,
    format: str = "hf",
    dtype: Any = None,
    weights: str | None = None,
    pretokenizer: str | None = None,
) -> dict[str, Any]:
    """Writes a model for others to read, complete or not at all; gives what was written as a JSON-able object.

    Raises `ConfigError` for a format that does not exist or has no words for the model, `CheckpointError` where `out` exists.
    """
    if format not in WRITERS:
        raise ConfigError(f"--format: got '{format}', expected one of {', '.join(WRITERS)}")
    refuse_existing(out)
    opened = open_model(path, artifact=artifact, mesh=MeshPlan(data=1), devices=jax.devices()[:1], weights=weights)
    with tempfile.TemporaryDirectory(prefix="lmeff-") as folder, passing(Path(folder)):
        files = tokenizer_files(path, opened.tokenizer, Path(folder))
        family = WRITERS[format](opened, out, files, Choice(dtype, pretokenizer))
    kept = format == "compressed-tensors"
    left_out = [] if kept else sorted({site for site, _ in opened.served.numerics.activations})
    return {
        "model": str(out),
        "source": opened.source,
        "format": format,
        "family": family,
        "parameters": count(param_specs(opened.served.cfg)),
        "tokenizer_files": sorted(file.name for file in files),
        "activation_formats_left_out": left_out,
    }


def tokenizer_files(path: Path, tokenizer: Tokenizer | None, scratch: Path) -> list[Path]:
    """The files of a model's tokenizer that an export takes along; those of lmeff's own are made in `scratch`."""
    if isinstance(tokenizer, BpeTokenizer | ByteTokenizer):
        write_portable(tokenizer, scratch)
        return carried(scratch)
    if tokenizer is None:
        return []
    if is_run(path):
        return carried(path / "data" / TOKENIZER)
    if is_model_folder(path):
        return carried(path / TOKENIZER)
    pretrained.keep(path, scratch)
    return carried(scratch)


class Choice(NamedTuple):
    """What an export is told. dtype: of what is not packed; None keeps it. pretokenizer: llama.cpp's name for how a byte-level tokenizer cuts text."""

    dtype: Any = None
    pretokenizer: str | None = None


def _write_hf(opened: OpenModel, out: Path, files: Sequence[Path], choice: Choice) -> str:
    """Packed weights are written as the numbers they stand for."""
    params = opened.served.params
    if is_packed(params):
        params = jax.jit(materialize)(params)
    return hf.export(opened.served.cfg, params, out, tokenizer_files=files, **_told(opened, choice, "hf")).name


def _write_compressed(opened: OpenModel, out: Path, files: Sequence[Path], choice: Choice) -> str:
    """Codes and scales as they are, with the formats of activations."""
    served = opened.served
    if not is_packed(served.params):
        raise ConfigError(
            f"--format compressed-tensors: {opened.source} holds no packed weights, expected some; pack them on the way with --weights, such as int4/g128, "
            "or name an artifact of a stage that exports"
        )
    told = _told(opened, choice, "compressed-tensors")
    return compressed_folder.export(
        served.cfg,
        served.params,
        out,
        numerics=served.numerics,
        ranges=served.ranges,
        tokenizer_files=files,
        **told,
    ).name


def is_packed(params: Any) -> bool:
    """Whether some leaf is."""
    return any(is_qtensor(x) for x in jax.tree.leaves(params, is_leaf=is_qtensor))


def _told(opened: OpenModel, choice: Choice, format: str) -> dict[str, Any]:
    """What a Hugging Face folder is told besides the weights."""
    if choice.pretokenizer is not None:
        raise ConfigError(
            f"--pretokenizer: got '{choice.pretokenizer}' for the format {format}, expected it with gguf alone"
        )
    keep = opened.keep or ({} if opened.tokenizer is None else special_ids(opened.tokenizer))
    return {"family": opened.family if opened.family in FAMILIES else None, "keep": keep, "dtype": choice.dtype}


def _write_gguf(opened: OpenModel, out: Path, files: Sequence[Path], choice: Choice, *, kind: str) -> str:
    """One file for llama.cpp; a tokenizer of llama2.c, which the format has no place for, stays out."""
    if choice.dtype is not None:
        raise ConfigError(
            f"--dtype: got {choice.dtype} for gguf, expected it in the format's name, one of {', '.join(WRITERS)}"
        )
    folder = None if not files or isinstance(opened.tokenizer, ScoredBpe) else files[0].parent
    gguf.export(
        opened.served.cfg,
        opened.served.params,
        out,
        kind=kind,
        tokenizer=folder,
        pretokenizer=choice.pretokenizer,
        name=out.stem,
    )
    return f"gguf {kind}"


# Each writes a model in its format and gives what it was written as.
WRITERS: dict[str, Callable[[OpenModel, Path, Sequence[Path], Choice], str]] = {
    "hf": _write_hf,
    "compressed-tensors": _write_compressed,
    **{f"gguf-{kind.lower()}": functools.partial(_write_gguf, kind=kind) for kind in gguf.TYPES},
}
