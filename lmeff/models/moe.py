"""Mixture of experts: a router in float32 sends each token to its `top_k` experts (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).

The layer is code for one device's shards (`core/exchange.py`): what is local is here, what crosses devices in `parallel/experts.py`. Two forms. Without
a capacity rows are sorted by expert and multiplied group by group (MegaBlocks: Gale et al. 2022, https://arxiv.org/abs/2211.15841). With one, every expert
has room for equally many tokens of a row, and the buffers have a fixed shape.

All sums for the objective are sums over rows of statistics of one row: the balance loss is a product of two means, which would not add up over microbatches or
devices if the means were over whatever rows lie together there.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmeff.core.batch import Batch
from lmeff.core.exchange import Exchange, ExpertLayer, Routed
from lmeff.core.grouped import Rows, alike, block_size, padded_rows
from lmeff.core.ops import Ops, Products
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree
from lmeff.models.config import ModelConfig, MoE
from lmeff.models.mlp import GATE, mlp_layer, mlp_sites, mlp_specs, residual_scale, spec_of

LETTERS = {"router": "DE", "up": "EDF", "gate": "EDF", "down": "EFD"}  # of one layer's weights
NOWHERE = -1  # the expert of padding


def moe_specs(cfg: ModelConfig, moe: MoE) -> dict[str, ParamSpec | dict[str, ParamSpec]]:
    """The parameters: the shared experts are one ffn as wide as all of them."""
    specs: dict[str, ParamSpec | dict[str, ParamSpec]] = {
        "router": spec_of(cfg, "LDE", "D"),
        "up": spec_of(cfg, "LEDF", "D"),
        "down": spec_of(cfg, "LEFD", "F", scale=residual_scale(cfg)),
    }
    if cfg.gated:
        specs["gate"] = spec_of(cfg, "LEDF", "D")
    if moe.shared:
        specs["shared"] = mlp_specs(cfg, ffn=moe.shared * cfg.ffn)
    return specs


def moe_sites(cfg: ModelConfig, moe: MoE) -> list[str]:
    """The products that may be quantized: all but the router's, which decides where tokens go."""
    return mlp_sites(cfg, "moe") + (mlp_sites(cfg, "shared") if moe.shared else [])


def moe_layer(x_BTD: jax.Array, p: Tree, batch: Batch, cfg: ModelConfig, moe: MoE, ops: Ops) -> jax.Array:
    """What the experts of each token make of it, and the shared ones. Keeps "moe.balance", "moe.router_z" and "moe.dropped" for the objective."""
    *enters, inner = mlp_sites(cfg, "moe")
    sums = ("balance", "router_z") if moe.capacity is None else ("balance", "router_z", "dropped")
    layer = ExpertLayer(functools.partial(_run, cfg, moe), tuple(enters), inner, sums)
    made = ops.experts(layer, x_BTD, batch, {name: p[name] for name in LETTERS if name in p})
    for name, sums_B in made.sums_B.items():
        ops.keep(f"moe.{name}", sums_B)
    return made.y_BTD + mlp_layer(x_BTD, p["shared"], cfg, ops, site="shared") if moe.shared else made.y_BTD


