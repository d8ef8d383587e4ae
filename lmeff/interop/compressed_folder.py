"""A model with packed leaves as a folder in the compressed-tensors layout, which vLLM and transformers open. Nothing is rounded.

Linear layers are quantized. The table of the embedding is written as the numbers it stands for, whatever its format: runtimes look rows up in it.
"""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lmeff.core.errors import ConfigError
from lmeff.core.numerics import QFormat, dequantize, is_qtensor, unpaired
from lmeff.core.ops import FLOATING, Numerics, Ranges
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten
from lmeff.interop.compressed import (
    Scheme,
    compressed_specs,
    compressed_tensors,
    quantization_config,
    scheme_for,
)
from lmeff.interop.config_json import NAME, choose, text_of
from lmeff.interop.families import Family
from lmeff.interop.hf import checked_files, located, stored_dtype
from lmeff.interop.packed_parts import is_linear, packed_matrix
from lmeff.interop.place import fetch_tensor
from lmeff.interop.stored import Piece, Stored, pieces, stored_shape, stored_value
from lmeff.interop.tensor_writer import SHARD_BYTES
from lmeff.interop.tensors import TensorWriter
from lmeff.models.config import ModelConfig

TABLE = "embed/table"
WEIGHT = ".weight"
CONFIG = "quantization_config"
Located = Mapping[str, tuple[ParamSpec, Stored]]


class Export(NamedTuple):
    """All there is to know of an export before the first number is fetched. schemes: of the packed tensors, by name."""

    cfg: ModelConfig
    leaves: dict[str, Any]
    specs: dict[str, ParamSpec]
    parts: dict[str, list[Piece]]
    schemes: dict[str, Scheme]
    kinds: dict[str, np.dtype]
    scales: np.dtype

    def declared(self) -> dict[str, Any]:
        """Shape and dtype of every tensor of the folder."""
        found: dict[str, Any] = {}
        for name, parts in self.parts.items():
            shape = stored_shape(parts[0].stored, self.cfg.sizes)
            if name in self.schemes:
                outputs, inputs = shape
                found |= compressed_specs(module_of(name), (outputs, inputs), self.schemes[name], self.scales)
            else:
                found[name] = jax.ShapeDtypeStruct(shape, self.kinds[name])
        return found


