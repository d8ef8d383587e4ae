"""The families of models that lmeff reads from Hugging Face folders and writes to them: names and config keys over the one transformer.

A family is a row of `FAMILIES`: what its config.json says (lenses over `ModelConfig`), which fields all its models share, and where each parameter
lies. Nothing here computes; a new family whose variants the transformer has is a new row. Sources are the model classes of transformers
(https://github.com/huggingface/transformers, 5.24).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmeff.interop.family_keys import (
    ABSENT,
    ATTENTION_BIAS,
    DECODER,
    GEMMA,
    GEMMA2,
    GEMMA3,
    QWEN,
    SHARED,
    SILU,
    experts,
    gpt2_scale,
    gpt2_sizes,
)
from lmeff.interop.family_names import (
    GEMMA2_LEAVES,
    GEMMA3_LEAVES,
    GPT2_LEAVES,
    LLAMA_LEAVES,
    MIXTRAL_LEAVES,
    OLMO2_LEAVES,
    PHI3_LEAVES,
    QWEN3_LEAVES,
    QWEN3_MOE_LEAVES,
)
from lmeff.interop.keys import Lens, choice, field
from lmeff.interop.rope_keys import flat_rope, phi_rope, rope_of_kinds
from lmeff.interop.stored import Stored
from lmeff.interop.window_keys import switched_window, window_by_pattern, window_of_all, window_of_later_layers
from lmeff.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """What makes a family.

    name, architecture: `model_type` and the class that transformers builds.
    lenses:   the keys that say something.
    defaults: what an absent key means.
    fixed:    fields that no key says.
    leaves:   where each parameter lies, by its path.
    must:     keys that are accepted with these values alone and not written.
    inert:    keys of this family that change nothing.
    aliases:  other names of keys.
    prefixes: of the tensors, as pairs: in front of the body and of the head. The first is written.
    ignored:  patterns of tensors that are not the language model's weights.
    part:     the key that holds the language model's own config, and the family that is written of it; None where the file is it.
    around:   keys beside `part`.
    limit:    what transformers refuses of this family, though the keys could say it; None allows all.
    """

    name: str
    architecture: str
    lenses: tuple[Lens, ...]
    defaults: Mapping[str, Any]
    leaves: Mapping[str, Stored]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    must: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = (("model.", ""),)
    ignored: tuple[str, ...] = ()
    part: tuple[str, str] | None = None
    around: frozenset[str] = frozenset()
    limit: Callable[[ModelConfig], str | None] = lambda _: None

    @property
    def keys(self) -> set[str]:
        """The keys that its lenses read."""
        return {key for lens in self.lenses for key in lens.keys}


def whole_heads(cfg: ModelConfig) -> str | None:
    """Configs of some families refuse a width that heads do not divide, though the head's own width is given."""
    if cfg.width % cfg.heads:
        return f"model.heads = {cfg.heads}, which does not divide model.width = {cfg.width}"
    return None


def heads_of_longrope(cfg: ModelConfig) -> str | None:
    """Phi-3's config counts the divisors of its rotation by width / heads, whatever the head's own width is."""
    scaled, expected = cfg.rope_scaling is not None, cfg.width // cfg.heads
    if scaled and cfg.head_size != expected:
        return f"model.head_width = {cfg.head_size}, of which longrope wants model.width / model.heads = {expected}"
    return None


_GEMMA_FIXED = {"norm_plus_one": True, "norm_at": "both"}
_GEMMA_MUST = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False, None),
}

_PICTURES = frozenset(
    {
        "text_config",
        "vision_config",
        "mm_tokens_per_image",
        *(f"{name}_token_{kind}" for name in ("boi", "eoi", "image") for kind in ("id", "index")),
        "tie_word_embeddings",
    }
)

_GEMMA3_TEXT = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    lenses=(*GEMMA, window_by_pattern(), rope_of_kinds()),
    defaults=GEMMA3,
    fixed={**_GEMMA_FIXED, "qk_norm": "head"},
    must=_GEMMA_MUST,
    inert=frozenset({"_sliding_window_pattern"}),  # beside layer_types, which says the same
    leaves=GEMMA3_LEAVES,
    limit=whole_heads,
)

