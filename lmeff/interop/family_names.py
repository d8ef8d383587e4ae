"""Where the parameters of each family lie: names and dims of its tensors by the path of the leaf."""

from lmeff.interop.stored import Stored

_LAYER = "{body}layers.{L}."
_ATTENTION = {
    "blocks/attn/wq": Stored(_LAYER + "self_attn.q_proj.weight", "HC D"),
    "blocks/attn/wk": Stored(_LAYER + "self_attn.k_proj.weight", "KC D"),
    "blocks/attn/wv": Stored(_LAYER + "self_attn.v_proj.weight", "KC D"),
    "blocks/attn/wo": Stored(_LAYER + "self_attn.o_proj.weight", "D HC"),
    "blocks/attn/q_bias": Stored(_LAYER + "self_attn.q_proj.bias", "HC"),
    "blocks/attn/k_bias": Stored(_LAYER + "self_attn.k_proj.bias", "KC"),
    "blocks/attn/v_bias": Stored(_LAYER + "self_attn.v_proj.bias", "KC"),
    "blocks/attn/o_bias": Stored(_LAYER + "self_attn.o_proj.bias", "D"),
}
_MLP = {
    "blocks/mlp/gate": Stored(_LAYER + "mlp.gate_proj.weight", "F D"),
    "blocks/mlp/up": Stored(_LAYER + "mlp.up_proj.weight", "F D"),
    "blocks/mlp/down": Stored(_LAYER + "mlp.down_proj.weight", "D F"),
}
_OUTER = {
    "embed/table": Stored("{body}embed_tokens.weight", "V D"),
    "final_norm/scale": Stored("{body}norm.weight", "D"),
    "head/w": Stored("{head}lm_head.weight", "V D"),
}
_PRE_NORMS = {
    "blocks/attn_norm/scale": Stored(_LAYER + "input_layernorm.weight", "D"),
    "blocks/mlp_norm/scale": Stored(_LAYER + "post_attention_layernorm.weight", "D"),
}
_POST_NORMS = {
    "blocks/attn_post_norm/scale": Stored(_LAYER + "post_attention_layernorm.weight", "D"),
    "blocks/mlp_post_norm/scale": Stored(_LAYER + "post_feedforward_layernorm.weight", "D"),
}
_NORMS_OF_BOTH = {
    "blocks/attn_norm/scale": Stored(_LAYER + "input_layernorm.weight", "D"),
    "blocks/mlp_norm/scale": Stored(_LAYER + "pre_feedforward_layernorm.weight", "D"),
    **_POST_NORMS,
}
_HEAD_NORMS = {
    "blocks/attn/q_norm": Stored(_LAYER + "self_attn.q_norm.weight", "C"),
    "blocks/attn/k_norm": Stored(_LAYER + "self_attn.k_norm.weight", "C"),
}
_WIDTH_NORMS = {
    "blocks/attn/q_norm": Stored(_LAYER + "self_attn.q_norm.weight", "HC"),
    "blocks/attn/k_norm": Stored(_LAYER + "self_attn.k_norm.weight", "KC"),
}
_FUSED = {
    "blocks/attn/wq": Stored(_LAYER + "self_attn.qkv_proj.weight", "HC+KC+KC D", 0),
    "blocks/attn/wk": Stored(_LAYER + "self_attn.qkv_proj.weight", "HC+KC+KC D", 1),
    "blocks/attn/wv": Stored(_LAYER + "self_attn.qkv_proj.weight", "HC+KC+KC D", 2),
    "blocks/attn/wo": _ATTENTION["blocks/attn/wo"],
    "blocks/mlp/gate": Stored(_LAYER + "mlp.gate_up_proj.weight", "F+F D", 0),
    "blocks/mlp/up": Stored(_LAYER + "mlp.gate_up_proj.weight", "F+F D", 1),
    "blocks/mlp/down": _MLP["blocks/mlp/down"],
}


