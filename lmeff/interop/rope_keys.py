"""Rotary positions in a config.json, both ways.

Two spellings are read: `rope_theta` beside `rope_scaling` (transformers 4) and `rope_parameters` with both inside (transformers 5), flat or by the
kind of layer. The first is written: both read it. What a key means, and what stands for one that is absent, is as transformers computes it
(https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lmeff.core.errors import ConfigError
from lmeff.interop.keys import NOTHING, Keys, Lens, check_kinds
from lmeff.models.config import ModelConfig, RopeScaling

ROPE_KEYS = (
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
FULL, SLIDING = "full_attention", "sliding_attention"


def flat_rope(*, partial: bool = False, kinds: Mapping[str, str] | None = None) -> Lens:
    """One rotation for all layers. `partial`: only some channels may turn (Phi). `kinds`: older names of kinds that this family has."""

    def read(v: Keys) -> dict[str, Any]:
        rope, where = _given(v)
        fields = _one(v, rope, where, kinds or {})
        fraction = rope.get("partial_rotary_factor")
        fraction = v["partial_rotary_factor"] if fraction is None else fraction
        if not partial and fraction not in (None, 1.0):
            raise v.refused("partial_rotary_factor", "1.0", fraction)
        scaling = fields["rope_scaling"]
        _check_lengths(v, where, scaling, _pairs(v, fraction or 1.0))
        grows = scaling is not None and scaling.kind == "dynamic"
        context = None if grows else v["max_position_embeddings"]
        return {**fields, "context": context, **({"rope_fraction": float(fraction or 1.0)} if partial else {})}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        keys = {"max_position_embeddings": longest(cfg), "rope_theta": cfg.rope_theta}
        keys["rope_scaling"] = None if cfg.rope_scaling is None else scaling_keys(cfg.rope_scaling)
        return {**keys, **({"partial_rotary_factor": cfg.rope_fraction} if partial else {})}

    return Lens(keys=(*ROPE_KEYS, "partial_rotary_factor"), read=read, write=write)


def phi_rope() -> Lens:
    """Phi-3's: only the kind longrope, whose older names are "su" and "yarn", three keys of it, and the context of pretraining beside them."""
    flat = flat_rope(partial=True, kinds={"su": "longrope", "yarn": "longrope"})

    def read(v: Keys) -> dict[str, Any]:
        fields = flat.read(v)
        scaling = fields["rope_scaling"]
        if scaling is not None and scaling.kind != "longrope":
            raise v.refused("rope_scaling.type", '"longrope" or no scaling', scaling.kind)
        return fields

    def write(cfg: ModelConfig) -> dict[str, Any]:
        keys, scaling = flat.write(cfg), cfg.rope_scaling
        original = scaling.original if scaling is not None else None
        if scaling is not None:
            three = {"type": scaling.kind, "short_factor": [*scaling.short], "long_factor": [*scaling.long]}
            keys["rope_scaling"] = three
        return {**keys, "original_max_position_embeddings": original or keys["max_position_embeddings"]}

    return Lens(keys=flat.keys, read=read, write=write)


def rope_of_kinds() -> Lens:
    """Gemma 3's: layers with a window have a theta of their own and no scaling."""

    def read(v: Keys) -> dict[str, Any]:
        nested = {FULL: {}, SLIDING: {}, **(v["rope_parameters"] or {})}
        if unknown := sorted(nested.keys() - {FULL, SLIDING}):
            raise v.refused(
                "rope_parameters", f"the keys {FULL} and {SLIDING} alone", {key: nested[key] for key in unknown}
            )
        full = {**(nested[FULL] or {}), **(v["rope_scaling"] or {})}
        local = {"rope_theta": v["rope_local_base_freq"] or 10_000.0, **(nested[SLIDING] or {})}
        where = f"rope_parameters.{FULL}" if nested[FULL] else "rope_scaling"
        fields = _one(v, {"rope_theta": v["rope_theta"] or 1_000_000.0, **full}, where, {})
        turned = _one(v, local, f"rope_parameters.{SLIDING}", {})
        if turned["rope_scaling"] is not None:
            raise v.refused(f"rope_parameters.{SLIDING}", 'the rope_type "default"', local)
        grows = fields["rope_scaling"] is not None and fields["rope_scaling"].kind == "dynamic"
        context = None if grows else v["max_position_embeddings"]
        _pairs(v, 1.0)
        return {**fields, "rope_local_theta": turned["rope_theta"], "context": context}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        scaling = None if cfg.rope_scaling is None else scaling_keys(cfg.rope_scaling)
        return {
            "max_position_embeddings": longest(cfg),
            "rope_theta": cfg.rope_theta,
            "rope_local_base_freq": cfg.rope_theta if cfg.rope_local_theta is None else cfg.rope_local_theta,
            "rope_scaling": scaling,
        }

    return Lens(keys=(*ROPE_KEYS, "rope_local_base_freq"), read=read, write=write)


def head_size(v: Keys) -> int:
    """Width of a head as the file says it."""
    return v["head_dim"] or v["hidden_size"] // v["num_attention_heads"]


def _pairs(v: Keys, fraction: float) -> int:
    """Pairs of channels that turn."""
    turned = int(head_size(v) * fraction)
    if turned % 2 or not turned:
        some = "" if fraction == 1.0 else f", {turned} of them for partial_rotary_factor = {fraction}"
        raise v.refused("head_dim", f"an even number of channels that turn{some}", head_size(v))
    return turned // 2


def longest(cfg: ModelConfig, unlimited: int = 2048) -> int:
    """What stands for the context: a config without a limit is given one, since the key must be there."""
    scaling = cfg.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return int(scaling.original or unlimited)
    if cfg.context is None and scaling is not None and scaling.original is not None:
        return round(scaling.factor * scaling.original)
    return unlimited if cfg.context is None else cfg.context


