"""A folder in the compressed-tensors layout as a model with packed leaves, bit for bit: what vLLM's and Hugging Face's tools have quantized.

What lmeff could only hold by rounding, or would have to ignore, is refused: see `compressed.read_schemes`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lmeff.core.errors import CheckpointError
from lmeff.core.numerics import QFormat, QTensor
from lmeff.core.ops import FLOATING, Numerics
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import map_with_path
from lmeff.interop.compressed import Scheme, compressed_specs, read_matrix, read_schemes
from lmeff.interop.compressed_folder import CONFIG, TABLE, WEIGHT, module_of, site_of
from lmeff.interop.config_json import NAME, config_of, family_of, read_file
from lmeff.interop.families import Family
from lmeff.interop.hf import is_ignored, located, read_leaf, tensor_prefix
from lmeff.interop.packed_parts import is_linear, packed_leaf
from lmeff.interop.stored import Stored, named, names, pieces, stored_shape
from lmeff.interop.tensors import Tensors, open_tensors
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, shardings

Located = Mapping[str, tuple[ParamSpec, Stored]]


class Loaded(NamedTuple):
    """A model as its forward pass sees it. numerics: the formats of inputs that the folder asks for, found anew for each token."""

    cfg: ModelConfig
    params: dict[str, Any]
    numerics: Numerics


def is_compressed(folder: Path) -> bool:
    """Whether it is such a folder, by its config.json."""
    return _says(read_file(folder))


def read_config(folder: Path) -> ModelConfig:
    """The config of the model, but for how its weights are stored."""
    values = read_file(folder)
    kept = {key: value for key, value in values.items() if key != CONFIG}
    return config_of(family_of(folder, values), kept, str(Path(folder) / NAME))


def _says(values: Mapping[str, Any]) -> bool:
    found = values.get(CONFIG)
    return isinstance(found, dict) and found.get("quant_method") == "compressed-tensors"


def load(folder: Path, layout: Layout, dtype: Any = None, *, inputs: bool = True) -> Loaded:
    """The model of a folder with its packed leaves, bit for bit, placed by `layout`; one leaf at a time is whole on the host.

    dtype:  of what is not packed and of the values of what is; None keeps what is stored.
    inputs: whether inputs are quantized as the folder says; without it they stay as they are.

    Raises `CheckpointError` or `ConfigError`, by the name of the key or tensor, for what lmeff cannot hold without rounding.
    """
    folder = Path(folder)
    values = read_file(folder)
    where = f"{folder / NAME}: {CONFIG}"
    if not _says(values):
        raise CheckpointError(
            f"{where}: got {str(values.get(CONFIG))[:80]}, expected one with the quant_method compressed-tensors; nothing is loaded"
        )
    family = family_of(folder, values)
    cfg = read_config(folder)
    tensors = open_tensors(folder)
    places = located(family, cfg, tensor_prefix(family, tensors))
    schemes = _found_schemes(values[CONFIG], places, cfg, where)
    _check(tensors, places, schemes, cfg, family, folder)

    def leaf(path: str, spec: ParamSpec) -> Any:
        own = {schemes.get(name) for name, _ in names(places[path][1], spec.letters, cfg.sizes)}
        if own == {None}:
            return read_leaf(tensors, spec, places[path][1], cfg, layout, dtype)
        return _place(_packed(path, places, schemes, tensors, cfg, dtype), path, spec, layout)

    params = map_with_path(leaf, param_specs(cfg))
    return Loaded(cfg, params, _numerics(places, schemes, cfg, where) if inputs else FLOATING)


def _found_schemes(config: Mapping[str, Any], places: Located, cfg: ModelConfig, where: str) -> dict[str, Scheme]:
    """The scheme of every quantized tensor by name. All layers of a leaf have one: they are stacked."""
    schemes: dict[str, Scheme] = {}
    for path, (spec, stored) in places.items():
        if path == TABLE or not is_linear(stored, spec):
            continue
        own = [name for name, _ in names(stored, spec.letters, cfg.sizes)]
        found = read_schemes(config, map(module_of, own), where)
        if found and (len(found) < len(own) or len(set(found.values())) > 1):
            raise CheckpointError(
                f"{where}: got layers of {path} in different formats, expected one for all of them: lmeff stacks layers. Load the model's own weights "
                "and quantize them on opening."
            )
        schemes |= {f"{module}{WEIGHT}": scheme for module, scheme in found.items()}
    return schemes


def _check(
    tensors: Tensors, places: Located, schemes: Mapping[str, Scheme], cfg: ModelConfig, family: Family, folder: Path
) -> None:
    """Every tensor is used and nothing is missing."""
    sizes, wanted = cfg.sizes, {}
    for name, parts in pieces({path: (spec.letters, stored) for path, (spec, stored) in places.items()}, sizes).items():
        shape = stored_shape(parts[0].stored, sizes)
        if name in schemes:
            wanted |= dict.fromkeys(compressed_specs(module_of(name), (shape[0], shape[1]), schemes[name]))
        else:
            wanted[name] = shape
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted and not is_ignored(name, family)]
    if missing or unknown:
        what = [
            f"{words} {', '.join(some[:6])}" for words, some in (("lacks", missing), ("has besides", unknown)) if some
        ]
        raise CheckpointError(
            f"{folder}: got weights that do not fit {NAME}: the folder {' and '.join(what)}; nothing is loaded"
        )
    for name, shape in wanted.items():
        if shape is not None and tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{folder}: {name}: got the shape {[*tensors[name].shape]}, expected {[*shape]} from {NAME}; nothing is loaded"
            )


def _packed(
    path: str, places: Located, schemes: Mapping[str, Scheme], tensors: Tensors, cfg: ModelConfig, dtype: Any
) -> QTensor:
    spec, stored = places[path]
    sizes = cfg.sizes
    outputs, inputs = stored_shape(stored, sizes)

    def read(*at: int) -> QTensor:
        name = named(stored, spec.letters, at)
        return read_matrix(module_of(name), (outputs, inputs), schemes[name], tensors.read)

    return packed_leaf(path, spec, stored, sizes, read, None if dtype is None else np.dtype(dtype).name)


def _place(t: QTensor, path: str, spec: ParamSpec, layout: Layout) -> QTensor:
    tree, specs = {"leaf": t}, {"leaf": spec}
    return jax.device_put(tree, shardings(tree, specs, layout))["leaf"]


def _numerics(places: Located, schemes: Mapping[str, Scheme], cfg: ModelConfig, where: str) -> Numerics:
    found: dict[str, QFormat] = {}
    for path, (spec, stored) in places.items():
        for name, _ in names(stored, spec.letters, cfg.sizes):
            format = schemes[name].inputs if name in schemes else None
            if format is None:
                continue
            if format.granularity == "tensor":
                raise CheckpointError(
                    f"{where}: got inputs of {module_of(name)} with one scale for all tokens, expected a scale for each token: the ranges that lmeff "
                    "calibrates cannot say these scales exactly. Load it without its inputs' formats, or calibrate them here."
                )
            found[site_of(path)] = format
    return Numerics(tuple(sorted(found.items())))