def export(
    cfg: ModelConfig,
    params: Tree,
    folder: Path,
    *,
    family: str | None = None,
    numerics: Numerics = FLOATING,
    ranges: Ranges | None = None,
    tokenizer_files: Iterable[Path] = (),
    dtype: Any = None,
    scales: Any = np.float32,
    keep: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Family:
    """Writes a model with packed leaves as a new folder that appears whole or not at all. Gives the family it was written as.

    numerics, ranges: the formats of the sites' inputs, and the calibrated ranges of the static ones, [L, 2] of sites in layers.
    dtype:  of what is not packed; None keeps each parameter's own. scales: of scales; float32 keeps every value.
    family, tokenizer_files, keep, shard_bytes: as of `hf.export`.

    On a pod every process calls it, and the first writes. Raises `ConfigError`, by the name of the tensor, for what the layout cannot say.
    """
    folder = Path(folder)
    chosen = choose(cfg, family, folder)
    plan = _planned(
        cfg,
        {p: unpaired(x) if is_qtensor(x) else x for p, x in flatten(params).items()},
        chosen,
        numerics,
        dtype,
        np.dtype(scales),
        folder,
    )
    text = _text(plan, chosen, keep or {}, folder)
    files = checked_files(tokenizer_files, folder)
    first = jax.process_index() == 0
    with (
        TensorWriter(folder, plan.declared(), shard_bytes=shard_bytes) if first else contextlib.nullcontext() as writer
    ):
        for name, value in _values(plan, ranges or {}):
            if writer is not None:
                writer.write(name, value)
        if writer is not None:
            (writer.folder / NAME).write_text(text, encoding="utf-8")
            for file in files:
                shutil.copyfile(file, writer.folder / file.name)
    return chosen


def module_of(name: str) -> str:
    """The module that owns a weight."""
    return name.removesuffix(WEIGHT)


def _planned(
    cfg: ModelConfig,
    leaves: dict[str, Any],
    family: Family,
    numerics: Numerics,
    dtype: Any,
    scales: np.dtype,
    folder: Path,
) -> Export:
    places = located(family, cfg, family.prefixes[0])
    specs = {path: spec for path, (spec, _) in places.items()}
    if leaves.keys() != specs.keys():
        raise ConfigError(
            f"{folder}: params: got a tree that differs from the config's in {sorted(leaves.keys() ^ specs.keys())}; nothing is written"
        )
    found = pieces({path: (spec.letters, stored) for path, (spec, stored) in places.items()}, cfg.sizes)
    schemes: dict[str, Scheme] = {}
    for name, parts in found.items():
        inputs = _inputs(name, parts, leaves, numerics)
        if any(is_qtensor(leaves[piece.path]) for piece in parts) and parts[0].path != TABLE:
            schemes[name] = _scheme(name, parts, leaves, specs, inputs, cfg)
    known = {site_of(piece.path) for name in schemes for piece in found[name]}
    if lost := sorted(dict(numerics.activations).keys() - known):
        raise ConfigError(
            f"{folder}: got inputs of {', '.join(lost)} in a format, expected it of packed linear layers alone; leave these sites in floating point"
        )
    if not schemes:
        raise ConfigError(
            f"{folder}: got no packed weight, expected some: nothing to write as compressed-tensors; write it as a plain folder"
        )
    kinds = {n: stored_dtype([leaves[piece.path] for piece in parts], dtype) for n, parts in found.items()}
    return Export(cfg, leaves, specs, found, schemes, kinds, scales)


def _scheme(
    name: str,
    parts: list[Piece],
    leaves: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
    inputs: QFormat | None,
    cfg: ModelConfig,
) -> Scheme:
    """How a packed tensor will lie on disk, told from shapes alone."""
    stored, spec = parts[0].stored, specs[parts[0].path]
    if not is_linear(stored, spec) or not name.endswith(WEIGHT):
        raise ConfigError(
            f"{name}: got packed {parts[0].path}, which this family stores as [{stored.dims}], expected a matrix of outputs by inputs: compressed-tensors "
            "knows Linear layers alone. Leave it in floating point, or write the model as another family."
        )
    made = packed_matrix(name, parts, leaves, specs, cfg.sizes, shapes=True)
    return scheme_for(made.format, inputs)


def _inputs(name: str, parts: list[Piece], leaves: Mapping[str, Any], numerics: Numerics) -> QFormat | None:
    """The format that the inputs of a tensor are brought to."""
    formats = {numerics.at(site_of(piece.path)) for piece in parts}
    if len(formats) > 1:
        raise ConfigError(
            f"{name}: got inputs in {', '.join(map(str, formats))}, expected one format: the matrices are stored as one, with one input"
        )
    (format,) = formats
    if format is not None and not all(is_qtensor(leaves[piece.path]) for piece in parts):
        raise ConfigError(
            f"{name}: got inputs in {format} for a weight in floating point, expected a packed one: compressed-tensors quantizes inputs of quantized layers "
            "alone. Quantize the weight, too, or leave this site in floating point."
        )
    return format


def site_of(path: str) -> str:
    """The site where a weight is multiplied: "blocks/attn/wq" at "attn.q", "blocks/mlp/up" at "mlp.up", "head/w" at "head"; no site for others."""
    *_, layer, name = path.split("/")
    return layer if layer == "head" else f"{layer}.{name.removeprefix('w')}"


def _text(plan: Export, family: Family, keep: Mapping[str, Any], folder: Path) -> str:
    usual = Counter(str(kind) for name, kind in plan.kinds.items() if name not in plan.schemes).most_common(1)[0][0]
    values = json.loads(text_of(family, plan.cfg, usual, keep, folder))
    dense = [
        module_of(name)
        for name, parts in plan.parts.items()
        if name not in plan.schemes and plan.specs[parts[0].path].is_matmul and parts[0].path != TABLE
    ]
    if plan.cfg.tied:
        dense.append(module_of(family.leaves["head/w"].name.replace("{head}", family.prefixes[0][1])))
    values[CONFIG] = quantization_config({module_of(name): scheme for name, scheme in plan.schemes.items()}, dense)
    return json.dumps(values, indent=2) + "\n"


def _values(plan: Export, ranges: Ranges) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the folder when its turn comes."""
    sizes = plan.cfg.sizes

    def fetch(path: str, at: tuple[int, ...]) -> np.ndarray:
        leaf = plan.leaves[path]
        return fetch_tensor(dequantize(leaf) if is_qtensor(leaf) else leaf, *at)

    for name, parts in plan.parts.items():
        scheme = plan.schemes.get(name)
        if scheme is None:
            yield name, stored_value(parts, fetch, sizes).astype(plan.kinds[name])
            continue
        t = packed_matrix(name, parts, plan.leaves, plan.specs, sizes)
        range_2 = _range(name, parts, scheme, ranges)
        yield from compressed_tensors(module_of(name), t, scheme, scales=plan.scales, inputs=range_2).items()


def _range(name: str, parts: list[Piece], scheme: Scheme, ranges: Ranges) -> np.ndarray | None:
    """The calibrated range of the inputs of a tensor; parts of one matrix have seen the same inputs."""
    if scheme.inputs is None or scheme.inputs.granularity != "tensor":
        return None
    found = [np.asarray(ranges[site_of(piece.path)]) for piece in parts]
    own = [range_2[piece.at[0]] if range_2.ndim > 1 else range_2 for range_2, piece in zip(found, parts, strict=True)]
    if not all(np.array_equal(range_2, own[0]) for range_2 in own):
        raise ConfigError(
            f"{name}: got different ranges of inputs for its parts, expected one: calibrate them together"
        )
    return own[0]
