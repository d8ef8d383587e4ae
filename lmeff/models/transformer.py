"""The model: a decoder-only transformer as pure functions over a spec tree.

`param_specs(cfg)` is the schema; `forward` is the one function that trains and serves. Layers are stacked on a leading "L" and scanned.
The scanned block opens with `view(params, state)`: the weights as the compression wants them seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.numerics import is_qtensor
from lmeff.core.ops import KEPT, MakeOps, Ops, Ranges, Records
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree
from lmeff.models.cache import Cache
from lmeff.models.config import ModelConfig
from lmeff.models.layers import through_cache
from lmeff.models.legal import check_context
from lmeff.models.mlp import mlp_layer, mlp_sites, mlp_specs, residual_scale, spec_of
from lmeff.models.moe import moe_layer, moe_sites, moe_specs
from lmeff.models.remat import parse, wrapper
from lmeff.models.rope import rope

View = Callable[[Any, Any], Any]


class Output(NamedTuple):
    """What `forward` gives to an objective.

    hidden:  [B, T, D], after the last norm.
    head:    the head's weight as seen ("DV", or the tied table "VD"), not yet multiplied: the loss does that in chunks.
    ranges:  calibrated activation ranges of the head's site, if any.
    records: what the seam recorded; entries under "blocks/" are stacked over layers.
    sums:    what the layers kept for the objective, [L, B]: sums over each row.
    cache:   with the new tokens in it, if there was one.
    """

    hidden_BTD: jax.Array
    head: Any
    ranges: Ranges
    records: Records
    sums: Records = {}  # noqa: RUF012 -- never written to
    cache: Cache | None = None


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The schema of the parameters: the same tree for every mesh, precision and compression."""
    before, after = cfg.norm_at != "post", cfg.norm_at != "pre"
    tree: dict[str, Any] = {
        "embed": {"table": spec_of(cfg, "VD", "D")},
        "blocks": {
            **({"attn_norm": _norm(cfg, "LD")} if before else {}),
            "attn": _attention_specs(cfg),
            **({"attn_post_norm": _norm(cfg, "LD")} if after else {}),
            **({"mlp_norm": _norm(cfg, "LD")} if before else {}),
            **({"mlp": mlp_specs(cfg)} if cfg.moe is None else {"moe": moe_specs(cfg, cfg.moe)}),
            **({"mlp_post_norm": _norm(cfg, "LD")} if after else {}),
        },
        "final_norm": _norm(cfg, "D"),
    }
    if cfg.positions == "learned":
        tree["embed"]["positions"] = spec_of(cfg, "PD")
    if not cfg.tied:
        tree["head"] = {"w": spec_of(cfg, "DV", "D")}
    return tree


def _norm(cfg: ModelConfig, letters: str) -> dict[str, ParamSpec]:
    specs = {"scale": _scale(cfg, letters)}
    if cfg.norm == "layer":
        specs["bias"] = spec_of(cfg, letters, init="zeros")
    return specs


def _scale(cfg: ModelConfig, letters: str) -> ParamSpec:
    return spec_of(cfg, letters, init="zeros" if cfg.norm_plus_one else "ones")


def _attention_specs(cfg: ModelConfig) -> dict[str, Any]:
    specs: dict[str, Any] = {
        "wq": spec_of(cfg, "LDHC", "D"),
        "wk": spec_of(cfg, "LDKC", "D"),
        "wv": spec_of(cfg, "LDKC", "D"),
        "wo": spec_of(cfg, "LHCD", "HC", scale=residual_scale(cfg)),
    }
    specs |= {f"{name}_bias": spec_of(cfg, _BIASES[name], init="zeros") for name in BIASED[cfg.bias]}
    if cfg.qk_norm is not None:
        specs |= {name: _scale(cfg, letters) for name, letters in _QK_NORMS[cfg.qk_norm].items()}
    return specs


BIASED = {"none": "", "qkv": "qkv", "attention": "qkvo", "all": "qkvo"}  # of attention's products
_BIASES = {"q": "LHC", "k": "LKC", "v": "LKC", "o": "LD"}
_QK_NORMS = {"head": {"q_norm": "LC", "k_norm": "LC"}, "width": {"q_norm": "LHC", "k_norm": "LKC"}}