def auxiliary(sums: dict[str, jax.Array], cfg: ModelConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The part of the objective that is the routers', and its metrics, from what the layers kept; both weighted sums over tokens.

    Metrics, means over layers: "balance", 1 where tokens are spread evenly, "router_z", and with a capacity "dropped", the part of the choices that was.
    """
    assert cfg.moe is not None
    totals = {name.removeprefix("moe."): x_LB.sum() for name, x_LB in sums.items()}
    loss = cfg.moe.balance * totals["balance"] + cfg.moe.router_z * totals["router_z"]
    return loss, {name: total / cfg.layers for name, total in totals.items()}


class Work(NamedTuple):
    """What one device's code of the layer has at hand besides its tokens."""

    cfg: ModelConfig
    moe: MoE
    batch: Batch
    p: Tree
    products: Products
    exchange: Exchange
    reveal: bool


def _run(
    cfg: ModelConfig,
    moe: MoE,
    x_BTD: jax.Array,
    batch: Batch,
    p: Tree,
    products: Products,
    exchange: Exchange,
    reveal: bool,
) -> Routed:
    """One device's tokens: routed, through the experts wherever they are, and back."""
    work = Work(cfg, moe, batch, p, products, exchange, reveal)
    choice, sums_B = _route(work, x_BTD)
    # From here on every device along tensor has its own part of the sums over F: what they say of `x` is added up once, at its entry.
    own_BTD, _ = alike(x_BTD, jax.tree.leaves(p["up"])[0])
    made = (_dropless if moe.capacity is None else _with_capacity)(work, own_BTD, choice)
    return made._replace(sums_B={**sums_B, **made.sums_B})


class Choice(NamedTuple):
    """Where each token goes: experts (NOWHERE for padding), the weights of what they make of it, and how much the row's loss weighs, a token."""

    experts_BTK: jax.Array
    gates_BTK: jax.Array
    weight_B: jax.Array


def _route(work: Work, x_BTD: jax.Array) -> tuple[Choice, dict[str, jax.Array]]:
    """The choice of each token, and the sums over each row that the objective needs; of equally liked experts the first.

    A row's mean over its real tokens counts as often as its targets: divided by the batch's targets, that gives the mean over rows by their targets.
    """
    moe, batch, exchange = work.moe, work.batch, work.exchange
    real_BT1 = (batch.segments > 0)[..., None]
    scores_BTE = work.products.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), work.p["router"], site="moe.router")
    likes_BTE = jax.nn.softmax(scores_BTE)
    gates_BTK, experts_BTK = jax.lax.top_k(likes_BTE, moe.top_k)
    if moe.normalize:
        gates_BTK = gates_BTK / gates_BTK.sum(-1, keepdims=True)
    experts_BTK = jnp.where(real_BT1, experts_BTK, NOWHERE)
    tokens_B = jnp.maximum(exchange.row_sum(real_BT1.sum((1, 2))), 1).astype(jnp.float32)
    weight_B = exchange.row_sum(batch.weights.sum(1)) / tokens_B
    counts_BE = exchange.row_sum(_one_hot(experts_BTK, moe.experts).sum((1, 2))).astype(jnp.float32)
    share_BE = counts_BE * (moe.experts / moe.top_k) / tokens_B[:, None]
    # The mean of `likes` enters linearly, so that each device adds its own tokens' part.
    balance_B = jnp.einsum("BTE,BE->B", jnp.where(real_BT1, likes_BTE, 0), share_BE) * weight_B
    z_BT = jnp.square(jax.nn.logsumexp(scores_BTE, axis=-1))
    router_z_B = jnp.where(real_BT1[..., 0], z_BT, 0).sum(1) * weight_B
    sums_B = {"balance": exchange.row_sum(balance_B), "router_z": exchange.row_sum(router_z_B)}
    return Choice(experts_BTK, jnp.where(real_BT1, gates_BTK, 0), weight_B), sums_B


def _one_hot(experts: jax.Array, count: int) -> jax.Array:
    return (experts[..., None] == jnp.arange(count)).astype(jnp.int32)


@jax.custom_vjp
def take_rows(x: jax.Array, index_M: jax.Array, back_NK: jax.Array) -> jax.Array:
    """Rows of `x` by index, zeros where it is out of range. `back` says where each row of `x` went, at most K times: the gradient is then a `take` too
    and not a sum of scattered rows, whose order would be the machine's."""
    return jnp.take(x, index_M, axis=0, mode="fill", fill_value=0)


