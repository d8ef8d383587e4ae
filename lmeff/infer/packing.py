"""Packing the weights of a model that is served, as they are: rounded, not trained."""

import re
from typing import Any

import jax

from lmeff.compress.config import MATRICES
from lmeff.core.errors import ConfigError
from lmeff.core.numerics import QFormat, is_qtensor, quantize
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten, unflatten
from lmeff.infer.served import Served
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, shardings

SERVED = f"{MATRICES}|head/w"  # what is packed: every matrix product's weight but a tied table's and routers


def quantized(served: Served, format: QFormat, where: str) -> Any:
    """The parameters with every matrix product's weight packed, one leaf after the other: routers, norms and the embedding stay as they are."""
    specs, flat = flatten(param_specs(served.cfg)), flatten(served.params)
    if any(is_qtensor(x) for x in flat.values()):
        raise ConfigError(
            f"{where}: weights are packed already, expected no --weights {format}; open the artifact that they were made from, or drop it"
        )
    chosen = [path for path in flat if re.fullmatch(SERVED, path)]
    made = {path: pack_leaf(path, flat[path], specs[path], format, served.layout) for path in chosen}
    return unflatten(flat | made)


def pack_leaf(path: str, w: jax.Array, spec: ParamSpec, format: QFormat, layout: Layout) -> Any:
    """A weight as codes and scales, placed as the layout cuts it."""
    axes = spec.own_axes if format.granularity == "tensor" else spec.axes

    def pack(w: jax.Array) -> Tree:
        return unflatten({path: quantize(w, format, axes)})

    out = shardings(jax.eval_shape(pack, w), unflatten({path: spec}), layout)
    return flatten(jax.jit(pack, out_shardings=out)(w))[path]
