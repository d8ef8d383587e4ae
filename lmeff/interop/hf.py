"""Models of Hugging Face folders as lmeff's own, and back: config.json, safetensors, tokenizer files.

Neither torch nor transformers is needed, and no code that lies beside the weights runs. Weights go straight into the shards of a layout: a device's
part of a leaf is read from the part of the files that holds it. An export is the inverse map, and gives back the bytes that an import read.
"""

import contextlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten, map_with_path
from lmeff.interop.config_json import IDS, NAME, choose, config_of, family_of, read_file, text_of
from lmeff.interop.families import Family
from lmeff.interop.place import fetch_tensor, place_leaf
from lmeff.interop.stored import Stored, named, names, outermost, pieces, read_part, stored_shape, stored_value
from lmeff.interop.tensor_writer import SHARD_BYTES
from lmeff.interop.tensors import Tensors, TensorWriter, open_tensors
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout

DTYPES = ("float32", "bfloat16", "float16")
ROTARY = r".*rotary_emb\.inv_freq"  # a buffer of older files; its numbers follow from the config
ROWS = 4096  # of a table, compared at a time


def read_config(folder: Path) -> ModelConfig:
    """The config of the model in a folder. Raises `ConfigError` by name of the key where lmeff would compute something else."""
    values = read_file(folder)
    return config_of(family_of(folder, values), values, str(Path(folder) / NAME))


def details(folder: Path) -> dict[str, Any]:
    """What an export of this model should be told: its `family`, and the keys to `keep`, which change nothing here but something to its users."""
    values = read_file(folder)
    family = family_of(folder, values)
    text = values.get(family.part[0]) if family.part is not None else None
    ids = {**values, **(text if isinstance(text, dict) else {})}
    return {"family": family.name, "keep": {key: ids[key] for key in IDS if ids.get(key) is not None}}