def _moe(router: str, expert: str, gate: str, up: str, down: str) -> dict[str, Stored]:
    return {
        "blocks/moe/router": Stored(_LAYER + router, "E D"),
        "blocks/moe/gate": Stored(f"{_LAYER}{expert}{gate}.weight", "F D"),
        "blocks/moe/up": Stored(f"{_LAYER}{expert}{up}.weight", "F D"),
        "blocks/moe/down": Stored(f"{_LAYER}{expert}{down}.weight", "D F"),
    }


LLAMA_LEAVES = {**_OUTER, **_PRE_NORMS, **_ATTENTION, **_MLP}
_MIXTRAL = _moe("block_sparse_moe.gate.weight", "block_sparse_moe.experts.{E}.", "w1", "w3", "w2")
_QWEN3_MOE = _moe("mlp.gate.weight", "mlp.experts.{E}.", "gate_proj", "up_proj", "down_proj")
QWEN3_LEAVES = {**LLAMA_LEAVES, **_HEAD_NORMS}
OLMO2_LEAVES = {**_OUTER, **_POST_NORMS, **_ATTENTION, **_MLP, **_WIDTH_NORMS}
GEMMA2_LEAVES = {**_OUTER, **_NORMS_OF_BOTH, **_ATTENTION, **_MLP}
PHI3_LEAVES = {**_OUTER, **_PRE_NORMS, **_FUSED}
MIXTRAL_LEAVES = {**_OUTER, **_PRE_NORMS, **_ATTENTION, **_MIXTRAL}
QWEN3_MOE_LEAVES = {**_OUTER, **_PRE_NORMS, **_ATTENTION, **_HEAD_NORMS, **_QWEN3_MOE}
GEMMA3_LEAVES = {**_OUTER, **_NORMS_OF_BOTH, **_ATTENTION, **_MLP, **_HEAD_NORMS}
_BLOCK = "{body}h.{L}."
GPT2_LEAVES = {
    "embed/table": Stored("{body}wte.weight", "V D"),
    "embed/positions": Stored("{body}wpe.weight", "P D"),
    "blocks/attn_norm/scale": Stored(_BLOCK + "ln_1.weight", "D"),
    "blocks/attn_norm/bias": Stored(_BLOCK + "ln_1.bias", "D"),
    # Conv1D: inputs are the first dim, so no transpose.
    "blocks/attn/wq": Stored(_BLOCK + "attn.c_attn.weight", "D HC+KC+KC", 0),
    "blocks/attn/wk": Stored(_BLOCK + "attn.c_attn.weight", "D HC+KC+KC", 1),
    "blocks/attn/wv": Stored(_BLOCK + "attn.c_attn.weight", "D HC+KC+KC", 2),
    "blocks/attn/wo": Stored(_BLOCK + "attn.c_proj.weight", "HC D"),
    "blocks/attn/q_bias": Stored(_BLOCK + "attn.c_attn.bias", "HC+KC+KC", 0),
    "blocks/attn/k_bias": Stored(_BLOCK + "attn.c_attn.bias", "HC+KC+KC", 1),
    "blocks/attn/v_bias": Stored(_BLOCK + "attn.c_attn.bias", "HC+KC+KC", 2),
    "blocks/attn/o_bias": Stored(_BLOCK + "attn.c_proj.bias", "D"),
    "blocks/mlp_norm/scale": Stored(_BLOCK + "ln_2.weight", "D"),
    "blocks/mlp_norm/bias": Stored(_BLOCK + "ln_2.bias", "D"),
    "blocks/mlp/up": Stored(_BLOCK + "mlp.c_fc.weight", "D F"),
    "blocks/mlp/up_bias": Stored(_BLOCK + "mlp.c_fc.bias", "F"),
    "blocks/mlp/down": Stored(_BLOCK + "mlp.c_proj.weight", "F D"),
    "blocks/mlp/down_bias": Stored(_BLOCK + "mlp.c_proj.bias", "D"),
    "final_norm/scale": Stored("{body}ln_f.weight", "D"),
    "final_norm/bias": Stored("{body}ln_f.bias", "D"),
    "head/w": Stored("{head}lm_head.weight", "V D"),
}