def normalize(x_BTD: jax.Array, p: Tree, cfg: ModelConfig) -> jax.Array:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last dim, in float32."""
    x = x_BTD.astype(jnp.float32)
    if cfg.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps) * _weight(p["scale"], cfg)
    if cfg.norm == "layer":
        x = x + p["bias"].astype(jnp.float32)
    return x.astype(x_BTD.dtype)


def _weight(scale: jax.Array, cfg: ModelConfig) -> jax.Array:
    """What an RMSNorm multiplies by, in float32: where a rounded weight is kept as its difference to 1, its sum with 1 is not rounded."""
    wide = scale.astype(jnp.float32)
    return 1 + wide if cfg.norm_plus_one else wide


def _qk_norm(x_BTHC: jax.Array, scale: jax.Array, cfg: ModelConfig) -> jax.Array:
    """RMSNorm of queries or keys, by head (scale "C") or over all heads at once ("HC", "KC"), which on a mesh may be on several devices."""
    x = x_BTHC.astype(jnp.float32)
    over = (-1,) if cfg.qk_norm == "head" else (-2, -1)
    x = x * jax.lax.rsqrt((x * x).mean(over, keepdims=True) + cfg.norm_eps)
    return (x * _weight(scale, cfg)).astype(x_BTHC.dtype)


def sees_all(cfg: ModelConfig, layer: Any) -> jax.Array | None:
    """Whether a layer, given by its (traced) index, sees all though the model has a window; None where layers are alike."""
    if not cfg.mixed:
        return None
    assert layer is not None, "layers differ, so a block must know which one it is"
    return jnp.asarray(np.isin(np.arange(cfg.layers), cfg.full_layers))[layer]


def attention_layer(
    x_BTD: jax.Array, p: Tree, batch: Batch, cfg: ModelConfig, ops: Ops, full: jax.Array | None = None
) -> jax.Array:
    """Self-attention within each document of the row; `full` as `sees_all` says."""
    q_BTHC = ops.place(ops.einsum("BTD,DHC->BTHC", x_BTD, p["wq"], site="attn.q"), "BTHC")
    k_BTKC = ops.place(ops.einsum("BTD,DKC->BTKC", x_BTD, p["wk"], site="attn.k"), "BTKC")
    v_BTKC = ops.place(ops.einsum("BTD,DKC->BTKC", x_BTD, p["wv"], site="attn.v"), "BTKC")
    if BIASED[cfg.bias]:
        q_BTHC, k_BTKC, v_BTKC = q_BTHC + p["q_bias"], k_BTKC + p["k_bias"], v_BTKC + p["v_bias"]
    if cfg.qk_norm is not None:
        q_BTHC, k_BTKC = _qk_norm(q_BTHC, p["q_norm"], cfg), _qk_norm(k_BTKC, p["k_norm"], cfg)
    if cfg.positions == "rope":
        q_BTHC, k_BTKC = rope(q_BTHC, batch, cfg, full), rope(k_BTKC, batch, cfg, full)
    if cfg.attention_scale is not None:  # attention itself multiplies by 1 / sqrt(C)
        q_BTHC = (q_BTHC.astype(jnp.float32) * (cfg.attention_scale * cfg.head_size**0.5)).astype(q_BTHC.dtype)
    seen = {"window": cfg.window, "softcap": cfg.attention_softcap, "full": full}
    o_BTHC = ops.attend(q_BTHC, k_BTKC, v_BTKC, batch.segments, **seen)
    ops.tap("attn.heads", o_BTHC)
    y_BTD = ops.einsum("BTHC,HCD->BTD", o_BTHC, p["wo"], site="attn.o")
    return y_BTD + p["o_bias"] if "o" in BIASED[cfg.bias] else y_BTD


def block(x_BTD: jax.Array, p: Tree, batch: Batch, cfg: ModelConfig, ops: Ops, layer: Any = None) -> jax.Array:
    """One transformer block. layer: its index in the model, which counts only where layers differ (`cfg.mixed`)."""
    ops.tap("block.in", x_BTD)
    with jax.named_scope("attention"):
        h_BTD = ops.place(_norm_at("attn_norm", x_BTD, p, cfg), "BS_")
        y_BTD = attention_layer(h_BTD, p["attn"], batch, cfg, ops, sees_all(cfg, layer))
        x_BTD = ops.place(x_BTD + _post_norm("attn_post_norm", y_BTD, p, cfg, ops), "BTD")
    with jax.named_scope("mlp"):
        h_BTD = ops.place(_norm_at("mlp_norm", x_BTD, p, cfg), "BS_")
        if cfg.moe is None:
            y_BTD = mlp_layer(h_BTD, p["mlp"], cfg, ops)
        else:
            y_BTD = moe_layer(h_BTD, p["moe"], batch, cfg, cfg.moe, ops)
        x_BTD = ops.place(x_BTD + _post_norm("mlp_post_norm", y_BTD, p, cfg, ops), "BTD")
    ops.tap("block.out", x_BTD)
    return x_BTD


def _norm_at(name: str, x_BTD: jax.Array, p: Tree, cfg: ModelConfig) -> jax.Array:
    """What enters a sublayer: normalized where the block has a norm of that name."""
    return normalize(x_BTD, p[name], cfg) if name in p else x_BTD


def _post_norm(name: str, y_BTD: jax.Array, p: Tree, cfg: ModelConfig, ops: Ops) -> jax.Array:
    """What a sublayer adds: its output, cut over T as the residual stream before it is normalized."""
    return normalize(ops.place(y_BTD, "BTD"), p[name], cfg) if name in p else y_BTD


def identity_view(params: Any, state: Any) -> Any:
    """The weights as they are."""
    return params


def substate(state: Any, key: str) -> Any:
    """The part of a compression's state that belongs to the parameters under `key`: dicts are entered, tuples mapped."""
    if isinstance(state, dict):
        return state.get(key, {})
    if isinstance(state, tuple):
        parts = [substate(part, key) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def forward(
    params: Tree,
    batch: Batch,
    cfg: ModelConfig,
    *,
    make_ops: MakeOps,
    view: View = identity_view,
    view_state: Any = (),
    ranges: Ranges | None = None,
    remat: str = "none",
    unroll: int = 1,
    scan: Callable[..., Any] = jax.lax.scan,
    enter: Callable[[Any, jax.Array], Any] = lambda weights, index: weights,
    compute_dtype: Any = jnp.float32,
    output_dtype: Any = None,
    cache: Cache | None = None,
) -> Output:
    """Runs the model on a batch of packed rows; gives the last hidden state, the head's weight and the records.

    params:     arrays, or packed leaves (`QTensor`).
    view:       how weights are seen, `(subtree, its state) -> subtree`; inside the scan, so no second copy of the weights exists.
    ranges:     calibrated activation ranges by site, [L, 2] for sites of the block and [2] for the head; None when nothing is calibrated.
    remat:      what the backward pass keeps, as `models.remat` reads it; not a budget.
    unroll:     layers in one turn of the scan's loop; changes time and program size, no result.
    scan:       `jax.lax.scan`, or what does the same where layers are cut over devices (`parallel.layers.layer_scan`).
    enter:      `(weights, index of the layer) -> weights`, what they pass on their way into the block (`parallel.tiles.pinned`); changes memory, no result.
    output_dtype: of the last hidden state, rounded once from float32; None is the compute dtype.
    cache:      what the rows have seen before: `batch` then holds their next tokens, one document a row, padding (segment 0) on the right. There is then no
                backward pass, so no `remat`; layers are not on pipeline stages, so no `scan`; and nothing of them is recorded.
    """

    def seen(key: str) -> Any:
        return cast_floating(view(params[key], substate(view_state, key)), compute_dtype)

    def step(x_BTD: jax.Array, layer: Any, change: Callable[[Ops], Ops] = lambda ops: ops) -> tuple[jax.Array, Records]:
        p, state, layer_ranges, index = layer
        p = enter(p, index)
        scope = make_ops(layer_ranges)
        seen_p = cast_floating(view(p, state), compute_dtype)
        return block(x_BTD, seen_p, batch, cfg, change(scope.ops), index), scope.close()

    head_ranges = _outer_ranges(ranges)
    outer = make_ops(head_ranges)
    embed = seen("embed")
    with jax.named_scope("embedding"):
        x_BTD = embed_tokens(embed, batch, cfg, outer.ops, compute_dtype)
    layers = (params["blocks"], substate(view_state, "blocks"), _block_ranges(ranges), jnp.arange(cfg.layers))
    records: Records = {}
    with jax.named_scope("blocks"):
        if cache is None:
            kept = wrapper(parse(remat, sites(cfg)))
            x_BTD, records = scan(kept(step), x_BTD, layers, unroll=min(unroll, cfg.layers))
        else:
            x_BTD, cache = through_cache(step, x_BTD, layers, cache, batch, cfg, unroll)
    with jax.named_scope("final_norm"):
        hidden_BTD = last_hidden(x_BTD, seen("final_norm"), cfg, output_dtype or compute_dtype)
    head = embed["table"] if cfg.tied else seen("head")["w"]
    sums = kept_sums(records)
    records = {f"blocks/{name}": x for name, x in records.items() if not name.startswith(KEPT)} | outer.close()
    return Output(hidden_BTD, head, head_ranges, records, sums, cache)


def kept_sums(records: Records) -> Records:
    """What layers kept for the objective, by its own name."""
    return {name.removeprefix(KEPT): x for name, x in records.items() if name.startswith(KEPT)}


def embed_tokens(embed: Tree, batch: Batch, cfg: ModelConfig, ops: Ops, dtype: Any) -> jax.Array:
    """What enters the first block, [B, T, D]: rows of the table, scaled, with those of the positions where they are learned."""
    x_BTD = ops.embed(embed["table"], batch.tokens).astype(dtype)
    if cfg.embed_scale is not None:
        x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, dtype)
    if cfg.positions == "learned":
        check_context(cfg, batch.tokens.shape[1], "batch")
        x_BTD = x_BTD + ops.place(embed["positions"], "P_")[batch.positions].astype(dtype)
    return ops.place(x_BTD, "BTD")


