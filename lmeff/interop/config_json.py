"""A config.json as a `ModelConfig`, and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.interop.families import FAMILIES, Family
from lmeff.interop.keys import INERT, KINDS, MUST, NOTHING, Keys, accept, check_kinds, shown
from lmeff.models.config import ModelConfig

NAME = "config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_file(folder: Path) -> dict[str, Any]:
    """The keys of the folder's config.json; raises `CheckpointError` where it is none."""
    file = Path(folder) / NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise CheckpointError(
            f"{file}: {error.strerror}; expected the {NAME} that lies beside the weights of a Hugging Face model."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: got text that is no JSON ({error}), expected an object; download the file again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: got {shown(values)}, expected an object; download the file again.")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys readers take different ones."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the key {twice[0]!r} twice")
    return dict(pairs)


def family_of(folder: Path, values: Mapping[str, Any]) -> Family:
    """The family that `model_type` names."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{Path(folder) / NAME}: model_type: got {shown(name)}, expected one of {', '.join(FAMILIES)}; lmeff knows no other family."
        )
    return FAMILIES[name]


def config_of(family: Family, values: Mapping[str, Any], file: str) -> ModelConfig:
    """What the keys say. Raises `ConfigError` where one is not known, or has a value that lmeff has no maths for."""
    if family.part is not None:
        values = _inner(family, values, file)
    v = Keys(file=file, family=family.name, values=_renamed(family, values, file))
    accept(v, MUST | dict(family.must))
    if unknown := sorted(v.values.keys() - family.keys - family.must.keys() - MUST.keys() - family.inert - INERT):
        raise v.unknown(unknown[0])
    v = dataclasses.replace(v, values={**family.defaults, **v.values})
    check_kinds(v, {key: kind for key, kind in KINDS.items() if key in family.keys})
    fields = dict(family.fixed)
    try:
        for lens in family.lenses:
            fields |= lens.read(v)
        if fields.get("window") is None:
            fields.pop("rope_local_theta", None)  # of layers that there are none of
        return ModelConfig(**fields)
    except ConfigError as error:
        if str(error).startswith(file):
            raise
        raise ConfigError(f"{file}: {error}") from error  # the model's own checks do not know the file


def _inner(family: Family, values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The part of the file that is the language model's, once what lies around it is accounted for."""
    assert family.part is not None
    key, inner_name = family.part
    outer = Keys(file=file, family=family.name, values=values)
    accept(outer, MUST | dict(family.must))
    if unknown := sorted(values.keys() - family.around - MUST.keys() - INERT):
        raise outer.unknown(unknown[0])
    inner = values.get(key)
    if not isinstance(inner, dict):
        raise outer.refused(key, "the language model's own config", NOTHING if inner is None else inner)
    if inner.get("model_type", inner_name) != inner_name:
        raise outer.refused(f"{key}.model_type", f'"{inner_name}"', inner["model_type"])
    return inner


def _renamed(family: Family, values: Mapping[str, Any], file: str) -> dict[str, Any]:
    renamed = {key: value for key, value in values.items() if key not in family.aliases}
    for alias, key in family.aliases.items():
        if alias not in values:
            continue
        if renamed.get(key, values[alias]) != values[alias]:
            raise ConfigError(
                f"{file}: {alias}, {key}: got {shown(values[alias])} and {shown(renamed[key])}, expected one value: two names of one thing; "
                "delete the wrong one, nothing is loaded."
            )
        renamed[key] = values[alias]
    return renamed


def keys_of(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    """The keys that say this config, whether or not they say all of it."""
    keys: dict[str, Any] = {}
    for lens in family.lenses:
        keys |= lens.write(cfg)
    return keys


def unsaid(family: Family, cfg: ModelConfig) -> list[str]:
    """What of a config the family has no words for: nothing where reading what it writes gives the same model."""
    try:
        back = config_of(dataclasses.replace(family, part=None), keys_of(family, cfg), family.name)
    except ConfigError as error:
        return [str(error)]
    if cfg.context is None and cfg.positions != "learned":
        back = dataclasses.replace(back, context=None)
    limit = family.limit(cfg)
    return [*_different("model", comparable(cfg), comparable(back)), *([limit] if limit else [])]


def _different(name: str, ours: Any, theirs: Any) -> list[str]:
    if ours == theirs:
        return []
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [f.name for f in dataclasses.fields(ours)]
        return [text for n in names for text in _different(f"{name}.{n}", getattr(ours, n), getattr(theirs, n))]
    return [f"{name} = {ours!r} (it has {theirs!r})"]


def comparable(cfg: ModelConfig) -> ModelConfig:
    """The same model with one spelling of each thing, and without what counts in training alone."""
    window = None if len(cfg.full_layers) == cfg.layers else cfg.window
    local = cfg.rope_local_theta if window is not None else None
    scaling = cfg.rope_scaling
    changes: dict[str, Any] = {
        "head_width": cfg.head_size,
        "moe": None if cfg.moe is None else dataclasses.replace(cfg.moe, router_z=0.0),
        "window": window,
        "full_layers": cfg.full_layers if window is not None else (),
        "rope_local_theta": None if local == cfg.rope_theta and scaling is None else local,
        "attention_scale": cfg.head_size**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
        "context": None if scaling is not None and scaling.kind == "dynamic" else cfg.context,
    }
    if cfg.positions == "learned":
        plain = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name.startswith("rope_")}
        changes |= plain
    return dataclasses.replace(cfg, **changes)


def choose(cfg: ModelConfig, family: str | None, where: Path) -> Family:
    """The family to write a config as: the one named, or the first with words for all of it. Raises `ConfigError` where there is none."""
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"{where}: family: got '{family}', expected one of {', '.join(FAMILIES)}")
    named = [FAMILIES[family]] if family is not None else [each for each in FAMILIES.values() if each.part is None]
    candidates = [FAMILIES[each.part[1]] if each.part is not None else each for each in named]
    missing = {each.name: unsaid(each, cfg) for each in candidates}
    nearest = min(missing, key=lambda name: (bool(missing[name]), len("; ".join(missing[name]))))
    if missing[nearest]:
        none = (
            f"family '{nearest}' has no"
            if family is not None
            else f"no family of Hugging Face's (the nearest is '{nearest}') has"
        )
        raise ConfigError(
            f"{where}: {none} words for {'; '.join(missing[nearest])}. Keep this model in lmeff's own format, or change it; nothing is written."
        )
    return FAMILIES[nearest]


def text_of(family: Family, cfg: ModelConfig, dtype: str, keep: Mapping[str, Any], where: Path) -> str:
    """The config.json of a config. `keep`: keys to carry over that change nothing (ids of special tokens)."""
    if wrong := sorted(keep.keys() - INERT - family.inert):
        raise ConfigError(
            f"{where}: keep: got '{wrong[0]}', expected keys that do not change the maths, such as {', '.join(IDS)}; nothing is written."
        )
    head = {"architectures": [family.architecture], "model_type": family.name, "torch_dtype": dtype}
    # An absent id is not none: some classes have ids of their own vocabulary.
    values = {**head, **dict.fromkeys(IDS), **keep, **keys_of(family, cfg)}
    return json.dumps(values, indent=2) + "\n"