def _take_back(back_NK: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    found = jnp.take(g, back_NK, axis=0, mode="fill", fill_value=0)
    return found.astype(jnp.float32).sum(1).astype(g.dtype), None, None


take_rows.defvjp(lambda x, index, back: (take_rows(x, index, back), back), _take_back)


class Slots(NamedTuple):
    """A one-to-one map of choices (token n, k) to rows of buffers; an index out of range leads nowhere.

    slot_A:   the row of each choice, A = N x K.
    choice_M: the choice in each row.
    """

    slot_A: jax.Array
    choice_M: jax.Array

    @classmethod
    def of(cls, slot_A: jax.Array, rows: int) -> "Slots":
        """From the row of each choice, `rows` for none."""
        numbers = jnp.arange(slot_A.size, dtype=jnp.int32)
        nobody = jnp.where(False, slot_A[0], slot_A.size).astype(jnp.int32)
        return cls(slot_A, jnp.full((rows,), nobody).at[slot_A].set(numbers, mode="drop"))

    def fill(self, x_ND: jax.Array) -> jax.Array:
        """Each token in the rows of its choices, [M, D]."""
        copies = self.slot_A.size // x_ND.shape[0]
        return take_rows(x_ND, self.choice_M // copies, self.slot_A.reshape(-1, copies))

    def empty(self, rows_MD: jax.Array, copies: int) -> jax.Array:
        """The row of each choice, [N, K, D]."""
        found = take_rows(rows_MD, self.slot_A, self.choice_M[:, None])
        return found.reshape(-1, copies, rows_MD.shape[-1])


def _mix(made_NKD: jax.Array, gates_NK: jax.Array) -> jax.Array:
    """The weighted sum of what a token's experts made."""
    return jnp.einsum("NKD,NK->ND", made_NKD.astype(jnp.float32), gates_NK).astype(made_NKD.dtype)


def _dropless(work: Work, x_BTD: jax.Array, choice: Choice) -> Routed:
    """Every device takes the tokens of all that share its experts, computes those that chose an expert of its own, and gives back sums."""
    p, products, exchange, copies = work.p, work.products, work.exchange, work.moe.top_k
    x_ND = exchange.collect(x_BTD.reshape(-1, x_BTD.shape[-1]))
    experts_NK, gates_NK = (exchange.collect(a.reshape(-1, copies)) for a in (choice.experts_BTK, choice.gates_BTK))
    slots, groups = _sorted(experts_NK - exchange.first, p["up"].shape[0])
    into = functools.partial(products.grouped, "ND,EDF->NF", slots.fill(x_ND), rows=groups)
    h_MF = _hidden(work, into)
    made_MD = products.grouped("NF,EFD->ND", h_MF, p["down"], groups, site="moe.down")
    y_ND = exchange.give_back(_mix(slots.empty(made_MD, copies), gates_NK))
    hidden = exchange.give_back(slots.empty(h_MF, copies)) if work.reveal else None
    return _by_token(x_BTD, y_ND, {}, hidden)


def _sorted(experts_NK: jax.Array, held: int) -> tuple[Slots, Rows]:
    """Choices of experts 0 to `held` - 1 sorted by expert, in order of tokens; others lead nowhere.

    The buffer has room for the worst case, in which every token's choices are as many of these experts as can be: nothing is ever dropped.
    """
    tokens, copies = experts_NK.shape
    most = tokens * min(copies, held)
    block = block_size(most, held)
    room = padded_rows(most, held, block)
    expert_A = experts_NK.ravel()
    expert_A = jnp.where((expert_A >= 0) & (expert_A < held), expert_A, held)
    order_A = jnp.argsort(expert_A, stable=True)
    counts_E = _one_hot(expert_A, held).sum(0)
    sizes_E = -(-counts_E // block) * block
    ahead_E = jnp.cumsum(sizes_E) - sizes_E - (jnp.cumsum(counts_E) - counts_E)  # the gaps before a group
    sorted_A = expert_A[order_A]
    places_A = jnp.arange(sorted_A.size) + ahead_E[jnp.minimum(sorted_A, held - 1)]
    places_A = jnp.where(sorted_A < held, places_A, room).astype(jnp.int32)
    slot_A = jnp.zeros_like(places_A).at[order_A].set(places_A, unique_indices=True)
    return Slots.of(slot_A, room), Rows(sizes_E, block)


def _with_capacity(work: Work, x_BTD: jax.Array, choice: Choice) -> Routed:
    """Every device fills a buffer of the same shape for each expert and sends it where that expert is."""
    moe, products, exchange = work.moe, work.products, work.exchange
    rows, length, width = x_BTD.shape
    capacity = row_capacity(moe, length * exchange.parts)
    experts_BTK = choice.experts_BTK
    chosen_BTK = experts_BTK != NOWHERE
    taken_BTK = chosen_BTK & (_time_ranks(experts_BTK, work) < capacity)
    room = min(capacity, length)  # of a row, on this device
    first_BTK = (experts_BTK * rows + jnp.arange(rows)[:, None, None]) * room
    slot_BTK = jnp.where(taken_BTK, first_BTK + _ranks(experts_BTK, moe.experts), moe.experts * rows * room)
    slots = Slots.of(slot_BTK.ravel(), moe.experts * rows * room)
    dropped_B = (chosen_BTK & ~taken_BTK).sum((1, 2)) * (choice.weight_B / moe.top_k)

    def by_expert(x_MD: jax.Array) -> jax.Array:
        return exchange.send(x_MD.reshape(moe.experts, rows * room, -1))

    def by_row(x_END: jax.Array) -> jax.Array:
        return slots.empty(exchange.fetch(x_END).reshape(-1, x_END.shape[-1]), moe.top_k)

    into = functools.partial(products.einsum, "END,EDF->ENF", by_expert(slots.fill(x_BTD.reshape(-1, width))))
    h_ENF = _hidden(work, into)
    made_NKD = by_row(products.einsum("ENF,EFD->END", h_ENF, work.p["down"], site="moe.down"))
    y_ND = _mix(made_NKD, choice.gates_BTK.reshape(-1, moe.top_k))
    return _by_token(x_BTD, y_ND, {"dropped": exchange.row_sum(dropped_B)}, by_row(h_ENF) if work.reveal else None)


def _ranks(experts_BTK: jax.Array, count: int) -> jax.Array:
    """How many of the row's tokens before it chose the same expert."""
    chosen_BTKE = _one_hot(experts_BTK, count)
    chosen_BTE = chosen_BTKE.sum(2)
    before_BTE = jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE
    return (before_BTE[:, :, None] * chosen_BTKE).sum(-1)


def _time_ranks(experts_BTK: jax.Array, work: Work) -> jax.Array:
    """The same in the whole row, in order of time however its tokens lie on the devices: documents and positions say it."""
    batch, exchange, count = work.batch, work.exchange, work.moe.experts
    if exchange.parts == 1:
        return _ranks(experts_BTK, count)
    segments_BS, positions_BS, experts_BSK = (exchange.row(x) for x in (batch.segments, batch.positions, experts_BTK))
    order_BS = jnp.lexsort((positions_BS, segments_BS), axis=1)
    ranks_BSK = _ranks(jnp.take_along_axis(experts_BSK, order_BS[..., None], axis=1), count)
    back_BS = jnp.argsort(order_BS, axis=1)
    return exchange.own(jnp.take_along_axis(ranks_BSK, back_BS[..., None], axis=1))


def row_capacity(moe: MoE, length: int) -> int:
    """How many of a row's tokens an expert takes."""
    assert moe.capacity is not None
    return min(length, math.ceil(moe.capacity * length * moe.top_k / moe.experts))


def _hidden(work: Work, into: functools.partial[jax.Array]) -> jax.Array:
    """The hidden state of the experts, from the product of their inputs with a weight."""
    activate = GATE[work.cfg.activation]
    h = into(w=work.p["up"], site="moe.up")
    h = activate(into(w=work.p["gate"], site="moe.gate")) * h if work.cfg.gated else activate(h)
    return checkpoint_name(h, "mlp_hidden")


def _by_token(x_BTD: jax.Array, y_ND: jax.Array, sums_B: dict[str, jax.Array], hidden_NKF: jax.Array | None) -> Routed:
    """By row and time again."""
    hidden = None if hidden_NKF is None else hidden_NKF.reshape(*x_BTD.shape[:2], *hidden_NKF.shape[1:])
    return Routed(y_ND.reshape(x_BTD.shape), sums_B, hidden)
