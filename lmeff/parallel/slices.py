"""One slice of a model as the three passes of a pipeline: F (forward), B (gradients of its input) and W (gradients of its weights).

Automatic differentiation makes both gradients at once. Here they come apart at the seam, where every product of activations and weights passes: B adds a
zero *tap* to each product's output and differentiates by the taps, which gives the cotangent of every product without touching a weight; W then
multiplies the products' inputs with these cotangents. F, B and W have equally many products each.
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
from lmeff.models.remat import parse, wrapper
from lmeff.models.transformer import block, cast_floating, kept_sums, param_specs, sites

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
    index:   which layers of the model they are; None where all layers are alike.
    """

    blocks: Any
    ranges: Any
    present: Any
    index: Any = None


class Saved(NamedTuple):
    """What F can leave for B and W, every array [n, ...]: residuals of the layers without their weights, and inputs of the products by site."""

    residuals: list[Any]
    inputs: Arrays


class Products(NamedTuple):
    """What is known of a model's products before any of them is computed.

    outputs: shapes of their outputs by site. letters: of these outputs.
    origin:  the site under which the input of each site is saved: sites that multiply the same array save it once.
    inputs:  letters of what is saved.
    saved:   shapes of what one layer saves. sums: of what it keeps for the objective.
    pull:    structure of a layer's pull (`jax.vjp`); leaves: for each of its leaves the place among what is known anyway, or None.
    """

    outputs: dict[str, jax.ShapeDtypeStruct]
    letters: dict[str, str]
    origin: dict[str, str]
    inputs: dict[str, str]
    saved: Any = None
    sums: Any = None
    pull: Any = None
    leaves: tuple[int | None, ...] = ()

    def stored(self, leaves: list[Any]) -> list[Any]:
        """Of a pull's leaves, those that must be stored for it."""
        return [leaf for leaf, place in zip(leaves, self.leaves, strict=True) if place is None]

    @property
    def letters_by_shape(self) -> dict[tuple[int, ...], str]:
        """Letters of what a layer saves, as far as its shape tells: that of a product's input or output."""
        inputs = {self.saved.inputs[site].shape: letters for site, letters in self.inputs.items()}
        return inputs | {self.outputs[site].shape: letters for site, letters in self.letters.items()}


class Out(NamedTuple):
    """What a layer or a slice gives: its activations, and what its layers kept for the objective, [B] or [n, B] by name."""

    y_BTD: jax.Array
    sums: Arrays


def run_layer(model: SliceModel, layer: Slice, x_BTD: jax.Array, batch: Batch, product: Einsum) -> Out:
    """One layer, with every product computed by `product`; padding lets its input through and sums to nothing."""
    scope = model.make_ops(product)(layer.ranges)
    p = cast_floating(layer.blocks, model.compute_dtype)
    y_BTD = block(x_BTD, p, batch, model.cfg, scope.ops, layer.index)
    sums = kept_sums(scope.close())
    if layer.present is None:
        return Out(y_BTD, sums)
    return Out(jnp.where(layer.present, y_BTD, x_BTD), {k: jnp.where(layer.present, x, 0) for k, x in sums.items()})


def forward_slice(model: SliceModel, piece: Slice, x_BTD: jax.Array, batch: Batch) -> Out:
    """F: the slice's output."""

    def step(x: jax.Array, layer: Slice) -> tuple[jax.Array, Arrays]:
        out = run_layer(model, layer, x, batch, plain_einsum)
        return out.y_BTD, out.sums

    return Out(*jax.lax.scan(step, x_BTD, piece))


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
    found = Products(outputs, letters, origin, {first: equations[first][0] for first in origin.values()})
    return _with_pull(model, found, layer, x_BTD, batch)


def _with_pull(model: SliceModel, products: Products, layer: Slice, x_BTD: Any, batch: Any) -> Products:
    """Adds what is known of a layer's pull."""
    found: list[Products] = []

    def run(layer: Slice, x: jax.Array, batch: Batch) -> tuple[Saved, Arrays]:
        layer = _cast(model, layer)
        known = _known(layer, batch)
        out, (leaves, pull), inputs = _differentiate(model, products, layer, x, batch)
        places = (next((i for i, other in enumerate(known) if other is leaf), None) for leaf in leaves)
        found.append(products._replace(pull=pull, leaves=tuple(places)))
        return Saved(found[0].stored(leaves), inputs), out.sums

    saved, sums = jax.eval_shape(run, layer, x_BTD, batch)
    return found[0]._replace(saved=saved, sums=sums)


