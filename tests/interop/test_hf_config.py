"""The keys of config.json: published files, both spellings, and every kind of refusal in its words."""

import dataclasses
import json
import math

import pytest

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.interop.config_json import config_of, read_file
from lmeff.interop.families import FAMILIES
from lmeff.interop.hf import read_config
from lmeff.interop.keys import INERT, KINDS, MUST
from lmeff.models.config import ModelConfig, RopeScaling
from tests.interop.hf_cases import CASES, LLAMA3, LONG, SHORT, SIZES

FILE = "config.json"


def read(keys):
    return config_of(FAMILIES[keys["model_type"]], keys, FILE)


# Files as their authors wrote them, without what comes twice: https://huggingface.co/NAME/blob/main/config.json
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
            "vocab_size": 49152,
        },
        ModelConfig(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, ffn=1536, context=8192, rope_theta=1e5),
    ),
    "meta-llama/Llama-3.2-1B": (
        {
            "model_type": "llama",
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        ModelConfig(
            vocab=128256,
            width=2048,
            layers=16,
            heads=32,
            kv_heads=8,
            ffn=8192,
            context=131072,
            rope_theta=5e5,
            rope_scaling=RopeScaling(kind="llama3", factor=32.0, original=8192, low=1.0, high=4.0),
        ),
    ),
    "google/gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
        ModelConfig(
            vocab=262208,
            width=2560,
            layers=34,
            heads=8,
            kv_heads=4,
            head_width=256,
            ffn=10240,
            norm_eps=1e-6,
            norm_plus_one=True,
            norm_at="both",
            activation="geglu",
            context=131072,
            rope_theta=1e6,
            rope_scaling=RopeScaling(kind="linear", factor=8.0),
            rope_local_theta=1e4,
            qk_norm="head",
            window=1024,
            full_layers=(5, 11, 17, 23, 29),
            embed_scale=math.sqrt(2560),
        ),
    ),
    "microsoft/Phi-4-mini-instruct": (
        {
            "model_type": "phi3",
            "attention_bias": False,
            "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
            "embd_pdrop": 0.0,
            "full_attn_mod": 1,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        ModelConfig(
            vocab=200064,
            width=3072,
            layers=32,
            heads=24,
            kv_heads=8,
            ffn=8192,
            context=131072,
            rope_fraction=0.75,
            rope_scaling=RopeScaling(kind="longrope", factor=32.0, original=4096, short=(1.0,) * 48, long=(2.0,) * 48),
            window=262144,
        ),
    ),
    "openai-community/gpt2": (
        {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "attn_pdrop": 0.1,
            "layer_norm_epsilon": 1e-05,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "summary_type": "cls_index",
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        ModelConfig(
            vocab=50257,
            width=768,
            layers=12,
            heads=12,
            kv_heads=12,
            ffn=3072,
            norm="layer",
            activation="gelu",
            positions="learned",
            context=1024,
            bias="all",
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name):
    keys, cfg = PUBLISHED[name]
    assert read(keys) == cfg


# ---- two spellings


@pytest.mark.parametrize(
    "case", [case for case, keys in CASES.items() if "rope_scaling" in keys and "gemma3" not in case]
)
def test_both_spellings_of_the_rotation_say_the_same(case):
    keys = dict(CASES[case])
    inside = {"rope_theta": keys.pop("rope_theta"), **keys.pop("rope_scaling")}
    if (fraction := keys.pop("partial_rotary_factor", None)) is not None:
        inside["partial_rotary_factor"] = fraction
    assert read({**keys, "rope_parameters": inside}) == read(CASES[case])


def test_rotations_by_kind_of_layer():
    keys = dict(CASES["gemma3, pattern"])
    expected = read(keys)
    local, theta, scaling = (keys.pop(key) for key in ("rope_local_base_freq", "rope_theta", "rope_scaling"))
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
        "full_attention": {"rope_theta": theta, **scaling},
    }
    assert read({**keys, "rope_parameters": nested}) == expected
    assert expected.rope_local_theta == 500.0


def test_yarn_by_mscale_is_a_factor_of_attention():
    scaling = read(CASES["llama, yarn, every key"]).rope_scaling
    grown = math.log(4.0)
    assert scaling.attention == pytest.approx((0.07 * grown + 1) / (0.04 * grown + 1))


def test_older_names_of_longrope():
    for name in ("su", "yarn"):
        keys = CASES["phi3, longrope, long"]
        older = {**keys, "rope_scaling": {**keys["rope_scaling"], "type": name}}
        assert read(older) == read(keys)


def test_other_names_of_keys():
    keys = dict(CASES["qwen3_moe"])
    assert read({**keys, "num_local_experts": keys.pop("num_experts")}) == read(CASES["qwen3_moe"])
    with pytest.raises(ConfigError, match=r"num_local_experts, num_experts: got 5 and 4, expected one value"):
        read({**CASES["qwen3_moe"], "num_local_experts": 5})


# ---- refusals


def test_an_unknown_key_is_refused_in_these_words():
    with pytest.raises(ConfigError) as raised:
        read({**CASES["llama, grouped, untied"], "logits_scaling": 8.0})
    assert str(raised.value) == (
        "config.json: logits_scaling: got 8.0, expected no such key for model_type 'llama': what it changes is not known, so nothing is loaded. "
        "Delete it from the file if it changes nothing."
    )


def test_an_unsupported_value_is_refused_in_these_words():
    with pytest.raises(ConfigError) as raised:
        read({**CASES["llama, grouped, untied"], "hidden_act": "relu"})
    assert str(raised.value) == (
        'config.json: hidden_act: got "relu", expected "silu" or "swish" for model_type \'llama\'; '
        "lmeff would compute another model, so nothing is loaded."
    )


LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
REFUSED = {
    "quantized": (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        r'quantization_config: got \{"quant_method"',
    ),
    "biases of the ffn": ("llama", {"mlp_bias": True}, r"mlp_bias: got true, expected false"),
    "interleaved": ("llama", {"rope_interleaved": True}, r"rope_interleaved: got true, expected false"),
    "a wrong type": ("llama", {"hidden_size": "32"}, r'hidden_size: got "32", expected a whole number from 1 up; mend'),
    "a truth for a number": ("llama", {"num_hidden_layers": True}, r"num_hidden_layers: got true, expected a whole"),
    "null": ("llama", {"vocab_size": None}, r"vocab_size: got null, expected a whole number from 1 up"),
    "no number": ("llama", {"rms_norm_eps": math.nan}, r"rms_norm_eps: got NaN, expected a number above 0"),
    "heads": (
        "llama",
        {"num_attention_heads": 5},
        r"num_attention_heads: got 5, expected a divisor of hidden_size = 32",
    ),
    "key heads": ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads: got 3, expected a divisor of num_att"),
    "odd heads": ("llama", {"head_dim": 7}, r"head_dim: got 7, expected an even number of channels that turn"),
    "a kind of rotation": (
        "llama",
        {"rope_scaling": {"type": "mrope"}},
        r'rope_scaling\.rope_type: got "mrope", expected one',
    ),
    "a key of a rotation": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
        r'rope_scaling\.beta_fast: got 3, expected no such key for the rope_type "linear"',
    ),
    "a rotation without a factor": ("llama", {"rope_scaling": {"type": "linear"}}, r"factor: got nothing, expected"),
    "a factor below 1": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        r"factor: got 0\.5, expected at least 1",
    ),
    "two spellings": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        r"rope_scaling, rope_parameters: got both, expected one of them",
    ),
    "few divisors": (
        "llama",
        {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}},
        r"rope_scaling\.short_factor: got \[1\.0\], expected 4 numbers, one for each pair",
    ),
    "part of the channels": (
        "llama",
        {"partial_rotary_factor": 0.5},
        r"partial_rotary_factor: got 0\.5, expected 1\.0",
    ),
    "kinds where none are": (
        "mistral",
        {"layer_types": ["full_attention"] * 2},
        r"layer_types: got \[.*expected no such key",
    ),
    "kinds of layers": (
        "qwen2",
        {"layer_types": ["full_attention"]},
        r'layer_types: got .*expected 2 words, each "full',
    ),
    "a kind of layer": ("qwen3", {"layer_types": ["full_attention", "linear"]}, r"layer_types: got .*expected 2 words"),
    "a window without a size": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        r"sliding_window: got nothing, expected a whole number, since 1 layers",
    ),
    "both directions": (
        "gemma2",
        {"use_bidirectional_attention": True},
        r"use_bidirectional_attention: got true, expected false",
    ),
    "an ungated activation": (
        "gemma2",
        {"hidden_activation": "gelu"},
        r'hidden_activation: got "gelu", expected "gelu_pyt',
    ),
    "a scaled local rotation": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        r'rope_parameters\.sliding_attention: got \{.*expected the rope_type "default"',
    ),
    "a third kind of rotation": (
        "gemma3_text",
        {"rope_parameters": {"chunked_attention": {}}},
        r"rope_parameters: got \{.*expected the keys full_attention and sliding_attention alone",
    ),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: got \[0\], expected \[\] or null"),
    "sparse steps": ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step: got 2, expected 1"),
    "later layers": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        r"max_window_layers: got 1, expected 0 or no such key",
    ),
    "too many experts": (
        "mixtral",
        {"num_experts_per_tok": 9},
        r"num_experts_per_tok: got 9, expected at most num_local_experts = 8",
    ),
    "another scaling of phi": (
        "phi3",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        r'expected "longrope" or no scaling',
    ),
    "blocks of attention": ("phi3", {"full_attn_mod": 2}, r"full_attn_mod: got 2, expected 1"),
    "scores by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        r"scale_attn_by_inverse_layer_idx: got true",
    ),
    "cross attention": ("gpt2", {"add_cross_attention": True}, r"add_cross_attention: got true, expected false"),
    "a gelu that is another": (
        "gpt2",
        {"activation_function": "gelu"},
        r'got "gelu", expected "gelu_new" or "gelu_pytorch_tanh"',
    ),
    "heads that were cut": (
        "gpt2",
        {"pruned_heads": {"0": [1]}},
        r'pruned_heads: got \{"0": \[1\]\}, expected \{\} or null',
    ),
    "layers of their own": ("llama", {"per_layer_config": {"0": {}}}, r"per_layer_config: got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    family, changes, words = REFUSED[case]
    sizes = {} if family == "gpt2" else SIZES
    with pytest.raises(ConfigError, match=r"^config\.json: ") as raised:
        read({"model_type": family, **sizes, **changes})
    assert raised.match(words)
    assert "\n" not in str(raised.value)


def test_of_a_gemma3_with_pictures_everything_is_accounted_for():
    keys, _ = PUBLISHED["google/gemma-3-4b-it"]
    for changes, words in (
        ({"audio_config": {}}, r"audio_config: got \{\}, expected no such key"),
        ({"text_config": None}, r"text_config: got nothing, expected the language model\'s own config"),
        ({"text_config": {"model_type": "gemma2"}}, r'text_config\.model_type: got "gemma2", expected "gemma3_text"'),
        ({"text_config": {"router": 1}}, r"router: got 1, expected no such key"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings: got false, expected true"),
    ):
        with pytest.raises(ConfigError, match=words):
            read({**keys, **changes})


def test_no_lens_reads_a_key_that_is_inert_or_has_no_kind_or_default():
    for family in FAMILIES.values():
        assert family.keys <= KINDS.keys(), family.name
        assert family.keys <= family.defaults.keys(), family.name
        assert not family.keys & (INERT | family.inert | MUST.keys()), family.name


def test_inert_keys_change_nothing():
    for keys in CASES.values():
        family = FAMILIES[keys["model_type"]]
        noise = dict.fromkeys(INERT - {"model_type"} | family.inert, "whatever")
        assert read({**noise, **keys}) == read(keys)


def test_a_layer_without_a_window_has_no_theta_of_windows():
    cfg = read(CASES["gemma3, all layers see all"])
    assert (cfg.window, cfg.rope_local_theta) == (None, None)
    assert dataclasses.replace(cfg, layers=2) == cfg


# ---- the file itself


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"got text that is no JSON \(Expecting"),
        ("[1]", r"got \[1\], expected an object"),
        ('{"model_type": "llama", "model_type": "gpt2"}', r"no JSON \(the key 'model_type' twice\)"),
        ("[" * 100_000, r"got text that is no JSON"),
    ],
    ids=["cut", "a list", "a key twice", "deep"],
)
def test_a_file_that_is_no_config(text, words, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_file(tmp_path)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"config\.json: No such file or directory; expected the config\.json that lies"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize("kind", ["falcon", None, ["llama"]])
def test_an_unknown_family(kind, tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError) as raised:
        read_config(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path / FILE}: model_type: got {json.dumps(kind)}, expected one of {', '.join(FAMILIES)}; lmeff knows no other family."
    )
