"""The architectures of llama.cpp that this model can be: what each takes for granted, which tensors it has, and its metadata.

A GGUF file says little of a model's structure: llama.cpp has it in code, by the name of the architecture. So a config has to be exactly what the code takes for
granted, or there is no file. Facts: https://github.com/ggml-org/llama.cpp, src/llama-model.cpp and convert_hf_to_gguf.py; keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lmeff.core.errors import ConfigError
from lmeff.models.config import ModelConfig, RopeScaling

UNLIMITED = 2048  # tokens; what stands for the context of a model without a limit: the key must be there


class Architecture(NamedTuple):
    """One of llama.cpp's.

    needs:       fields of the config and the values that are taken for granted; a function gives the value from the config.
    interleaved: rotary pairs are channels 2i and 2i + 1 and not i and i + C / 2, so rows of queries and keys change places.
    pretokenizer: how its byte-level tokenizers cut text before merging, by llama.cpp's name; None where families of one architecture differ.
    """

    needs: Mapping[str, Any]
    interleaved: bool = False
    pretokenizer: str | None = None


def architecture_of(cfg: ModelConfig) -> str:
    """The name of the architecture that a model is; raises `ConfigError` with what the nearest would need."""
    misses = {name: _misses(cfg, own) for name, own in ARCHITECTURES.items()}
    nearest = min(misses, key=lambda name: len(misses[name]))
    if misses[nearest]:
        raise ConfigError(
            f"GGUF: got a model that none of llama.cpp's architectures {', '.join(ARCHITECTURES)} computes; the nearest is {nearest}, which expects "
            f"{'; '.join(misses[nearest])}. Export it to safetensors instead."
        )
    return nearest


def _misses(cfg: ModelConfig, own: Architecture) -> list[str]:
    found = []
    for field, need in {**COMMON, **own.needs}.items():
        wanted, got = need(cfg) if callable(need) else need, getattr(cfg, field)
        wanted = wanted if isinstance(wanted, tuple) and field != "full_layers" else (wanted,)
        if not any(_same(got, value) for value in wanted):
            found.append(f"model.{field} = {' or '.join(map(str, wanted))} and not {got}")
    scaling = cfg.rope_scaling
    if scaling is not None and scaling not in _scalings(scaling):
        found.append(
            f"model.rope_scaling of the kind linear, llama3, or yarn with its usual constants, and not {scaling}"
        )
    return found


def _same(got: Any, wanted: Any) -> bool:
    if wanted is ANY:
        return got is not None
    floats = isinstance(got, float) and isinstance(wanted, float)
    return math.isclose(got, wanted, rel_tol=1e-6) if floats else got == wanted


def _scalings(scaling: RopeScaling) -> tuple[RopeScaling, ...]:
    """What llama.cpp computes for a file with this factor and context of pretraining; fields of other kinds do not count."""
    factor, original = scaling.factor, scaling.original
    return (
        RopeScaling(kind="linear", factor=factor, original=original),
        RopeScaling(kind="yarn", factor=factor, original=original),
        RopeScaling(kind="llama3", factor=factor, original=original, low=scaling.low, high=scaling.high),
    )


def metadata(cfg: ModelConfig, name: str) -> dict[str, Any]:
    """`{key: value}` below the architecture's name: whole numbers, floats and texts."""
    keys: dict[str, Any] = {
        "vocab_size": cfg.vocab,
        "context_length": cfg.context or UNLIMITED,
        "embedding_length": cfg.width,
        "block_count": cfg.layers,
        "feed_forward_length": cfg.ffn,
        "attention.head_count": cfg.heads,
        "attention.head_count_kv": cfg.kv_heads,
        "attention.key_length": cfg.head_size,
        "attention.value_length": cfg.head_size,
        "attention.layer_norm_rms_epsilon": float(cfg.norm_eps),
        "rope.dimension_count": cfg.head_size,
        "rope.freq_base": float(cfg.rope_theta),
    }
    if name == "gemma2":
        assert cfg.attention_softcap is not None
        assert cfg.logit_softcap is not None
        keys["attention.sliding_window"] = cfg.window
        keys["attn_logit_softcapping"] = float(cfg.attention_softcap)
        keys["final_logit_softcapping"] = float(cfg.logit_softcap)
    scaling = cfg.rope_scaling
    if scaling is not None and scaling.kind != "llama3":
        keys |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
        if scaling.original is not None:
            keys["rope.scaling.original_context_length"] = scaling.original
    return keys


