"""The model: a decoder-only transformer as pure functions over a spec tree.

`param_specs(cfg)` is the schema; `forward` is the one function that trains and serves. Layers are stacked on a leading "L" and scanned.
The scanned block opens with `view(params, state)`: the weights as the compression wants them seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmeff.core.batch import Batch
from lmeff.core.dims import shape
from lmeff.core.numerics import is_qtensor
from lmeff.core.ops import MakeOps, Ops, Ranges, Records
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree
from lmeff.models.config import ModelConfig
from lmeff.models.remat import parse, wrapper

View = Callable[[Any, Any], Any]

GATE = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu}


class Output(NamedTuple):
    """What `forward` gives to an objective.

    hidden:  [B, T, D], after the last norm.
    head:    the head's weight as seen ("DV", or the tied table "VD"), not yet multiplied: the loss does that in chunks.
    ranges:  calibrated activation ranges of the head's site, if any.
    records: what the seam recorded; entries under "blocks/" are stacked over layers.
    """

    hidden_BTD: jax.Array
    head: Any
    ranges: Ranges
    records: Records


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The schema of the parameters: the same tree for every mesh, precision and compression."""
    tree: dict[str, Any] = {
        "embed": {"table": _spec(cfg, "VD", "D")},
        "blocks": {
            "attn_norm": _norm(cfg, "LD"),
            "attn": _attention_specs(cfg),
            "mlp_norm": _norm(cfg, "LD"),
            "mlp": _mlp_specs(cfg),
        },
        "final_norm": _norm(cfg, "D"),
    }
    if not cfg.tied:
        tree["head"] = {"w": _spec(cfg, "DV", "D")}
    return tree


def _spec(cfg: ModelConfig, letters: str, contract: str = "", init: str = "normal", scale: float = 0.02) -> ParamSpec:
    return ParamSpec(letters=letters, shape=shape(letters, cfg.sizes), contract=contract, init=init, scale=scale)


def _norm(cfg: ModelConfig, letters: str) -> dict[str, ParamSpec]:
    specs = {"scale": _spec(cfg, letters, init="ones")}
    if cfg.norm == "layer":
        specs["bias"] = _spec(cfg, letters, init="zeros")
    return specs


def _attention_specs(cfg: ModelConfig) -> dict[str, Any]:
    # Matrices that write to the residual stream start smaller (GPT-2): its variance then does not grow with depth.
    residual = 0.02 / (2 * cfg.layers) ** 0.5
    specs: dict[str, Any] = {
        "wq": _spec(cfg, "LDHC", "D"),
        "wk": _spec(cfg, "LDKC", "D"),
        "wv": _spec(cfg, "LDKC", "D"),
        "wo": _spec(cfg, "LHCD", "HC", scale=residual),
    }
    if cfg.bias:
        specs |= {name: _spec(cfg, letters, init="zeros") for name, letters in _ATTENTION_BIASES.items()}
    if cfg.qk_norm:
        specs |= {"q_norm": _spec(cfg, "LC", init="ones"), "k_norm": _spec(cfg, "LC", init="ones")}
    return specs


def _mlp_specs(cfg: ModelConfig) -> dict[str, Any]:
    specs: dict[str, Any] = {
        "up": _spec(cfg, "LDF", "D"),
        "down": _spec(cfg, "LFD", "F", scale=0.02 / (2 * cfg.layers) ** 0.5),
    }
    if cfg.gated:
        specs["gate"] = _spec(cfg, "LDF", "D")
    if cfg.bias:
        specs |= {"up_bias": _spec(cfg, "LF", init="zeros"), "down_bias": _spec(cfg, "LD", init="zeros")}
    return specs


_ATTENTION_BIASES = {"q_bias": "LHC", "k_bias": "LKC", "v_bias": "LKC", "o_bias": "LD"}


