"""One slice of a model as the three passes of a pipeline: F (forward), B (gradients of its input) and W (gradients of its weights).

Automatic differentiation makes both gradients at once. Here they come apart at the seam, where every product of activations and weights passes: B adds a
zero *tap* to each product's output and differentiates by the taps, which gives the cotangent of every product without touching a weight; W then multiplies the
products' inputs with these cotangents. F, B and W have equally many products, and nothing is computed twice but what B needs of F, from the slice's input.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.batch import Batch
from lmeff.core.dims import split_einsum
from lmeff.core.ops import Einsum, MakeOps, plain_einsum
from lmeff.core.tree import flatten, select, unflatten
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import block, cast_floating, param_specs, remat_policy

Arrays = dict[str, jax.Array]


class SliceModel(NamedTuple):
    """What is static of a model whose layers are cut into slices.

    make_ops: the seam, given what multiplies activations and weights in the end.
    """

    cfg: ModelConfig
    make_ops: Callable[[Einsum], MakeOps]
    compute_dtype: Any
    output_dtype: Any
    remat: str = "none"


class Slice(NamedTuple):
    """The layers of one slice, every array [n, ...].

    ranges:  calibrated activation ranges by site.
    present: which layers are none of the padding; None where all are.
    """

    blocks: Any
    ranges: Any
    present: Any


class Saved(NamedTuple):
    """What W needs of a B, every array [n, ...]: the inputs of the products, and the cotangents of their outputs, by site."""

    inputs: Arrays
    cotangents: Arrays


class Products(NamedTuple):
    """What is known of a model's products before any of them is computed.

    outputs: shapes of their outputs by site. letters: of these outputs.
    origin:  the site under which the input of each site is saved: sites that multiply the same array save it once.
    inputs:  letters of what is saved.
    """

    outputs: dict[str, jax.ShapeDtypeStruct]
    letters: dict[str, str]
    origin: dict[str, str]
    inputs: dict[str, str]


def run_layer(model: SliceModel, layer: Slice, x_BTD: jax.Array, batch: Batch, product: Einsum) -> jax.Array:
    """One layer, with every product computed by `product`; padding lets its input through."""
    scope = model.make_ops(product)(layer.ranges)
    y_BTD = block(x_BTD, cast_floating(layer.blocks, model.compute_dtype), batch, model.cfg, scope.ops)
    return y_BTD if layer.present is None else jnp.where(layer.present, y_BTD, x_BTD)


def forward_slice(model: SliceModel, piece: Slice, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    """F: the slice's output."""

    def step(x: jax.Array, layer: Slice) -> tuple[jax.Array, None]:
        return run_layer(model, layer, x, batch, plain_einsum), None

    return jax.lax.scan(step, x_BTD, piece)[0]


def products_of(model: SliceModel, layer: Slice, x_BTD: Any, batch: Any) -> Products:
    """The products of one layer, from shapes alone."""
    inputs: list[tuple[str, Any]] = []
    origin: dict[str, str] = {}
    equations: dict[str, tuple[str, str, str]] = {}

    def run(layer: Slice, x: jax.Array, batch: Batch) -> Arrays:
        outputs: Arrays = {}

        def product(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
            first = next((other for other, same in inputs if same is x), site)
            inputs.append((first, x))
            origin[site], equations[site] = first, split_einsum(equation)
            outputs[site] = plain_einsum(equation, x, w)
            return outputs[site]

        run_layer(model, layer, x, batch, product)
        return outputs

    outputs = jax.eval_shape(run, layer, x_BTD, batch)
    letters = {site: out for site, (_, _, out) in equations.items()}
    return Products(outputs, letters, origin, {first: equations[first][0] for first in origin.values()})


def split_weights(model: SliceModel, blocks: Any) -> tuple[Any, Any]:
    """(matrices, others): what W differentiates by, and the small rest (norms, biases) that B does."""
    specs = flatten(param_specs(model.cfg)["blocks"])
    matrices = {path for path, spec in specs.items() if spec.is_matmul}
    return select(blocks, matrices), select(blocks, specs.keys() - matrices)


def _join(matrices: Any, others: Any) -> Any:
    return unflatten({**flatten(matrices), **flatten(others)})


def tapped_slice(
    model: SliceModel, products: Products, piece: Slice, x_BTD: jax.Array, batch: Batch
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, Any, Saved]]]:
    """The slice's output, and B: from the cotangent of the output, that of the input, gradients of the small weights, and what W needs."""
    matrices, others = split_weights(model, piece.blocks)
    matrices = jax.lax.stop_gradient(matrices)

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, Arrays]:
        own, others, taps = layer
        kept: Arrays = {}

        def product(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
            kept.setdefault(products.origin[site], x)
            return plain_einsum(equation, x, w) + taps[site]

        own = own._replace(blocks=_join(own.blocks, others))
        return run_layer(model, own, x, batch, product), kept

    def run(x: jax.Array, others: Any, taps: Arrays) -> tuple[jax.Array, Arrays]:
        return jax.lax.scan(remat_policy(model.remat)(step), x, (piece._replace(blocks=matrices), others, taps))

    count = jax.tree.leaves(others)[0].shape[0]
    taps = {site: jnp.zeros((count, *out.shape), out.dtype) for site, out in products.outputs.items()}
    y_BTD, pull, kept = jax.vjp(run, x_BTD, others, taps, has_aux=True)

    def backward(d_y_BTD: jax.Array) -> tuple[jax.Array, Any, Saved]:
        d_x_BTD, d_others, d_taps = pull(d_y_BTD)
        return d_x_BTD, d_others, Saved(jax.lax.stop_gradient(kept), d_taps)

    return y_BTD, backward


def weight_gradients(model: SliceModel, products: Products, piece: Slice, saved: Saved, batch: Batch) -> Any:
    """W: gradients of the matrices, [n, ...].

    The layer is traced once more with every product taking its saved input: all but the gradients of the products is then dead code.
    """
    matrices, others = split_weights(model, piece.blocks)
    shape = (*batch.tokens.shape, model.cfg.width)

    def step(_: None, layer: Any) -> tuple[None, Any]:
        own, others, saved = layer

        def outputs(matrices: Any) -> Arrays:
            found: Arrays = {}

            def product(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
                found[site] = plain_einsum(equation, saved.inputs[products.origin[site]], w)
                return found[site]

            run_layer(
                model,
                own._replace(blocks=_join(matrices, others)),
                jnp.zeros(shape, model.compute_dtype),
                batch,
                product,
            )
            return found

        return None, jax.vjp(outputs, own.blocks)[1](saved.cotangents)[0]

    return jax.lax.scan(step, None, (piece._replace(blocks=matrices), others, saved))[1]
