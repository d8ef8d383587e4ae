"""Tiny models that combine what those of a family combine: changes of a base of width 16, 2 layers, 4 heads and 2 key-value heads."""

from lmeff.models.config import MoE, RopeScaling

FAMILIES = {
    "llama 3": {
        "head_width": 8,
        "tied": False,
        "rope_theta": 500_000.0,
        "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original=64),
    },
    "mistral": {"window": 3, "tied": False},
    "mixtral": {"moe": MoE(experts=4, top_k=2), "tied": False},
    "qwen 2": {"bias": "qkv", "tied": False, "norm_eps": 1e-6},
    "qwen 3": {"qk_norm": "head", "head_width": 6, "rope_theta": 1e6},
    "gemma": {"activation": "geglu", "norm_plus_one": True, "embed_scale": 4.0, "kv_heads": 1, "head_width": 6},
    "gemma 2": {
        "activation": "geglu",
        "norm_plus_one": True,
        "norm_at": "both",
        "embed_scale": 4.0,
        "window": 3,
        "full_layers": (1,),
        "attention_scale": 12**-0.5,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
    },
    "gemma 3": {
        "activation": "geglu",
        "norm_plus_one": True,
        "norm_at": "both",
        "qk_norm": "head",
        "embed_scale": 4.0,
        "layers": 3,
        "window": 3,
        "full_layers": (2,),
        "rope_theta": 1e6,
        "rope_local_theta": 1e4,
        "rope_scaling": RopeScaling(kind="linear", factor=8.0),
    },
    "olmo 2": {"norm_at": "post", "qk_norm": "width", "kv_heads": 4, "tied": False},
    "phi 3": {
        "head_width": 8,
        "rope_fraction": 0.75,
        "tied": False,
        "rope_scaling": RopeScaling(
            kind="longrope", factor=32.0, original=6, short=(1.0, 1.1, 1.3), long=(1.5, 4.0, 9.0)
        ),
    },
    "gpt 2": {
        "activation": "gelu",
        "bias": "all",
        "norm": "layer",
        "positions": "learned",
        "context": 12,
        "kv_heads": 4,
    },
}
