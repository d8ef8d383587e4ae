"""The lenses that families share, and what an absent key means in each of them (the defaults of transformers' config classes)."""

import math
from typing import Any

from lmeff.interop.keys import Keys, Lens, choice, field, flag
from lmeff.interop.rope_keys import head_size
from lmeff.models.config import ModelConfig, MoE


def heads() -> Lens:
    def read(v: Keys) -> dict[str, Any]:
        heads, width = v["num_attention_heads"], v["hidden_size"]
        if not v["head_dim"] and width % heads:
            raise v.refused("num_attention_heads", f"a divisor of hidden_size = {width}, or a head_dim")
        size = head_size(v)
        kv_heads = v["num_key_value_heads"] or heads
        if heads % kv_heads:
            raise v.refused("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
        return {"heads": heads, "kv_heads": kv_heads, "head_width": None if size * heads == width else size}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {"num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_size}

    return Lens(keys=("num_attention_heads", "num_key_value_heads", "head_dim"), read=read, write=write)


def experts(count: str, normalize: bool | None) -> Lens:
    """Experts in every layer. `normalize`: whether weights sum to 1; None where a key says it."""
    keys = (
        count,
        "num_experts_per_tok",
        "router_aux_loss_coef",
        *(() if normalize is not None else ("norm_topk_prob",)),
    )

    def read(v: Keys) -> dict[str, Any]:
        if v["num_experts_per_tok"] > v[count]:
            raise v.refused("num_experts_per_tok", f"at most {count} = {v[count]}")
        sums = v["norm_topk_prob"] if normalize is None else normalize
        sizes = {"experts": v[count], "top_k": v["num_experts_per_tok"]}
        return {"moe": MoE(**sizes, normalize=sums, balance=v["router_aux_loss_coef"], router_z=0.0)}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        moe = cfg.moe or MoE()
        written = {count: moe.experts, "num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.balance}
        return {**written, **({"norm_topk_prob": moe.normalize} if normalize is None else {})}

    return Lens(keys=keys, read=read, write=write)


def query_scalar() -> Lens:
    """Gemma's scale of scores, as the number whose root divides them: a whole one."""

    def read(v: Keys) -> dict[str, Any]:
        scalar = v["query_pre_attn_scalar"]
        return {"attention_scale": None if scalar == head_size(v) else scalar**-0.5}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        scale = cfg.attention_scale
        return {"query_pre_attn_scalar": cfg.head_size if scale is None else max(1, round(scale**-2))}

    return Lens(keys=("query_pre_attn_scalar",), read=read, write=write)


def root_of_width() -> Lens:
    """Gemma's scale of embeddings, which no key says."""
    return Lens(keys=(), read=lambda v: {"embed_scale": math.sqrt(v["hidden_size"])}, write=lambda cfg: {})


def gpt2_sizes() -> Lens:
    def read(v: Keys) -> dict[str, Any]:
        heads, width = v["n_head"], v["n_embd"]
        if width % heads:
            raise v.refused("n_head", f"a divisor of n_embd = {width}")
        return {
            "width": width,
            "layers": v["n_layer"],
            "heads": heads,
            "kv_heads": heads,
            "ffn": v["n_inner"] or 4 * width,
            "context": v["n_positions"],
        }

    def write(cfg: ModelConfig) -> dict[str, Any]:
        sizes = {"n_embd": cfg.width, "n_layer": cfg.layers, "n_head": cfg.heads, "n_inner": cfg.ffn}
        return {**sizes, "n_positions": cfg.context}

    return Lens(keys=("n_embd", "n_layer", "n_head", "n_inner", "n_positions"), read=read, write=write)


def gpt2_scale() -> Lens:
    return Lens(
        keys=("scale_attn_weights",),
        read=lambda v: {"attention_scale": None if v["scale_attn_weights"] else 1.0},
        write=lambda cfg: {"scale_attn_weights": cfg.attention_scale != 1.0},
    )


_TANH = {"gelu_pytorch_tanh": "geglu"}
SILU = choice("hidden_act", "activation", {"silu": "swiglu", "swish": "swiglu"})
ATTENTION_BIAS = flag("attention_bias", "bias", on="attention", off="none")
SHARED = (
    field("vocab_size", "vocab"),
    field("hidden_size", "width"),
    field("num_hidden_layers", "layers"),
    heads(),
    field("rms_norm_eps", "norm_eps"),
    field("tie_word_embeddings", "tied"),
)
DECODER = (*SHARED, field("intermediate_size", "ffn"))
GEMMA = (
    *DECODER,
    choice("hidden_activation", "activation", _TANH),
    ATTENTION_BIAS,
    field("final_logit_softcapping", "logit_softcap"),
    field("attn_logit_softcapping", "attention_softcap"),
    query_scalar(),
    root_of_width(),
)

# What an absent key means where families agree.
ABSENT: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": None,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
}
QWEN = ABSENT | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
GEMMA2 = ABSENT | {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
GEMMA3 = GEMMA2 | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_local_base_freq": None,
    "sliding_window_pattern": 6,
}