def rope_factors(cfg: ModelConfig) -> np.ndarray | None:
    """What each rotary frequency is divided by, float32 [C / 2]: Llama 3's scaling is a tensor of the file (Grattafiori et al. 2024,
    https://arxiv.org/abs/2407.21783, as in the models' own code); None for others."""
    scaling = cfg.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    assert scaling.original is not None
    pairs = cfg.head_size // 2
    turns = scaling.original / (
        2 * np.pi * cfg.rope_theta ** (np.arange(pairs) / pairs)
    )  # over the context of pretraining
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (1 / (kept + (1 - kept) / scaling.factor)).astype(np.float32)


ANY = object()  # any value but None

COMMON: Mapping[str, Any] = {
    "norm": "rms",
    "norm_plus_one": False,
    "norm_at": "pre",
    "activation": "swiglu",
    "positions": "rope",
    "rope_fraction": 1.0,
    "rope_local_theta": None,
    "bias": "none",
    "qk_norm": None,
    "moe": None,
    "window": None,
    "full_layers": (),
    "logit_softcap": None,
    "attention_softcap": None,
    "attention_scale": lambda cfg: (None, cfg.head_size**-0.5),
    "embed_scale": None,
}


def _alternate(cfg: ModelConfig) -> tuple[int, ...]:
    return tuple(range(1, cfg.layers, 2))


def _gemma2_scale(cfg: ModelConfig) -> tuple[float | None, ...]:
    """llama.cpp knows the 27B, which divides by the width for each head, by its 46 layers."""
    return (None, cfg.head_size**-0.5) if cfg.layers != 46 else ((cfg.width / cfg.heads) ** -0.5,)


_GEMMA2: Mapping[str, Any] = {
    "norm_plus_one": True,
    "norm_at": "both",
    "activation": "geglu",
    "tied": True,
    "window": ANY,
    "full_layers": _alternate,
    "logit_softcap": ANY,
    "attention_softcap": ANY,
    "attention_scale": _gemma2_scale,
    "embed_scale": lambda cfg: cfg.width**0.5,
    "rope_scaling": None,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture({"bias": ("none", "attention")}, interleaved=True),
    "qwen2": Architecture({"bias": "qkv"}, pretokenizer="qwen2"),
    "qwen3": Architecture({"qk_norm": "head"}, pretokenizer="qwen2"),
    "gemma2": Architecture(_GEMMA2),
}

# The tensors of a leaf, by the package's own names; a leaf that is not here makes the export refuse.
TENSORS: Mapping[str, tuple[str, str]] = {
    "embed/table": ("TOKEN_EMBD", "weight"),
    "head/w": ("OUTPUT", "weight"),
    "final_norm/scale": ("OUTPUT_NORM", "weight"),
    "blocks/attn_norm/scale": ("ATTN_NORM", "weight"),
    "blocks/attn_post_norm/scale": ("ATTN_POST_NORM", "weight"),
    "blocks/mlp_norm/scale": ("FFN_NORM", "weight"),
    "blocks/mlp_post_norm/scale": ("FFN_POST_NORM", "weight"),
    "blocks/attn/wq": ("ATTN_Q", "weight"),
    "blocks/attn/wk": ("ATTN_K", "weight"),
    "blocks/attn/wv": ("ATTN_V", "weight"),
    "blocks/attn/wo": ("ATTN_OUT", "weight"),
    "blocks/attn/q_bias": ("ATTN_Q", "bias"),
    "blocks/attn/k_bias": ("ATTN_K", "bias"),
    "blocks/attn/v_bias": ("ATTN_V", "bias"),
    "blocks/attn/o_bias": ("ATTN_OUT", "bias"),
    "blocks/attn/q_norm": ("ATTN_Q_NORM", "weight"),
    "blocks/attn/k_norm": ("ATTN_K_NORM", "weight"),
    "blocks/mlp/up": ("FFN_UP", "weight"),
    "blocks/mlp/gate": ("FFN_GATE", "weight"),
    "blocks/mlp/down": ("FFN_DOWN", "weight"),
}