def load(
    folder: Path, layout: Layout, dtype: Any = None, *, then: Callable[[str, Any], Any] | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the parameters of the model in a folder, placed by `layout`.

    dtype: of all parameters; None keeps what is stored. then: `(path, parameter) -> leaf`, applied to each before the next one is read.

    Raises `CheckpointError` that lists tensors where they are missing, unknown, of another shape, or of a dtype that is no weight's, before any is read.
    """
    cfg = read_config(folder)
    family = family_of(folder, read_file(folder))
    tensors = open_tensors(Path(folder))
    leaves = located(family, cfg, tensor_prefix(family, tensors))
    _check(tensors, leaves, cfg, family, Path(folder))

    def leaf(path: str, spec: ParamSpec) -> Any:
        read = read_leaf(tensors, spec, leaves[path][1], cfg, layout, dtype)
        return read if then is None else jax.block_until_ready(then(path, read))

    return cfg, map_with_path(leaf, param_specs(cfg))


def export(
    cfg: ModelConfig,
    params: Tree,
    folder: Path,
    *,
    family: str | None = None,
    tokenizer_files: Iterable[Path] = (),
    dtype: Any = None,
    keep: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Family:
    """Writes a model as a new folder that transformers opens; the folder appears whole or not at all. Gives the family it was written as.

    family: None takes the first that has words for the config. dtype: of the files; None keeps each parameter's own.
    keep:   keys of config.json to carry over (`details`). shard_bytes: the most in a file before there are several with an index.

    On a pod every process calls it, and the first writes. Raises `ConfigError` where no family can say what the model is.
    """
    folder = Path(folder)
    chosen = choose(cfg, family, folder)
    leaves, flat = located(chosen, cfg, chosen.prefixes[0]), flatten(params)
    _check_params(flat, cfg, folder)
    found = pieces({path: (spec.letters, stored) for path, (spec, stored) in leaves.items()}, cfg.sizes)
    kinds = {name: stored_dtype([flat[piece.path] for piece in parts], dtype) for name, parts in found.items()}
    specs = {n: jax.ShapeDtypeStruct(stored_shape(parts[0].stored, cfg.sizes), kinds[n]) for n, parts in found.items()}
    usual = Counter(map(str, kinds.values())).most_common(1)[0][0]
    text = text_of(chosen, cfg, usual, keep or {}, folder)
    files = checked_files(tokenizer_files, folder)
    first = jax.process_index() == 0
    with TensorWriter(folder, specs, shard_bytes=shard_bytes) if first else contextlib.nullcontext() as writer:
        for name, parts in found.items():
            value = stored_value(parts, lambda path, at: fetch_tensor(flat[path], *at), cfg.sizes)
            if writer is not None:
                writer.write(name, value.astype(kinds[name], copy=False))
            del value  # before the next is fetched
        if writer is not None:
            (writer.folder / NAME).write_text(text, encoding="utf-8")
            for file in files:
                shutil.copyfile(file, writer.folder / file.name)
    return chosen


def located(family: Family, cfg: ModelConfig, prefix: tuple[str, str]) -> dict[str, tuple[ParamSpec, Stored]]:
    """Where each parameter of the config lies in files of the family."""
    body, head = prefix

    def at(stored: Stored) -> Stored:
        return stored._replace(name=stored.name.replace("{body}", body).replace("{head}", head))

    return {path: (spec, at(family.leaves[path])) for path, spec in flatten(param_specs(cfg)).items()}


def tensor_prefix(family: Family, tensors: Tensors) -> tuple[str, str]:
    """What stands before the names of this checkpoint's tensors, of the body and of the head."""
    table = family.leaves["embed/table"].name
    fitting = [prefix for prefix in family.prefixes if table.replace("{body}", prefix[0]) in tensors]
    return (fitting or list(family.prefixes))[0]


def read_leaf(
    tensors: Tensors, spec: ParamSpec, stored: Stored, cfg: ModelConfig, layout: Layout, dtype: Any
) -> jax.Array:
    """A parameter, its shards read from the files; `dtype` None keeps what is stored."""
    sizes, letters = cfg.sizes, spec.letters
    if dtype is None:
        dtype = np.result_type(*{tensors[name].dtype for name, _ in names(stored, letters, sizes)})

    def read(index: Sequence[slice], *at: int) -> np.ndarray:
        return read_part(tensors, stored, letters, sizes, named(stored, letters, at), tuple(index))

    stacked = len(stored.stacks(letters))
    sharding = layout.sharding(letters, spec.shape)
    return place_leaf(spec.shape, dtype, sharding, read, stacked=stacked, outer=outermost(stored, letters))


def _check(
    tensors: Tensors, leaves: Mapping[str, tuple[ParamSpec, Stored]], cfg: ModelConfig, family: Family, folder: Path
) -> None:
    """Holds the files to the config: every tensor is used, and nothing is missing."""
    sizes = cfg.sizes
    found = pieces({path: (spec.letters, stored) for path, (spec, stored) in leaves.items()}, sizes)
    missing = [name for name in found if name not in tensors]
    unknown = [name for name in tensors if name not in found and not is_ignored(name, family)]
    if cfg.tied:
        unknown = [name for name in unknown if not _is_tied_head(name, tensors, leaves, family, folder)]
    if missing or unknown:
        parts = [f"{what} {_list(which)}" for what, which in (("lacks", missing), ("has besides", unknown)) if which]
        raise CheckpointError(
            f"{folder}: got weights that do not fit {NAME} (model_type '{family.name}', {cfg.layers} layers): the folder {' and '.join(parts)}; "
            "expected each tensor of the model and no other. Check that both are of one model; nothing is loaded."
        )
    for name, parts in found.items():
        shape, wanted = tuple(tensors[name].shape), stored_shape(parts[0].stored, sizes)
        if shape != wanted:
            raise CheckpointError(
                f"{folder}: {name}: got the shape {list(shape)}, expected {list(wanted)} from {NAME}; check that both are of one model, nothing is loaded."
            )
        if str(tensors[name].dtype) not in DTYPES:
            raise CheckpointError(
                f"{folder}: {name}: got the dtype {tensors[name].dtype}, expected {', '.join(DTYPES)}; quantized weights of this kind are not read, "
                "import the model they were made from."
            )


def is_ignored(name: str, family: Family) -> bool:
    """Whether a tensor is known to say nothing of the language model."""
    return any(re.fullmatch(pattern, name) for pattern in (ROTARY, *family.ignored))


def _list(which: Sequence[str], most: int = 6) -> str:
    more = f" and {len(which) - most} more" if len(which) > most else ""
    return ", ".join(which[:most]) + more


def _is_tied_head(
    name: str, tensors: Tensors, leaves: Mapping[str, tuple[ParamSpec, Stored]], family: Family, folder: Path
) -> bool:
    """Whether this is the head of a tied model: then it must be the table again."""
    heads = [family.leaves["head/w"].name.replace("{head}", head) for _, head in family.prefixes]
    table = leaves["embed/table"][1].name
    if name not in heads or table not in tensors:
        return False
    rows = tensors[table].shape[0]
    parts = [(slice(i, min(i + ROWS, rows)),) for i in range(0, rows, ROWS)]
    same = tensors[name].shape == tensors[table].shape and all(
        np.array_equal(tensors.read(name, part), tensors.read(table, part)) for part in parts
    )
    if not same:
        raise CheckpointError(
            f"{folder}: {name}: got other numbers than {table}, expected the same, since {NAME} says tie_word_embeddings; "
            "set it to false if the head is its own, nothing is loaded."
        )
    return True


def _check_params(flat: Mapping[str, Any], cfg: ModelConfig, folder: Path) -> None:
    specs = flatten(param_specs(cfg))
    if flat.keys() != specs.keys():
        differ = sorted(flat.keys() ^ specs.keys())
        raise ConfigError(
            f"{folder}: params: got a tree that differs from the config's in {_list(differ)}; nothing is written."
        )
    for path, spec in specs.items():
        leaf = flat[path]
        if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(
                f"{folder}: {path}: got {type(leaf).__name__}, expected an array of floating numbers; a plain export has no packed weights: export it "
                "as compressed-tensors or GGUF, or give the values it stands for."
            )
        if leaf.shape != spec.shape:
            raise ConfigError(
                f"{folder}: {path}: got the shape {list(leaf.shape)}, expected {list(spec.shape)} ({spec.letters}) from the config; nothing is written."
            )


def stored_dtype(parts: Sequence[jax.Array], dtype: Any) -> np.dtype:
    """The dtype that these leaves are written in: `dtype`, or their own."""
    return np.dtype(dtype) if dtype is not None else np.result_type(*{part.dtype for part in parts})


def checked_files(files: Iterable[Path], folder: Path) -> list[Path]:
    """Files of a tokenizer to lie beside the weights; raises `ConfigError` where one cannot."""
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise ConfigError(
                f"{folder}: tokenizer_files: got {path}, expected a file that exists; nothing is written."
            )
        if path.name == NAME or path.suffix == ".safetensors" or [p.name for p in paths].count(path.name) > 1:
            raise ConfigError(
                f"{folder}: tokenizer_files: got {path}, expected files with names of their own; nothing is written."
            )
    return paths
