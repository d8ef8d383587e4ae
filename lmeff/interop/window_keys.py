"""Windows of attention in a config.json, both ways: one for all layers, or layers of two kinds."""

from collections.abc import Callable
from typing import Any

from lmeff.interop.keys import NOTHING, Keys, Lens
from lmeff.interop.rope_keys import FULL, SLIDING
from lmeff.models.config import ModelConfig


def window_of_all() -> Lens:
    """Mistral's: every layer has the window, or none has."""
    return Lens(
        keys=("sliding_window",),
        read=lambda v: {"window": v["sliding_window"]},
        write=lambda cfg: {"sliding_window": cfg.window},
    )


def switched_window() -> Lens:
    """Qwen3-MoE's: a window only where the switch says so; every layer has it, whatever `max_window_layers` (which transformers does not read) says."""

    def read(v: Keys) -> dict[str, Any]:
        if not v["use_sliding_window"]:
            return {"window": None}
        if v["max_window_layers"]:
            raise v.refused("max_window_layers", "0 or no such key beside use_sliding_window = true")
        return {"window": v["sliding_window"]}

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {"use_sliding_window": cfg.window is not None, "sliding_window": cfg.window}

    return Lens(keys=("use_sliding_window", "sliding_window", "max_window_layers"), read=read, write=write)


def window_of_later_layers() -> Lens:
    """Qwen2's: behind a switch, the layers from `max_window_layers` on have the window; or `layer_types` names each layer's kind."""

    def read(v: Keys) -> dict[str, Any]:
        window = v["sliding_window"] if v["use_sliding_window"] else None
        first = v["max_window_layers"] if window is not None else None
        return _of_kinds(v, window, lambda i: first is None or i < first)

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {
            "use_sliding_window": cfg.window is not None,
            "sliding_window": cfg.window,
            "max_window_layers": cfg.layers if cfg.window is None else len(cfg.full_layers),
            "layer_types": layer_types(cfg),
        }

    keys = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    return Lens(keys=keys, read=read, write=write)


def window_by_pattern(pattern: int | None = None, unused: int = 4096) -> Lens:
    """Gemma's: every `pattern`-th layer sees all, the others have the window; or `layer_types` names each layer's kind.

    pattern: where the file has no key for it. unused: the window that is written when no layer has one, since the key must be a number.
    """

    def read(v: Keys) -> dict[str, Any]:
        period = pattern or v["sliding_window_pattern"]
        return _of_kinds(v, v["sliding_window"], lambda i: (i + 1) % period == 0)

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": unused if cfg.window is None else cfg.window, "layer_types": layer_types(cfg)}

    keys = ("sliding_window", "layer_types", *(() if pattern else ("sliding_window_pattern",)))
    return Lens(keys=keys, read=read, write=write)


def layer_types(cfg: ModelConfig) -> list[str]:
    """The kind of each layer by its name in the file."""
    return [FULL if cfg.window is None or i in cfg.full_layers else SLIDING for i in range(cfg.layers)]


def _of_kinds(v: Keys, window: int | None, is_full: Callable[[int], bool]) -> dict[str, Any]:
    layers, kinds = v["num_hidden_layers"], v["layer_types"]
    kinds = [FULL if is_full(i) else SLIDING for i in range(layers)] if kinds is None else kinds
    if len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise v.refused("layer_types", f'{layers} words, each "{FULL}" or "{SLIDING}"')
    full = tuple(i for i, kind in enumerate(kinds) if kind == FULL)
    if len(full) == layers:
        return {"window": None, "full_layers": ()}
    if window is None:
        raise v.refused(
            "sliding_window", f"a whole number, since {layers - len(full)} layers are of the kind {SLIDING}", NOTHING
        )
    return {"window": window, "full_layers": full}