def split_weights(model: SliceModel, blocks: Any) -> tuple[Any, Any]:
    """(matrices, others): what W differentiates by, and what B does: norms, biases, and experts, whose products are not the seam's own."""
    specs = flatten(param_specs(model.cfg)["blocks"])
    matrices = {path for path, spec in specs.items() if spec.is_matmul and "E" not in spec.letters}
    return select(blocks, matrices), select(blocks, specs.keys() - matrices)


def _join(matrices: Any, others: Any) -> Any:
    return unflatten({**flatten(matrices), **flatten(others)})


def save_slice(
    model: SliceModel, products: Products, piece: Slice, x_BTD: jax.Array, batch: Batch
) -> tuple[Out, Saved]:
    """F that keeps what B and W need: the slice's output, and the residuals and products' inputs of every layer."""

    def step(x: jax.Array, layer: Slice) -> tuple[jax.Array, Any]:
        out, (leaves, _), inputs = _differentiate(model, products, layer, x, batch)
        return out.y_BTD, (out.sums, Saved(products.stored(leaves), inputs))

    y_BTD, (sums, saved) = jax.lax.scan(step, x_BTD, _cast(model, piece))
    return Out(y_BTD, sums), saved


def pull_slice(
    model: SliceModel, products: Products, piece: Slice, saved: Saved, batch: Batch, d_out: Out
) -> tuple[jax.Array, Any, Arrays]:
    """B: from the cotangents of the slice's output and of each layer's sums, that of its input, gradients of the other weights,
    and the cotangents of the products."""

    def step(d_y: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        own, kept = layer
        known, stored = _known(own, batch), iter(kept)
        leaves = [next(stored) if index is None else known[index] for index in products.leaves]
        d_x, d_others, d_taps = jax.tree.unflatten(products.pull, leaves)(Out(d_y, d_out.sums))
        return d_x, (d_others, d_taps)

    d_x_BTD, (d_others, d_taps) = jax.lax.scan(step, d_out.y_BTD, (_cast(model, piece), saved.residuals), reverse=True)
    return d_x_BTD, d_others, d_taps


def _differentiate(model: SliceModel, products: Products, layer: Slice, x_BTD: jax.Array, batch: Batch) -> Any:
    """(output, flattened pull, inputs of products) of a layer whose weights are cast already.

    The pull takes the output's cotangent to those of the layer's input, of its other weights, and of the taps.
    """
    matrices, others = split_weights(model, layer.blocks)

    def run(x: jax.Array, others: Any, taps: Arrays) -> tuple[Out, Arrays]:
        inputs: Arrays = {}

        def product(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
            inputs.setdefault(products.origin[site], x)
            return plain_einsum(equation, x, w) + taps[site]

        return run_layer(model, layer._replace(blocks=_join(matrices, others)), x, batch, product), inputs

    taps = {site: jnp.zeros(out.shape, out.dtype) for site, out in products.outputs.items()}
    out, pull, inputs = jax.vjp(wrapper(parse(model.remat, sites(model.cfg)))(run), x_BTD, others, taps, has_aux=True)
    return out, jax.tree.flatten(pull), inputs


def _cast(model: SliceModel, piece: Slice) -> Slice:
    return piece._replace(blocks=cast_floating(piece.blocks, model.compute_dtype))


def _known(layer: Slice, batch: Batch) -> list[Any]:
    """What a pull may hold that needs not be stored: it is there anyway when the pull is called."""
    return jax.tree.leaves((layer, batch))


def weight_gradients(
    model: SliceModel, products: Products, piece: Slice, inputs: Arrays, cotangents: Arrays, batch: Batch
) -> Any:
    """W: gradients of the matrices, [n, ...].

    The layer is traced once more with every product taking its saved input: all but the gradients of the products is then dead code.
    """
    matrices, others = split_weights(model, piece.blocks)
    shape = (*batch.tokens.shape, model.cfg.width)

    def step(_: None, layer: Any) -> tuple[None, Any]:
        own, others, inputs, cotangents = layer

        def outputs(matrices: Any) -> Arrays:
            found: Arrays = {}

            def product(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
                found[site] = plain_einsum(equation, inputs[products.origin[site]], w)
                return found[site]

            run_layer(
                model,
                own._replace(blocks=_join(matrices, others)),
                jnp.zeros(shape, model.compute_dtype),
                batch,
                product,
            )
            return found

        return None, jax.vjp(outputs, own.blocks)[1](cotangents)[0]

    return jax.lax.scan(step, None, (piece._replace(blocks=matrices), others, inputs, cotangents))[1]