def normalize(x_BTD: jax.Array, p: Tree, cfg: ModelConfig) -> jax.Array:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last dim, in float32."""
    x = x_BTD.astype(jnp.float32)
    if cfg.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"].astype(jnp.float32)
    if cfg.norm == "layer":
        x = x + p["bias"].astype(jnp.float32)
    return x.astype(x_BTD.dtype)


def rope(x_BTHC: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), pairing channel i with i + C/2 (the Hugging Face layout), in float32."""
    half = x_BTHC.shape[-1] // 2
    frequency_C = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1C = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_C
    cos, sin = jnp.cos(angle_BT1C), jnp.sin(angle_BT1C)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)


def _head_norm(x_BTHC: jax.Array, scale_C: jax.Array, cfg: ModelConfig) -> jax.Array:
    x = x_BTHC.astype(jnp.float32)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + cfg.norm_eps)
    return (x * scale_C.astype(jnp.float32)).astype(x_BTHC.dtype)


def attention_layer(x_BTD: jax.Array, p: Tree, batch: Batch, cfg: ModelConfig, ops: Ops) -> jax.Array:
    """Self-attention within each document of the row."""
    q_BTHC = ops.place(ops.einsum("BTD,DHC->BTHC", x_BTD, p["wq"], site="attn.q"), "BTHC")
    k_BTKC = ops.place(ops.einsum("BTD,DKC->BTKC", x_BTD, p["wk"], site="attn.k"), "BTKC")
    v_BTKC = ops.place(ops.einsum("BTD,DKC->BTKC", x_BTD, p["wv"], site="attn.v"), "BTKC")
    if cfg.bias:
        q_BTHC, k_BTKC, v_BTKC = q_BTHC + p["q_bias"], k_BTKC + p["k_bias"], v_BTKC + p["v_bias"]
    if cfg.qk_norm:
        q_BTHC, k_BTKC = _head_norm(q_BTHC, p["q_norm"], cfg), _head_norm(k_BTKC, p["k_norm"], cfg)
    q_BTHC = rope(q_BTHC, batch.positions, cfg.rope_theta)
    k_BTKC = rope(k_BTKC, batch.positions, cfg.rope_theta)
    o_BTHC = ops.attend(q_BTHC, k_BTKC, v_BTKC, batch.segments, window=cfg.window, softcap=cfg.attention_softcap)
    ops.tap("attn.heads", o_BTHC)
    y_BTD = ops.einsum("BTHC,HCD->BTD", o_BTHC, p["wo"], site="attn.o")
    return y_BTD + p["o_bias"] if cfg.bias else y_BTD


def mlp_layer(x_BTD: jax.Array, p: Tree, cfg: ModelConfig, ops: Ops) -> jax.Array:
    """The feed-forward layer: gated (Shazeer 2020) or plain."""
    h_BTF = ops.einsum("BTD,DF->BTF", x_BTD, p["up"], site="mlp.up")
    if cfg.bias:
        h_BTF = h_BTF + p["up_bias"]
    if cfg.gated:
        h_BTF = GATE[cfg.activation](ops.einsum("BTD,DF->BTF", x_BTD, p["gate"], site="mlp.gate")) * h_BTF
    else:
        h_BTF = GATE[cfg.activation](h_BTF)
    h_BTF = checkpoint_name(ops.place(h_BTF, "BTF"), "mlp_hidden")
    ops.tap("mlp.neurons", h_BTF)
    y_BTD = ops.einsum("BTF,FD->BTD", h_BTF, p["down"], site="mlp.down")
    return y_BTD + p["down_bias"] if cfg.bias else y_BTD


