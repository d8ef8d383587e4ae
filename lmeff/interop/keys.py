"""The keys of a config.json and the fields of `ModelConfig` that they say, both ways.

A `Lens` reads some keys into some fields and writes them back. A family is a row of lenses, so that import and export come from one description, and whether a
family can express a config needs no list of its own: it can where reading what it would write gives that config again.

Every key is accounted for: read by a lens, known not to change the maths (`INERT`), accepted with certain values only (`MUST`), or refused by name.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmeff.core.errors import ConfigError
from lmeff.models.config import ModelConfig

NOTHING = object()  # in place of a value that is not there


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of one config.json, defaults filled in; `file` and `family` are for messages."""

    file: str
    family: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The value of a key."""
        return self.values[key]

    def refused(self, key: str, expected: str, value: Any = None) -> ConfigError:
        """The error of a value that lmeff has no maths for; `value` where it is not the key's own, `NOTHING` where there is none."""
        got = shown(self.values.get(key) if value is None else value)
        return ConfigError(
            f"{self.file}: {key}: got {got}, expected {expected} for model_type '{self.family}'; lmeff would compute another model, so nothing is loaded."
        )

    def unknown(self, key: str) -> ConfigError:
        """The error of a key that nobody has said anything of."""
        return ConfigError(
            f"{self.file}: {key}: got {shown(self.values[key])}, expected no such key for model_type '{self.family}': what it changes is not known, so nothing "
            "is loaded. Delete it from the file if it changes nothing."
        )


@dataclass(frozen=True, kw_only=True)
class Lens:
    """Some keys and what they say.

    keys:  their names.
    read:  `(keys) -> fields of ModelConfig`; raises what `Keys.refused` makes.
    write: `(config) -> keys`; what cannot be said this way need not be noticed here, since reading it back gives something else.
    """

    keys: tuple[str, ...]
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def shown(value: Any, limit: int = 60) -> str:
    """A value as it stands in the file, cut short."""
    text = "nothing" if value is NOTHING else json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def field(key: str, name: str) -> Lens:
    """A key that is a field."""
    return Lens(keys=(key,), read=lambda v: {name: v[key]}, write=lambda cfg: {key: getattr(cfg, name)})


def flag(key: str, name: str, *, on: Any, off: Any) -> Lens:
    """A switch that gives a field one of two values."""
    return Lens(
        keys=(key,),
        read=lambda v: {name: on if v[key] else off},
        write=lambda cfg: {key: getattr(cfg, name) == on},
    )


def choice(key: str, name: str, values: Mapping[str, Any]) -> Lens:
    """A word that gives a field one of several values; the first word of a value is written."""

    def read(v: Keys) -> dict[str, Any]:
        if v[key] not in values:
            raise v.refused(key, " or ".join(f'"{word}"' for word in values))
        return {name: values[v[key]]}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        words = [word for word, value in values.items() if value == getattr(cfg, name)]
        return {key: (words or list(values))[0]}

    return Lens(keys=(key,), read=read, write=write)


def accept(v: Keys, must: Mapping[str, Sequence[Any]]) -> None:
    """Refuses values of keys that only some values are known of."""
    for key, allowed in must.items():
        # Not `in`: False == 0 and True == 1.
        if key in v.values and not any(type(v[key]) is type(value) and v[key] == value for value in allowed):
            raise v.refused(key, " or ".join(shown(value) for value in allowed))


def check_kinds(v: Keys, kinds: Mapping[str, str]) -> None:
    """Refuses values of the wrong type; a kind that ends in "?" may be null."""
    for key, kind in kinds.items():
        value = v.values.get(key)
        if key not in v.values or (value is None and kind.endswith("?")):
            continue
        says, fits = _KINDS[kind.rstrip("?")]
        if not fits(value):
            also = " or null" if kind.endswith("?") else ""
            raise ConfigError(
                f"{v.file}: {key}: got {shown(value)}, expected {says}{also}; mend the file, nothing is loaded."
            )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number from 1 up", lambda x: _whole(x) and x >= 1),
    "index": ("a whole number from 0 up", lambda x: _whole(x) and x >= 0),
    "positive": ("a number above 0", lambda x: _number(x) and x > 0),
    "weight": ("a number from 0 up", lambda x: _number(x) and x >= 0),
    "flag": ("true or false", lambda x: isinstance(x, bool)),
    "word": ("a word", lambda x: isinstance(x, str)),
    "object": ("an object", lambda x: isinstance(x, dict)),
    "words": ("a list of words", lambda x: isinstance(x, list) and all(isinstance(word, str) for word in x)),
    "numbers": ("a list of numbers above 0", lambda x: isinstance(x, list) and all(_number(n) and n > 0 for n in x)),
}

# The kind of every key that some lens reads: a name means the same in every family.
KINDS: dict[str, str] = {
    "vocab_size": "size",
    "hidden_size": "size",
    "intermediate_size": "size",
    "moe_intermediate_size": "size",
    "num_hidden_layers": "size",
    "num_attention_heads": "size",
    "num_key_value_heads": "size?",
    "head_dim": "size?",
    "rms_norm_eps": "positive",
    "layer_norm_epsilon": "positive",
    "tie_word_embeddings": "flag",
    "attention_bias": "flag",
    "hidden_act": "word",
    "hidden_activation": "word",
    "activation_function": "word",
    "max_position_embeddings": "size",
    "original_max_position_embeddings": "size?",
    "rope_theta": "positive?",
    "rope_local_base_freq": "positive?",
    "rope_scaling": "object?",
    "rope_parameters": "object?",
    "partial_rotary_factor": "positive?",
    "sliding_window": "size?",
    "sliding_window_pattern": "size",
    "use_sliding_window": "flag",
    "max_window_layers": "index?",
    "layer_types": "words?",
    "query_pre_attn_scalar": "positive",
    "final_logit_softcapping": "positive?",
    "attn_logit_softcapping": "positive?",
    "num_local_experts": "size",
    "num_experts": "size",
    "num_experts_per_tok": "size",
    "norm_topk_prob": "flag",
    "router_aux_loss_coef": "weight",
    "n_positions": "size",
    "n_embd": "size",
    "n_layer": "size",
    "n_head": "size",
    "n_inner": "size?",
    "scale_attn_weights": "flag",
}

# Accepted with these values alone, in every family; a family adds its own.
MUST: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
}

# `auto_map` names Python code beside the weights: it is never run, and model_type alone says what the maths is.
_FILE = (
    "model_type architectures transformers_version torch_dtype dtype auto_map _name_or_path name_or_path _commit_hash custom_pipelines "
    "transformers.js_config unsloth_version unsloth_fixed tokenizer_class prefix torchscript tf_legacy_loss use_bfloat16 return_dict "
    "_attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation chunk_size_feed_forward is_decoder "
    "tie_last_hidden_states tokenizer_model_max_length tokenizer_padding_side "
    "pretraining_tp"  # how a product is split, not what it is
)
_TRAINING = (
    "initializer_range initializer_factor attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop output_router_logits "
    "router_jitter_noise gradient_checkpointing"
)
_OTHER_TASKS = (
    "id2label label2id num_labels problem_type finetuning_task task_specific_params output_attentions output_hidden_states summary_type "
    "summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout"
)
_GENERATION = (
    "use_cache cache_implementation bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id bos_token eos_token pad_token "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
)

# Known not to change what the model computes when it is read.
INERT: frozenset[str] = frozenset(f"{_FILE} {_TRAINING} {_OTHER_TASKS} {_GENERATION}".split())