def last_hidden(x_BTD: jax.Array, final_norm: Tree, cfg: ModelConfig, dtype: Any) -> jax.Array:
    """What the head sees of the last block's output, rounded once from float32."""
    return normalize(x_BTD.astype(jnp.float32), final_norm, cfg).astype(dtype)


def project(hidden: jax.Array, head: Any, cfg: ModelConfig, ops: Ops) -> jax.Array:
    """Logits "...V" of hidden states "...D" in float32, softcapped; `hidden` is [B, T, D] or [N, D]."""
    letters = "BT" if hidden.ndim == 3 else "N"
    weight = "VD" if cfg.tied else "DV"
    logits = ops.einsum(f"{letters}D,{weight}->{letters}V", hidden, head, site="head").astype(jnp.float32)
    return logits if cfg.logit_softcap is None else cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)


def sites(cfg: ModelConfig) -> list[str]:
    """The named products of the model, for rules on activations."""
    inner = mlp_sites(cfg, "mlp") if cfg.moe is None else moe_sites(cfg, cfg.moe)
    return ["attn.q", "attn.k", "attn.v", "attn.o", *inner, "head"]


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Floating arrays in the compute dtype; packed leaves, integers and routers (a rounded one sends tokens elsewhere) as they are."""

    def leaf(path: Any, x: Any) -> Any:
        kept = is_qtensor(x) or not jnp.issubdtype(x.dtype, jnp.floating) or path[-1:] == (ROUTER,)
        return x if kept else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_qtensor)


ROUTER = jax.tree_util.DictKey("router")


def _block_ranges(ranges: Ranges | None) -> dict[str, jax.Array]:
    return {site: value for site, value in (ranges or {}).items() if site != "head"}


def _outer_ranges(ranges: Ranges | None) -> dict[str, jax.Array]:
    return {site: value for site, value in (ranges or {}).items() if site == "head"}
