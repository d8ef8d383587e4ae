"""The seam: everything the model may do to tensors that numerics, sharding or a measurement could want to change.

The model calls `ops.einsum`, `ops.experts`, `ops.attend`, `ops.cached`, `ops.place`, `ops.embed`, `ops.tap` and `ops.keep`, and nothing else knows about
activation quantization, packed weights, meshes or recording. `forward` receives a `MakeOps`, opens it once per traced scope (once for
the scanned block), and returns what it recorded as an output of the scan: no global lists, so no leaked tracers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmeff.core.batch import Batch
from lmeff.core.dims import contracted, split_einsum
from lmeff.core.exchange import Exchange, ExpertLayer, Routed, Spread, on_one_device
from lmeff.core.grouped import Rows, alike, grouped_product
from lmeff.core.numerics import (
    QFormat,
    QTensor,
    codes_of,
    dequantize,
    expand,
    fake_quantize,
    fake_quantize_min_max,
    is_qtensor,
    quantize,
    scale_from_range,
)
from lmeff.core.packed import are_integers, packed_einsum

Records = dict[str, jax.Array]
Ranges = Mapping[str, jax.Array]


class Einsum(Protocol):
    """`einsum(equation, x, w, site=...)`: the model's only product of activations and weights."""

    def __call__(self, equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array: ...


class Grouped(Protocol):
    """`grouped(equation, x, w, rows, site=...)`: rows sorted by group times the matrix of their group, `"ND,EDF->NF"`."""

    def __call__(self, equation: str, x: jax.Array, w: Any, rows: Rows, *, site: str) -> jax.Array: ...


Packed = Callable[[str, Any, QTensor], jax.Array | None]
"""`(equation, x, w)`: the product of an array, or of its codes, with a packed weight; None where the plain form is to compute it."""


def unpacked(equation: str, x: Any, w: QTensor) -> jax.Array | None:
    """Leaves every product to the plain form."""
    return None


class Products(NamedTuple):
    """The products of code that runs on one device's shards."""

    einsum: Einsum
    grouped: Grouped


class Experts(Protocol):
    """`experts(layer, x_BTD, batch, weights)` runs an `ExpertLayer` where the experts are."""

    def __call__(
        self, layer: ExpertLayer, x_BTD: jax.Array, batch: Batch, weights: Any, *, reveal: bool = False
    ) -> Routed: ...


class Ops(NamedTuple):
    """One open scope of the seam.

    einsum: activations times a weight (an array or a `QTensor`), at a named site.
    experts: a layer of experts, on whatever devices hold them.
    attend: attention over local or sharded heads, `(q_BTHC, k_BSKC, v_BSKC, segments_BT) -> o_BTHC`.
    place:  fixes the sharding of an activation by its letters; the identity on one device.
    embed:  rows of a table "VD" (an array or a `QTensor`) by token id.
    tap:    offers a named intermediate (residual stream, importance inputs) to whoever records.
    keep:   leaves a named sum with the layer's outputs, for the objective to add to its loss.
    cached: attention to a cache, which new keys and values are written to, `lmeff.models.cached.cached_attention`; None where no cache is to be had.
    """

    einsum: Einsum
    experts: Experts
    attend: Callable[..., jax.Array]
    place: Callable[[jax.Array, str], jax.Array]
    embed: Callable[[Any, jax.Array], jax.Array]
    tap: Callable[[str, jax.Array], None]
    keep: Callable[[str, jax.Array], None]
    cached: Callable[..., Any] | None = None


KEPT = "kept/"  # what marks the records that were kept for the objective


class Scope(NamedTuple):
    """An open `Ops` and the function that closes it and gives what was recorded, `{site: array}`."""

    ops: Ops
    close: Callable[[], Records]


MakeOps = Callable[[Ranges], Scope]
"""Opens a scope, given the calibrated ranges `{site: [2]}` (low, high) of this layer; `{}` where none are needed."""


@dataclass(frozen=True)
class Numerics:
    """Static activation formats, `{site: format}` as sorted pairs so that it hashes. Sites left out stay in floating point."""

    activations: tuple[tuple[str, QFormat], ...] = ()

    def at(self, site: str) -> QFormat | None:
        """The format of the activations that enter `site`."""
        return dict(self.activations).get(site)

    @property
    def static_sites(self) -> tuple[str, ...]:
        """The sites whose scale is calibrated and not found per token."""
        return tuple(site for site, format in self.activations if format.granularity == "tensor")


FLOATING = Numerics()  # no activation is quantized


def _activation_scale(x: jax.Array, format: QFormat, range_2: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero of a calibrated range, in the keepdims shape of `x` reduced over everything."""
    scale, zero = scale_from_range(range_2[0], range_2[1], format)
    ones = (1,) * x.ndim
    return scale.reshape(ones), None if zero is None else zero.reshape(ones)


def _range_of(ranges: Ranges, site: str) -> jax.Array:
    assert site in ranges, f"site '{site}' is calibrated, but no range was given: {sorted(ranges)}"
    return ranges[site]


def fake_activation(x: jax.Array, axes: tuple[int, ...], format: QFormat, ranges: Ranges, site: str) -> jax.Array:
    """An activation on its grid, with straight-through gradients. `axes` are the contracted dims."""
    if format.granularity != "tensor":
        return fake_quantize_min_max(x, format, axes)
    scale, zero = _activation_scale(x, format, _range_of(ranges, site))
    return fake_quantize(x, scale, zero, format, tuple(range(-x.ndim, 0)))


def encode_activation(x: jax.Array, axes: tuple[int, ...], format: QFormat, ranges: Ranges, site: str) -> QTensor:
    """The same activation as codes."""
    if format.granularity != "tensor":
        return quantize(x, format, axes)
    scale, zero = _activation_scale(x, format, _range_of(ranges, site))
    return quantize(x, format, tuple(range(-x.ndim, 0)), scale=scale, zero=zero)


def plain_einsum(equation: str, x: jax.Array, w: jax.Array, *, site: str = "") -> jax.Array:
    """A floating-point einsum with float32 accumulation, in the dtype of `x`; reverse mode only.

    `jax.checkpoint` knows it as "product" and by its site.
    """
    x, w = alike(x, w)  # in shards a gradient may vary over axes that only the other operand varies over
    out = checkpoint_name(_product(equation, x, w.astype(x.dtype)), "product")
    return checkpoint_name(out, site) if site else out


def _multiply(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    out = jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def _product_gradients(equation: str, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both gradients as einsums in their own letters.

    Automatic differentiation gives the weight's transposed, which XLA's CPU backend mends by transposing the activations: 1.3x the time of an ffn.
    """
    x, w = saved
    left, right, out = split_einsum(equation)
    return _multiply(f"{out},{right}->{left}", g, w), _multiply(f"{left},{out}->{right}", x, g)


# The rule calls the bare product: a remat policy that keeps products does not see into one with a rule of its own.
_product = jax.custom_vjp(_multiply, nondiff_argnums=(0,))
_product.defvjp(lambda equation, x, w: (_multiply(equation, x, w), (x, w)), _product_gradients)


def contracted_axes(equation: str) -> tuple[int, ...]:
    """The contracted dims of the left operand, as negative axes."""
    left, _, _ = split_einsum(equation)
    return tuple(left.index(letter) - len(left) for letter in contracted(equation))


def make_einsum(
    numerics: Numerics, ranges: Ranges, product: Einsum = plain_einsum, packed: Packed = unpacked
) -> Einsum:
    """Floating, fake-quantized, weight-only or integer, decided by the site's format and the type of the weight.

    Where either operand is fp8 the product is floating: the same numbers on their grids, in the dtype of `x`.

    product: what multiplies floating operands in the end.
    packed:  what multiplies with packed weights where it is better than the plain form: weights turned into numbers, or integer products.
    """

    def einsum(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
        format = numerics.at(site)
        axes = contracted_axes(equation)
        if format is not None and is_qtensor(w) and are_integers(format, w.format):
            x_codes = encode_activation(x, axes, format, ranges, site)
            made = packed(equation, x_codes, w)
            return (packed_einsum(equation, x_codes, w) if made is None else made).astype(x.dtype)
        if format is not None:
            x = fake_activation(x, axes, format, ranges, site)
        made = packed(equation, x, w) if is_qtensor(w) else None
        if made is not None:
            return made.astype(x.dtype)
        return product(equation, x, dequantize(w) if is_qtensor(w) else w, site=site)

    return einsum


def make_grouped(numerics: Numerics, ranges: Ranges) -> Grouped:
    """As `make_einsum`; packed weights are turned back into numbers."""

    def grouped(equation: str, x: jax.Array, w: Any, rows: Rows, *, site: str) -> jax.Array:
        format = numerics.at(site)
        if format is not None:
            x = fake_activation(x, contracted_axes(equation), format, ranges, site)
        w = dequantize(w) if is_qtensor(w) else w
        return checkpoint_name(grouped_product(equation, x, w, rows), "product")

    return grouped


def make_experts(numerics: Numerics, ranges: Ranges, spread: Spread) -> Experts:
    """Layers of experts whose products have these numerics."""

    def experts(layer: ExpertLayer, x_BTD: jax.Array, batch: Batch, weights: Any, *, reveal: bool = False) -> Routed:
        def local(x_BTD: jax.Array, batch: Batch, weights: Any, ranges: Ranges, exchange: Exchange) -> Routed:
            products = Products(make_einsum(numerics, ranges), make_grouped(numerics, ranges))
            return layer.run(x_BTD, batch, weights, products, exchange, reveal)

        own = {site: ranges[site] for site in (*layer.enters, layer.inner) if site in ranges}
        return spread(layer, local, x_BTD, batch, weights, own, reveal)

    return experts


def lookup(table: Any, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding table; of a packed one, only the rows read are turned back into numbers."""
    if not is_qtensor(table):
        return table[tokens]
    scale = expand(table.scale, table.format, table.axes, table.shape)
    scale = jnp.broadcast_to(scale, (table.shape[0], scale.shape[1]))[tokens]
    steps = codes_of(table, table.q[tokens]).astype(jnp.float32)
    if table.zero is not None:
        zero = expand(table.zero, table.format, table.axes, table.shape)
        steps = steps - jnp.broadcast_to(zero, (table.shape[0], zero.shape[1]))[tokens].astype(jnp.float32)
    return (steps * scale).astype(table.dtype)


def make_ops(
    numerics: Numerics = FLOATING,
    *,
    attend: Callable[..., jax.Array],
    place: Callable[[jax.Array, str], jax.Array] = lambda x, letters: x,
    embed: Callable[[Any, jax.Array], jax.Array] = lookup,
    spread: Spread = on_one_device,
    product: Einsum = plain_einsum,
    packed: Packed = unpacked,
    cached: Callable[..., Any] | None = None,
) -> MakeOps:
    """The plain seam: computes, and records only what the model keeps for the objective."""

    def open_scope(ranges: Ranges) -> Scope:
        kept: Records = {}

        def keep(name: str, x: jax.Array) -> None:
            kept[KEPT + name] = x

        einsum, experts = make_einsum(numerics, ranges, product, packed), make_experts(numerics, ranges, spread)
        ops = Ops(einsum, experts, attend, place, embed, lambda name, x: None, keep, cached)
        return Scope(ops, lambda: kept)

    return open_scope


def recording(make: MakeOps, measure: Callable[[str, jax.Array], jax.Array | None]) -> MakeOps:
    """A seam that also records `measure(name, x)` of each einsum's input (by site) and of each tap; None records nothing.

    The record is opened and closed within one trace and leaves it as a value, stacked over layers by the scan.
    """

    def open_scope(ranges: Ranges) -> Scope:
        inner = make(ranges)
        records: Records = {}

        def record(name: str, x: jax.Array) -> None:
            value = measure(name, x)
            if value is not None:
                records[name] = value

        def einsum(equation: str, x: jax.Array, w: Any, *, site: str) -> jax.Array:
            record(site, x)
            return inner.ops.einsum(equation, x, w, site=site)

        def experts(layer: ExpertLayer, x_BTD: jax.Array, batch: Batch, weights: Any, *, reveal: bool = True) -> Routed:
            """Records by token: what is inside shards cannot leave them, and nobody else knows where the rows of experts came from."""
            made = inner.ops.experts(layer, x_BTD, batch, weights, reveal=True)
            for site in layer.enters:
                record(site, x_BTD)
            if made.hidden_BTKF is not None:
                record(layer.inner, made.hidden_BTKF)
            return made

        ops = inner.ops._replace(einsum=einsum, experts=experts, tap=record)
        return Scope(ops, lambda: {**inner.close(), **records})

    return open_scope
