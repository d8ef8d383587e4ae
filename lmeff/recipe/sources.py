"""Models from elsewhere: their weights onto a mesh, and a model folder of one's own around them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.compress.base import State
from lmeff.config.loads import is_huggingface
from lmeff.core.errors import CheckpointError
from lmeff.core.files import new_folder
from lmeff.core.numerics import is_qtensor
from lmeff.core.tree import Tree
from lmeff.data import pretrained
from lmeff.interop import hf
from lmeff.interop.model_folder import ARTIFACT, TOKENIZER, Header, is_model_folder, read_header, write_header
from lmeff.interop.tensors import open_tensors
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, shardings
from lmeff.recipe.artifact import Artifact, Recipe, load, save


def load_weights(path: Path, layout: Layout, dtype: Any) -> tuple[ModelConfig, Any]:
    """The shape and the parameters of a model folder or a Hugging Face folder, on a mesh and in `dtype`."""
    if is_model_folder(path):
        header = read_header(path)
        found = load(path.name, Recipe(), path / ARTIFACT, layout, jnp.dtype(header.dtype))
        return found.cfg, cast(found.params, param_specs(found.cfg), layout, dtype)
    if is_huggingface(path):
        return hf.load(path, layout, dtype)
    raise CheckpointError(
        f"{path}: holds no model, expected a folder that `lmeff import` made or a Hugging Face folder"
    )


def stored_dtype(path: Path) -> Any:
    """The narrowest dtype that holds all parameters of a model as they are stored, codes left out."""
    if is_model_folder(path):
        return jnp.dtype(read_header(path).dtype)
    stored = {info.dtype for info in open_tensors(path).values()}
    floats = {dtype for dtype in stored if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1}
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