def _given(v: Keys) -> tuple[dict[str, Any], str]:
    """What the file says of the rotation and under which key."""
    if v["rope_scaling"] and v["rope_parameters"]:
        raise ConfigError(
            f"{v.file}: rope_scaling, rope_parameters: got both, expected one of them: two spellings of one thing; delete one, nothing is loaded."
        )
    where = "rope_scaling" if v["rope_scaling"] else "rope_parameters"
    return {"rope_theta": v["rope_theta"], **(v[where] or {})}, where


def _one(v: Keys, rope: Mapping[str, Any], where: str, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Theta and scaling of one rotation."""
    named = rope.get("rope_type") or rope.get("type") or "default"
    kind = kinds.get(named, named)
    if kind not in READ and kind != "default":
        raise v.refused(f"{where}.rope_type", f"one of default, {', '.join(READ)}", named)
    known = {*_ANY, *_KNOWN.get(kind, {})}
    if unknown := sorted(key for key, value in rope.items() if key not in known and value is not None):
        raise v.refused(f"{where}.{unknown[0]}", f'no such key for the rope_type "{kind}"', rope[unknown[0]])
    checked = {key: value for key, value in rope.items() if value is not None}
    inner = Keys(file=v.file, family=v.family, values={f"{where}.{key}": value for key, value in checked.items()})
    check_kinds(inner, {f"{where}.{key}": need for key, need in (_ANY | _KNOWN.get(kind, {})).items()})
    theta = checked.get("rope_theta", 10_000.0)
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if kind != "longrope" and kind != "yarn" and "factor" not in checked:
        raise v.refused(f"{where}.factor", "a number above 0", NOTHING)
    return {"rope_theta": float(theta), "rope_scaling": READ[kind](_original(v, checked, where, kind), v)}


def _original(v: Keys, rope: dict[str, Any], where: str, kind: str) -> dict[str, Any]:
    """The same with the context of pretraining, and the factor where it follows from it."""
    given = v["original_max_position_embeddings"] or rope.get("original_max_position_embeddings")
    original = v["max_position_embeddings"] if kind == "dynamic" or given is None else given
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        if name not in rope:
            raise v.refused(f"{where}.{name}", "a list of numbers", NOTHING)
    for name in ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ():
        if name not in rope:
            raise v.refused(f"{where}.{name}", "a number above 0", NOTHING)
    return {"factor": v["max_position_embeddings"] / original, **rope, "original": original}


def _check_lengths(v: Keys, where: str, scaling: RopeScaling | None, pairs: int) -> None:
    if scaling is not None and scaling.kind == "longrope":
        for name, values in (("short_factor", scaling.short), ("long_factor", scaling.long)):
            if len(values) != pairs:
                raise v.refused(
                    f"{where}.{name}", f"{pairs} numbers, one for each pair of channels that turns", [*values]
                )


def _yarn(rope: dict[str, Any], _: Keys) -> RopeScaling:
    attention = rope.get("attention_factor")
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and scale and scale_all:
        attention = _mscale(rope["factor"], scale) / _mscale(rope["factor"], scale_all)
    return RopeScaling(
        kind="yarn",
        factor=float(rope["factor"]),
        original=rope["original"],
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=rope.get("truncate", True),
        attention=attention,
    )


def _mscale(factor: float, scale: float) -> float:
    """YaRN's temperature, equation 22 with DeepSeek's weight of its logarithm."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _llama3(rope: dict[str, Any], _: Keys) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        original=rope["original"],
        low=float(rope["low_freq_factor"]),
        high=float(rope["high_freq_factor"]),
    )


def _longrope(rope: dict[str, Any], _: Keys) -> RopeScaling:
    return RopeScaling(
        kind="longrope",
        factor=float(rope["factor"]),
        original=rope["original"],
        attention=rope.get("attention_factor"),
        short=tuple(map(float, rope["short_factor"])),
        long=tuple(map(float, rope["long_factor"])),
    )


def scaling_keys(s: RopeScaling) -> dict[str, Any]:
    """The value of `rope_scaling`."""
    keys: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("yarn", "llama3", "longrope"):
        keys["original_max_position_embeddings"] = s.original
    if s.kind == "llama3":
        keys |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
    if s.kind == "yarn":
        keys |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        keys |= {"short_factor": [*s.short], "long_factor": [*s.long]}
    return keys if s.attention is None else {**keys, "attention_factor": s.attention}


_ANY = {"rope_type": "word", "type": "word", "rope_theta": "positive", "partial_rotary_factor": "positive"}
_KNOWN: dict[str, dict[str, str]] = {
    "linear": {"factor": "positive"},
    # transformers grows theta from max_position_embeddings and reads no other context here.
    "dynamic": {"factor": "positive"},
    "yarn": {
        "factor": "positive",
        "original_max_position_embeddings": "size",
        "attention_factor": "positive",
        "beta_fast": "positive",
        "beta_slow": "positive",
        "mscale": "weight",
        "mscale_all_dim": "weight",
        "truncate": "flag",
    },
    "llama3": {
        "factor": "positive",
        "original_max_position_embeddings": "size",
        "low_freq_factor": "positive",
        "high_freq_factor": "positive",
    },
    "longrope": {
        "factor": "positive",
        "original_max_position_embeddings": "size",
        "attention_factor": "positive",
        "short_factor": "numbers",
        "long_factor": "numbers",
    },
}
READ: dict[str, Callable[[dict[str, Any], Keys], RopeScaling]] = {
    "linear": lambda rope, _: RopeScaling(kind="linear", factor=float(rope["factor"])),
    "dynamic": lambda rope, _: RopeScaling(kind="dynamic", factor=float(rope["factor"]), original=rope["original"]),
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