# In order of choice for an export that names none.
_ROWS = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        lenses=(*DECODER, SILU, ATTENTION_BIAS, flat_rope()),
        defaults=ABSENT | {"intermediate_size": 11_008},
        must={"mlp_bias": (False,), "rope_interleaved": (False,)},
        inert=frozenset({"max_sequence_length", "is_llama_config"}),
        leaves=LLAMA_LEAVES,
        limit=whole_heads,
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        lenses=(*DECODER, SILU, window_of_all(), flat_rope()),
        defaults=ABSENT
        | {
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        leaves=LLAMA_LEAVES,
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        lenses=(*DECODER, SILU, window_of_later_layers(), flat_rope()),
        defaults=QWEN,
        fixed={"bias": "qkv"},
        must={"use_mrope": (False,)},
        leaves=LLAMA_LEAVES,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        lenses=(*DECODER, SILU, ATTENTION_BIAS, window_of_later_layers(), flat_rope()),
        defaults=QWEN | {"head_dim": 128},
        fixed={"qk_norm": "head"},
        leaves=QWEN3_LEAVES,
    ),
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        lenses=(*DECODER, SILU, ATTENTION_BIAS, flat_rope()),
        defaults=ABSENT | {"vocab_size": 50_304, "intermediate_size": 11_008, "rms_norm_eps": 1e-5},
        fixed={"norm_at": "post", "qk_norm": "width"},
        leaves=OLMO2_LEAVES,
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        lenses=(*GEMMA, window_by_pattern(2), flat_rope()),
        defaults=GEMMA2,
        fixed=_GEMMA_FIXED,
        must={**_GEMMA_MUST, "sliding_window_pattern": (2,)},
        inert=frozenset({"sliding_window_size"}),  # an older name beside sliding_window, which nothing reads
        leaves=GEMMA2_LEAVES,
        limit=whole_heads,
    ),
    _GEMMA3_TEXT,
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        lenses=(*DECODER, SILU, experts("num_local_experts", True), window_of_all(), flat_rope()),
        defaults=ABSENT
        | {
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        aliases={"num_experts": "num_local_experts"},
        leaves=MIXTRAL_LEAVES,
    ),
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        lenses=(
            *SHARED,
            field("moe_intermediate_size", "ffn"),
            SILU,
            ATTENTION_BIAS,
            experts("num_experts", None),
            switched_window(),
            flat_rope(),
        ),
        defaults=QWEN
        | {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_window_layers": None,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        fixed={"qk_norm": "head"},
        must={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
        inert=frozenset({"intermediate_size"}),  # of layers without experts, of which there are none
        aliases={"num_local_experts": "num_experts"},
        leaves=QWEN3_MOE_LEAVES,
    ),
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        lenses=(*DECODER, SILU, window_of_all(), phi_rope()),
        defaults=ABSENT
        | {
            "vocab_size": 32_064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": None,
        },
        must={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "lm_head_bias": (False,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
        leaves=PHI3_LEAVES,
        limit=heads_of_longrope,
    ),
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        lenses=(
            field("vocab_size", "vocab"),
            gpt2_sizes(),
            field("layer_norm_epsilon", "norm_eps"),
            field("tie_word_embeddings", "tied"),
            choice("activation_function", "activation", {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}),
            gpt2_scale(),
        ),
        defaults={
            "vocab_size": 50_257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
        },
        fixed={"norm": "layer", "bias": "all", "positions": "learned"},
        must={"scale_attn_by_inverse_layer_idx": (False,)},
        # Softmax is float32 here in any case; n_ctx is an older n_positions, which nothing reads.
        inert=frozenset({"reorder_and_upcast_attn", "n_ctx"}),
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        prefixes=(("transformer.", ""), ("", "")),
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask as a buffer
        leaves=GPT2_LEAVES,
    ),
    dataclasses.replace(
        _GEMMA3_TEXT,
        name="gemma3",
        part=("text_config", "gemma3_text"),
        # The file's own keys, around those of the text: of pictures, which are not read. Older files say the head is tied here alone.
        must={**_GEMMA_MUST, "tie_word_embeddings": (True,)},
        prefixes=(("language_model.model.", "language_model."), ("model.language_model.", "")),
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        around=_PICTURES,
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}
