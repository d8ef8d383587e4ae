"""Small config.json files of every family in odd shapes, in the spelling of published models (transformers 4)."""

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10_000.0,
}
TOKENS = 24  # of a prompt
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT, LONG = [1.0, 1.1, 1.3, 1.7], [1.0, 2.0, 4.5, 7.0]
GEMMA = {
    **SIZES,
    "head_dim": 6,
    "query_pre_attn_scalar": 10,
    "sliding_window": 5,
    "hidden_activation": "gelu_pytorch_tanh",
}
EXPERTS = {"num_experts_per_tok": 2, "sliding_window": None}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}


def _rope(**keys):
    return {"model_type": "llama", **SIZES, "rope_scaling": keys}


def _qwen3_moe(**keys):
    expert = {"moe_intermediate_size": 20, "num_experts": 4, "norm_topk_prob": True, "use_sliding_window": False}
    return {"model_type": "qwen3_moe", **SIZES, "head_dim": 8, **EXPERTS, **expert, **keys}


CASES = {
    "llama, grouped, untied": {"model_type": "llama", **SIZES, "tie_word_embeddings": False, "pretraining_tp": 2},
    "llama, one key head, own head width, tied": {
        "model_type": "llama",
        **SIZES,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-4,
    },
    "llama, biases, three layers": {
        "model_type": "llama",
        **SIZES,
        "attention_bias": True,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    "llama, linear": _rope(type="linear", factor=3.0),
    "llama, dynamic": {**_rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 16},
    "llama, dynamic, short": _rope(rope_type="dynamic", factor=2.0),
    "llama, yarn": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "llama, yarn, every key": _rope(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=20.0,
        beta_slow=2.0,
        truncate=False,
        mscale=0.7,
        mscale_all_dim=0.4,
    ),
    "llama, llama3": _rope(**LLAMA3, original_max_position_embeddings=32),
    "llama, longrope": _rope(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=SHORT,
        long_factor=LONG,
        attention_factor=1.2,
    ),
    "mistral, window": {"model_type": "mistral", **SIZES, "sliding_window": 5, "tie_word_embeddings": False},
    "mistral, no window, heads that do not divide": {
        "model_type": "mistral",
        **SIZES,
        "sliding_window": None,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
    },
    "mistral, wide window, tied": {
        "model_type": "mistral",
        **SIZES,
        "sliding_window": 4096,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "qwen2, switch off": {"model_type": "qwen2", **SIZES, "use_sliding_window": False, "sliding_window": 5},
    "qwen2, later layers": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    },
    "qwen2, kinds": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 1,
    },
    "qwen3, grouped": {"model_type": "qwen3", **SIZES, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3, biases, yarn": {
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 8,
        "attention_bias": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "tie_word_embeddings": False,
    },
    "qwen3, later layers": {
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 12,
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "gemma2": {"model_type": "gemma2", **GEMMA, "num_hidden_layers": 3},
    "gemma2, no caps, one key head": {
        "model_type": "gemma2",
        **GEMMA,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma2, low caps, untied, biases": {
        "model_type": "gemma2",
        **GEMMA,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 0.5,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "gemma3, pattern": {
        "model_type": "gemma3_text",
        **GEMMA,
        "num_hidden_layers": 3,
        "sliding_window_pattern": 3,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3, kinds": {
        "model_type": "gemma3_text",
        **GEMMA,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 3.0,
    },
    "gemma3, all layers see all": {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 1},
    "mixtral": {"model_type": "mixtral", **SIZES, **EXPERTS, "num_local_experts": 4, "rope_theta": 1e6},
    "mixtral, window, three of five": {
        "model_type": "mixtral",
        **SIZES,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 6,
        "head_dim": 10,
    },
    "mixtral, tied, one expert a token": {
        "model_type": "mixtral",
        **SIZES,
        **EXPERTS,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": _qwen3_moe(),
    "qwen3_moe, weights of all, biases": _qwen3_moe(norm_topk_prob=False, attention_bias=True, head_dim=12),
    "qwen3_moe, window, tied": _qwen3_moe(
        use_sliding_window=True, sliding_window=5, num_experts=6, num_experts_per_tok=1, tie_word_embeddings=True
    ),
    "olmo2": {"model_type": "olmo2", **SIZES},
    "olmo2, all heads, biases": {
        "model_type": "olmo2",
        **SIZES,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "olmo2, own head width, llama3": {
        "model_type": "olmo2",
        **SIZES,
        "head_dim": 12,
        "num_key_value_heads": 1,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
    },
    "phi3": {"model_type": "phi3", **SIZES, "pad_token_id": None, "sliding_window": 7},
    "phi3, part of the channels": {
        "model_type": "phi3",
        **SIZES,
        "pad_token_id": None,
        "partial_rotary_factor": 0.75,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "phi3, longrope, long": {
        "model_type": "phi3",
        **SIZES,
        "pad_token_id": None,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    },
    "phi3, longrope, short": {
        "model_type": "phi3",
        **SIZES,
        "pad_token_id": None,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT[:2], "long_factor": LONG[:2]},
    },
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2, own width of the ffn, untied": {
        "model_type": "gpt2",
        **GPT2,
        "n_inner": 50,
        "n_layer": 3,
        "tie_word_embeddings": False,
    },
    "gpt2, unscaled scores, odd heads": {
        "model_type": "gpt2",
        **GPT2,
        "n_embd": 20,
        "n_head": 4,
        "scale_attn_weights": False,
        "layer_norm_epsilon": 1e-3,
    },
}
