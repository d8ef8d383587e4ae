"""How a layer of experts and the devices that hold them talk: the layer is code for one device's shards, and says only what is to be exchanged."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lmeff.core.batch import Batch


class Exchange(NamedTuple):
    """What a layer of experts, run on one device's shards, asks of the other devices. Everything is the identity where one holds all experts.

    first:     index of the first expert held here.
    parts:     over how many devices a row's tokens are cut.
    collect:   `[N, ...] -> [N of all, ...]`: the rows of all devices that hold other experts.
    give_back: its transpose: rows summed over those devices, each getting its own.
    send:      `[E, N, ...] -> [E here, N of all, ...]`: to every expert the rows that all devices have for it.
    fetch:     the inverse of `send`.
    row_sum:   the sum over the devices that share a row's tokens.
    row:       `[B, T, ...] -> [B, S, ...]`: the tokens of all of them, one device after the other, which need not be the order of time.
    own:       its inverse: this device's part.
    """

    first: Any
    parts: int
    collect: Callable[[jax.Array], jax.Array]
    give_back: Callable[[jax.Array], jax.Array]
    send: Callable[[jax.Array], jax.Array]
    fetch: Callable[[jax.Array], jax.Array]
    row_sum: Callable[[jax.Array], jax.Array]
    row: Callable[[jax.Array], jax.Array]
    own: Callable[[jax.Array], jax.Array]


def _same(x: jax.Array) -> jax.Array:
    return x


ALONE = Exchange(0, 1, *(_same,) * 7)


class ExpertLayer(NamedTuple):
    """A layer whose tokens go to experts, as code for one device's shards.

    run:    `(x_BTD, batch, weights, products, exchange, reveal) -> Routed`.
    enters: the sites that the layer's own input enters.
    inner:  the site that the experts' hidden state enters.
    sums:   the names of what it sums over each row.
    """

    run: Callable[..., "Routed"]
    enters: tuple[str, ...]
    inner: str
    sums: tuple[str, ...]


class Routed(NamedTuple):
    """What a layer of experts gives.

    y:      [B, T, D].
    sums:   `{name: [B]}`, sums over each row for the objective.
    hidden: [B, T, k, F], the hidden state of each of a token's experts (zeros where a token was dropped); None unless asked to reveal it.
    """

    y_BTD: jax.Array
    sums_B: dict[str, jax.Array]
    hidden_BTKF: jax.Array | None


Spread = Callable[..., Routed]
"""`spread(layer, local, x_BTD, batch, weights, ranges, reveal)` runs `local(x_BTD, batch, weights, ranges, exchange)` on each device's shards."""


def on_one_device(
    layer: ExpertLayer,
    local: Callable[..., Routed],
    x_BTD: jax.Array,
    batch: Batch,
    weights: Any,
    ranges: Mapping[str, jax.Array],
    reveal: bool,
) -> Routed:
    """Where there is nothing to exchange."""
    return local(x_BTD, batch, weights, ranges, ALONE)
