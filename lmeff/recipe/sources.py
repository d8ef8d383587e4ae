"""Models from elsewhere: their weights onto a mesh, and a model folder of one's own around them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.compress.base import State
from lmeff.compress.config import Quantize, pack_leaf
from lmeff.config.loads import is_compressed, is_huggingface, read_config
from lmeff.core.errors import CheckpointError
from lmeff.core.files import new_folder
from lmeff.core.numerics import is_qtensor, materialize
from lmeff.core.ops import FLOATING, Numerics
from lmeff.core.specs import abstract
from lmeff.core.tree import Tree, flatten, map_with_path
from lmeff.data import pretrained
from lmeff.interop import compressed_load, hf
from lmeff.interop.model_folder import ARTIFACT, TOKENIZER, Header, is_model_folder, read_header, write_header
from lmeff.interop.tensors import open_tensors
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, shardings
from lmeff.recipe.artifact import Artifact, Recipe, load, save


class Weights(NamedTuple):
    """A model as its files have it: parameters, some of which may be packed, and the formats of activations that go with them."""

    cfg: ModelConfig
    params: Any
    numerics: Numerics = FLOATING


def load_weights(path: Path, layout: Layout, dtype: Any) -> Weights:
    """The model of a model folder or a Hugging Face folder, on a mesh; what is not packed in `dtype`."""
    if is_model_folder(path):
        header = read_header(path)
        found = load(path.name, Recipe(), path / ARTIFACT, layout, jnp.dtype(header.dtype))
        return Weights(found.cfg, cast(found.params, param_specs(found.cfg), layout, dtype))
    if is_huggingface(path):
        if is_compressed(path):
            return Weights(*compressed_load.load(path, layout, dtype))
        return Weights(*hf.load(path, layout, dtype))
    raise CheckpointError(
        f"{path}: holds no model, expected a folder that `lmeff import` made or a Hugging Face folder"
    )


def load_numbers(path: Path, layout: Layout, dtype: Any) -> tuple[ModelConfig, Any]:
    """The same to train from: packed weights as the numbers that they stand for, activations in floating point."""
    found = load_weights(path, layout, dtype)
    if not any(is_qtensor(x) for x in jax.tree.leaves(found.params, is_leaf=is_qtensor)):
        return found.cfg, found.params
    plain = abstract(param_specs(found.cfg), dtype)
    out = shardings(plain, param_specs(found.cfg), layout)
    return found.cfg, jax.jit(materialize, out_shardings=out)(found.params)


def load_packed(path: Path, layout: Layout, dtype: Any, transform: Quantize) -> tuple[ModelConfig, Any]:
    """The same with the weights packed as the transform says; of a Hugging Face folder one at a time, so that the model is never whole in floating point."""
    cfg = read_header(path).cfg if is_model_folder(path) else read_config(path)
    specs = param_specs(cfg)
    flat, packed = flatten(specs), pack_leaf(transform, specs)

    def pack(name: str, w: Any) -> Any:
        made = jax.eval_shape(lambda x: packed(name, x), w)
        out = shardings({"leaf": made}, {"leaf": flat[name]}, layout)["leaf"]
        return jax.jit(lambda x: packed(name, x), out_shardings=out)(w)

    if is_huggingface(path) and not is_compressed(path):
        return hf.load(path, layout, dtype, then=pack)
    return cfg, map_with_path(lambda name, w, _: pack(name, w), load_numbers(path, layout, dtype)[1], specs)


def stored_dtype(path: Path) -> Any:
    """The narrowest dtype that holds all parameters of a model as they are stored."""
    if is_model_folder(path):
        return jnp.dtype(read_header(path).dtype)
    held = {name: info.dtype for name, info in open_tensors(path).items() if not name.endswith("_scale")}
    floats = {dtype for dtype in held.values() if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1}
    if not floats:
        raise CheckpointError(f"{path}: its .safetensors hold no floating numbers, expected the weights of a model")
    return jnp.result_type(*floats)


def cast(params: Any, specs: Tree, layout: Layout, dtype: Any) -> Any:
    """Floating leaves in another dtype, where they lie; packed ones stay."""

    def leaf(x: Any) -> Any:
        return x if is_qtensor(x) else x.astype(dtype)

    if all(is_qtensor(x) or x.dtype == dtype for x in jax.tree.leaves(params, is_leaf=is_qtensor)):
        return params
    return jax.jit(
        lambda tree: jax.tree.map(leaf, tree, is_leaf=is_qtensor), out_shardings=shardings(params, specs, layout)
    )(params)


def write_model(
    out: Path,
    cfg: ModelConfig,
    params: Any,
    *,
    family: str,
    origin: str,
    keep: Mapping[str, Any],
    tokenizer: Path | None,
) -> Header:
    """Writes a model folder, complete or not at all. tokenizer: its file or folder, which is copied.

    Raises `CheckpointError` where `out` exists or the model has fewer rows than the tokenizer ids.
    """
    dtypes = {x.dtype.name for x in jax.tree.leaves(params)}
    assert len(dtypes) == 1, dtypes
    header = Header(cfg=cfg, family=family, dtype=dtypes.pop(), origin=origin, keep=keep)
    with new_folder(out) as folder:
        if tokenizer is not None:
            check_vocab(cfg, pretrained.keep(tokenizer, folder / TOKENIZER), str(tokenizer))
        artifact = Artifact(name=out.name, cfg=cfg, recipe=Recipe(), params=params, state=State({}, {}))
        save(artifact, folder / ARTIFACT)
        write_header(header, folder)
    return read_header(out)


def check_vocab(cfg: ModelConfig, tokenizer: pretrained.Tokenizer, where: str) -> None:
    """Refuses a tokenizer with ids that the model has no rows for; more rows (an embedding filled up) are fine."""
    if tokenizer.vocab > cfg.vocab:
        raise CheckpointError(
            f"{where}: the tokenizer makes {tokenizer.vocab} ids and the model has a vocabulary of {cfg.vocab}, expected at least as many; "
            "they do not belong together. Name the model's own with --tokenizer."
        )
