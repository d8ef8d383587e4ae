"""Which models exist: what `ModelConfig` and `RopeScaling` refuse, before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmeff.core.errors import ConfigError

if TYPE_CHECKING:
    from lmeff.models.config import ModelConfig, RopeScaling

CHOICES: dict[str, tuple[str | None, ...]] = {
    "norm": ("rms", "layer"),
    "norm_at": ("pre", "post", "both"),
    "activation": ("swiglu", "geglu", "gelu"),
    "positions": ("rope", "learned"),
    "bias": ("none", "qkv", "attention", "all"),
    "qk_norm": (None, "head", "width"),
}
SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope")


def check_context(cfg: ModelConfig, tokens: int, where: str) -> None:
    """Refuses rows longer than the model has positions; `where` is what made them so long."""
    if cfg.context is not None and tokens > cfg.context:
        raise ConfigError(
            f"{where}: got {tokens} tokens a row, expected at most model.context = {cfg.context}, the positions that the model has. Shorten the rows, or "
            "raise model.context where positions are not learned."
        )


def check_model(cfg: ModelConfig) -> None:
    """Raises `ConfigError` for the first thing about the model that cannot be."""
    _check_sizes(cfg)
    for name, known in CHOICES.items():
        if getattr(cfg, name) not in known:
            words = ", ".join(repr(choice) for choice in known)
            raise ConfigError(f"model.{name}: got {getattr(cfg, name)!r}, expected one of {words}")
    for name in ("attention_softcap", "logit_softcap", "attention_scale", "embed_scale", "rope_local_theta"):
        _expect_positive(f"model.{name}", getattr(cfg, name), "None")
    if cfg.norm_plus_one and cfg.norm != "rms":
        raise ConfigError(
            f"model.norm_plus_one: got True with model.norm '{cfg.norm}', expected 'rms': only the weight of an RMSNorm is kept as its difference to 1. "
            "Set one of them otherwise."
        )
    if cfg.moe is not None and cfg.bias == "all":
        raise ConfigError(
            "model.bias: got 'all' with model.moe, expected 'none', 'qkv' or 'attention': experts have no biases. Change it or set model.moe to None."
        )
    _check_window(cfg)
    if cfg.positions == "learned":
        _check_learned(cfg)
    else:
        _check_rope(cfg)


def _check_sizes(cfg: ModelConfig) -> None:
    for name in ("vocab", "width", "layers", "heads", "kv_heads", "ffn", "context", "window"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            off = {"context": ", or None for no limit", "window": ", or None for full attention"}.get(name, "")
            raise ConfigError(f"model.{name}: got {value}, expected at least 1{off}")
    if cfg.heads % cfg.kv_heads:
        raise ConfigError(f"model.kv_heads: got {cfg.kv_heads}, expected a divisor of model.heads = {cfg.heads}")
    if cfg.head_width is None and cfg.width % cfg.heads:
        raise ConfigError(
            f"model.heads: got {cfg.heads}, expected a divisor of model.width = {cfg.width}; or set model.head_width"
        )
    if cfg.head_size < 1:
        raise ConfigError(f"model.head_width: got {cfg.head_width}, expected at least 1, or None for width / heads")


def _expect_positive(where: str, value: float | None, off: str) -> None:
    if value is not None and value <= 0:
        raise ConfigError(f"{where}: got {value}, expected a positive number, or {off} to leave it out")


def _check_window(cfg: ModelConfig) -> None:
    full = cfg.full_layers
    if cfg.window is None:
        for name in ("full_layers", "rope_local_theta"):
            if value := getattr(cfg, name):
                raise ConfigError(
                    f"model.{name}: got {value} without model.window, which no layer has then; expected a window too. Set model.window, or leave "
                    f"model.{name} out."
                )
        return
    if list(full) != sorted({layer for layer in full if 0 <= layer < cfg.layers}):
        raise ConfigError(
            f"model.full_layers: got {full}, expected layers from 0 to {cfg.layers - 1}, ascending and each once"
        )
    if len(full) == cfg.layers:
        raise ConfigError(
            f"model.full_layers: got all {cfg.layers} layers with model.window = {cfg.window}, expected some that have it. Set model.window to None: then all "
            "layers see all."
        )


def _check_learned(cfg: ModelConfig) -> None:
    if cfg.context is None:
        raise ConfigError(
            "model.context: got None with model.positions 'learned', expected how many positions the table has. Set model.context."
        )
    for name, off in (("rope_scaling", None), ("rope_local_theta", None), ("rope_fraction", 1.0)):
        if (value := getattr(cfg, name)) != off:
            raise ConfigError(
                f"model.{name}: got {value} with model.positions 'learned', expected {off}: nothing is rotated. Leave it out, or set model.positions to 'rope'."
            )


def _check_rope(cfg: ModelConfig) -> None:
    for name in ("rope_theta", "rope_local_theta"):
        value = getattr(cfg, name)
        if value is not None and value <= 1:
            raise ConfigError(
                f"model.{name}: got {value}, expected more than 1: the longest wavelength over the shortest"
            )
    if not 0 < cfg.rope_fraction <= 1:
        raise ConfigError(
            f"model.rope_fraction: got {cfg.rope_fraction}, expected more than 0 and at most 1: the share of channels that turn"
        )
    turned = cfg.rotary_size
    if turned % 2 or not turned:
        raise ConfigError(
            f"model.head_width: got {cfg.head_size} of which rope_fraction = {cfg.rope_fraction} turns {turned} channels, expected an even number "
            "of them: they turn in pairs. Change one of the two."
        )
    scaling = cfg.rope_scaling
    if scaling is None:
        return
    if scaling.kind == "dynamic" and turned == 2:
        raise ConfigError(
            "model.rope_scaling.kind: got 'dynamic' for 2 channels that turn, expected more: their one frequency does not depend on theta. Choose another kind."
        )
    for name in ("short", "long") if scaling.kind == "longrope" else ():
        if len(getattr(scaling, name)) != turned // 2:
            raise ConfigError(
                f"model.rope_scaling.{name}: got {len(getattr(scaling, name))} divisors, expected {turned // 2}: one for each pair of channels that turns"
            )


def check_scaling(scaling: RopeScaling) -> None:
    """Raises `ConfigError` for the first thing about the scaling that cannot be."""
    where = "model.rope_scaling"
    if scaling.kind not in SCALINGS:
        raise ConfigError(f"{where}.kind: got '{scaling.kind}', expected one of {', '.join(SCALINGS)}")
    if scaling.factor < 1:
        raise ConfigError(f"{where}.factor: got {scaling.factor}, expected at least 1: how many times longer rows get")
    if scaling.kind != "linear" and (scaling.original is None or scaling.original < 2):
        raise ConfigError(
            f"{where}.original: got {scaling.original} with kind '{scaling.kind}', expected the context of pretraining in tokens, at least 2"
        )
    if scaling.kind == "llama3":
        _expect_order(where, scaling, "low", "high")
    if scaling.kind == "yarn":
        _expect_order(where, scaling, "beta_slow", "beta_fast")
    _expect_positive(f"{where}.attention", scaling.attention, "None")
    for name in ("short", "long"):
        if any(divisor <= 0 for divisor in getattr(scaling, name)):
            raise ConfigError(f"{where}.{name}: got {getattr(scaling, name)}, expected positive divisors")


def _expect_order(where: str, scaling: Any, smaller: str, larger: str) -> None:
    low, high = getattr(scaling, smaller), getattr(scaling, larger)
    if not 0 < low < high:
        raise ConfigError(f"{where}.{smaller}: got {low} with {larger} = {high}, expected more than 0 and less than it")