def block(x_BTD: jax.Array, p: Tree, batch: Batch, cfg: ModelConfig, ops: Ops) -> jax.Array:
    """One pre-norm transformer block."""
    ops.tap("block.in", x_BTD)
    with jax.named_scope("attention"):
        h_BTD = ops.place(normalize(x_BTD, p["attn_norm"], cfg), "BS_")
        x_BTD = ops.place(x_BTD + attention_layer(h_BTD, p["attn"], batch, cfg, ops), "BTD")
    with jax.named_scope("mlp"):
        h_BTD = ops.place(normalize(x_BTD, p["mlp_norm"], cfg), "BS_")
        x_BTD = ops.place(x_BTD + mlp_layer(h_BTD, p["mlp"], cfg, ops), "BTD")
    ops.tap("block.out", x_BTD)
    return x_BTD


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
    enter: Callable[[Any, jax.Array], Any] = lambda weights, index: weights,
    compute_dtype: Any = jnp.float32,
    output_dtype: Any = None,
) -> Output:
    """Runs the model on a batch of packed rows; gives the last hidden state, the head's weight and the records.

    params:     arrays, or packed leaves (`QTensor`).
    view:       how weights are seen, `(subtree, its state) -> subtree`; inside the scan, so no second copy of the weights exists.
    ranges:     calibrated activation ranges by site, [L, 2] for sites of the block and [2] for the head; None when nothing is calibrated.
    remat:      what the backward pass keeps, as `models.remat` reads it; not a budget.
    unroll:     layers in one turn of the scan's loop; changes time and program size, no result.
    enter:      `(weights, index of the layer) -> weights`, what they pass on their way into the block (`Layout.pinned`); changes memory, no result.
    output_dtype: of the last hidden state, rounded once from float32; None is the compute dtype.
    """

    def seen(key: str) -> Any:
        return _cast(view(params[key], substate(view_state, key)), compute_dtype)

    def step(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Records]:
        p, state, layer_ranges, index = layer
        p = enter(p, index)
        scope = make_ops(layer_ranges)
        return block(x_BTD, _cast(view(p, state), compute_dtype), batch, cfg, scope.ops), scope.close()

    head_ranges = _outer_ranges(ranges)
    outer = make_ops(head_ranges)
    embed = seen("embed")
    x_BTD = outer.ops.embed(embed["table"], batch.tokens).astype(compute_dtype)
    x_BTD = outer.ops.place(x_BTD, "BTD")
    layers = (params["blocks"], substate(view_state, "blocks"), _block_ranges(ranges), jnp.arange(cfg.layers))
    kept = wrapper(parse(remat, sites(cfg)))
    x_BTD, records = jax.lax.scan(kept(step), x_BTD, layers, unroll=min(unroll, cfg.layers))
    hidden_BTD = normalize(x_BTD.astype(jnp.float32), seen("final_norm"), cfg).astype(output_dtype or compute_dtype)
    head = embed["table"] if cfg.tied else seen("head")["w"]
    return Output(hidden_BTD, head, head_ranges, {**{f"blocks/{k}": v for k, v in records.items()}, **outer.close()})


def project(hidden: jax.Array, head: Any, cfg: ModelConfig, ops: Ops) -> jax.Array:
    """Logits "...V" of hidden states "...D" in float32, softcapped; `hidden` is [B, T, D] or [N, D]."""
    letters = "BT" if hidden.ndim == 3 else "N"
    weight = "VD" if cfg.tied else "DV"
    logits = ops.einsum(f"{letters}D,{weight}->{letters}V", hidden, head, site="head").astype(jnp.float32)
    return logits if cfg.logit_softcap is None else cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)


def sites(cfg: ModelConfig) -> list[str]:
    """The named products of the model, for rules on activations."""
    mlp = ["mlp.up", "mlp.gate", "mlp.down"] if cfg.gated else ["mlp.up", "mlp.down"]
    return ["attn.q", "attn.k", "attn.v", "attn.o", *mlp, "head"]


def _cast(tree: Any, dtype: Any) -> Any:
    """Floating arrays in the compute dtype; packed leaves and integers as they are."""

    def leaf(x: Any) -> Any:
        return x if is_qtensor(x) or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

    return jax.tree.map(leaf, tree, is_leaf=is_qtensor)


def _block_ranges(ranges: Ranges | None) -> dict[str, jax.Array]:
    return {site: value for site, value in (ranges or {}).items() if site != "head"}


def _outer_ranges(ranges: Ranges | None) -> dict[str, jax.Array]:
    return {site: value for site, value in (ranges or {}).items() if site == "head"}
