"""Which weights are compressed and how: frozen configs, checked on the spec tree and turned into a `Compression`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmeff.compress.base import Compression, by_rule, chain, only
from lmeff.compress.prune import SCOPES, Ramp, magnitude_pruning
from lmeff.compress.quantize import METHODS, fake_quantization
from lmeff.compress.storage import Sparse
from lmeff.core import specs as core_specs
from lmeff.core.errors import ConfigError
from lmeff.core.numerics import parse_format
from lmeff.core.specs import ParamSpec, resolve
from lmeff.core.tree import Tree, flatten

MATRICES = (
    "blocks/(attn/w[qkvo]|(mlp|moe|moe/shared)/(up|gate|down))"  # every weight of a block's matrix products but routers
)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Magnitude pruning.

    sparsity: the part of the weights that goes, in [0, 1). With an N:M pattern it is 1 - N/M and may be left out.
    pattern:  "unstructured", or "N:M": N of each M weights along the contracted dim are kept.
    scope:    "leaf" prunes every layer of every weight alike, "global" ranks all of them together.
    begin, end, every: the mask is made after these steps of the stage, at a sparsity that rises cubically from 0 at `begin` to its target at `end`
              and stays. end = 0 makes it once, before the first step.
    rules:    (pattern of path, whether it is pruned) pairs; the first that matches decides.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: str = "leaf"
    begin: int = 0
    end: int = 0
    every: int = 1
    rules: tuple[tuple[str, bool], ...] = ((MATRICES, True), (".*", False))


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantization of weights; the last transform of a stage.

    method: "minmax" finds scales from the weights at every step, "lsq" learns them.
    rules:  (pattern of path, format or None) pairs, such as ("blocks/.*", "int4/g32") or ("head/w", "fp8"); the first that matches decides.
    """

    method: str = "minmax"
    rules: tuple[tuple[str, str | None], ...] = ((MATRICES, "int8"), (".*", None))


Transform = Prune | Quantize


def build(transforms: tuple[Transform, ...], *, where: str = "compress") -> Compression:
    """The composition of the transforms, in order. Raises `ConfigError` for bad values and where quantization is not the last."""
    members = []
    for i, transform in enumerate(transforms):
        KINDS[type(transform)].check(transform, f"{where}[{i}]")
        members.append(KINDS[type(transform)].build(transform, f"{where}[{i}].rules"))
    return chain(*members)


def pack_leaf(transform: Quantize, specs: Tree) -> Callable[[str, Any], Any]:
    """`(path, weight) -> leaf`: what `export` makes of one weight, so that a model can be packed without ever being whole in floating point."""
    formats = resolve(transform.rules, flatten(specs), where="compress.rules")

    def pack(path: str, w: Any) -> Any:
        if formats[path] is None:
            return w
        one = fake_quantization(parse_format(str(formats[path])), method=transform.method)
        tree, spec = {"leaf": w}, {"leaf": flatten(specs)[path]}
        return one.export(tree, one.init(tree, spec))["leaf"]

    return pack


def describe(transforms: tuple[Transform, ...], specs: Tree) -> list[tuple[str, str, str, str]]:
    """Rows (path, letters, shape, rule text) of what happens to every leaf, for printing before anything compiles."""
    done: dict[str, list[str]] = {}
    for i, transform in enumerate(transforms):
        for path, text in _leaves(transform, specs, f"compress[{i}]").items():
            done.setdefault(path, []).append(text)
    return core_specs.describe(specs, {path: ", ".join(texts) for path, texts in done.items()})


def pruned(transforms: tuple[Transform, ...], specs: Tree) -> dict[str, Sparse]:
    """The leaves that have masks and their patterns: what `storage.storage_bits` has to know."""
    found: dict[str, Sparse] = {}
    for i, transform in enumerate(transforms):
        if isinstance(transform, Prune):
            pattern = parse_pattern(transform.pattern)
            for path in _leaves(transform, specs, f"compress[{i}]"):
                found[path] = Sparse() if pattern is None else Sparse(*pattern, flatten(specs)[path].axes[-1])
    return found


def validate(transforms: tuple[Transform, ...], specs: Tree, steps: int, *, where: str = "compress") -> None:
    """Raises `ConfigError` for whatever a stage of so many steps cannot do with these specs, before anything compiles."""
    build(transforms, where=where)
    for i, transform in enumerate(transforms):
        place = f"{where}[{i}]"
        chosen = {path: flatten(specs)[path] for path in _leaves(transform, specs, place)}
        for path, spec in chosen.items():
            if not spec.is_matmul:
                raise ConfigError(
                    f"{place}.rules: choose '{path}', which no matrix product contracts (a norm or a bias); "
                    "expected weights only: narrow the rule or put one with the value None or False before it"
                )
        KINDS[type(transform)].fit(transform, chosen, steps, place)


def parse_pattern(text: str, *, where: str = "pattern") -> tuple[int, int] | None:
    """Reads `unstructured` (None) or `N:M`."""
    if text == "unstructured":
        return None
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 1 <= int(n) < int(m) <= 64):
        raise ConfigError(
            f"{where}: got '{text}', expected 'unstructured' or 'N:M' with 1 <= N < M <= 64, such as '2:4'"
        )
    return int(n), int(m)


class Kind(NamedTuple):
    """What a type of transform brings.

    build: `(transform, where of its rules) -> Compression`.
    check: `(transform, where)`: raises `ConfigError` for values that no model could take.
    fit:   `(transform, {path: spec} of its leaves, steps, where)`: raises `ConfigError` for what this model or stage cannot take.
    text:  `(transform, value of the rule) -> str`, for the printed table.
    """

    build: Callable[[Any, str], Compression]
    check: Callable[[Any, str], None]
    fit: Callable[[Any, Mapping[str, ParamSpec], int, str], None]
    text: Callable[[Any, Any], str]


def _leaves(transform: Transform, specs: Tree, where: str) -> dict[str, str]:
    """`{path: rule text}` of the leaves a transform acts on."""
    table = resolve(transform.rules, flatten(specs), where=f"{where}.rules")
    text = KINDS[type(transform)].text
    return {path: text(transform, value) for path, value in table.items() if value not in (None, False)}


def _sparsity(config: Prune, where: str) -> float:
    pattern = parse_pattern(config.pattern, where=f"{where}.pattern")
    if pattern is None:
        if config.sparsity is None or not 0 <= config.sparsity < 1:
            raise ConfigError(f"{where}.sparsity: got {config.sparsity}, expected the part that is pruned, in [0, 1)")
        return config.sparsity
    implied = 1 - pattern[0] / pattern[1]
    if config.sparsity is not None and abs(config.sparsity - implied) > 1e-6:
        raise ConfigError(
            f"{where}.sparsity: got {config.sparsity}, but the pattern '{config.pattern}' prunes {implied:g}; leave it out"
        )
    return implied


def _check_prune(config: Prune, where: str) -> None:
    _sparsity(config, where)
    if config.scope not in SCOPES:
        raise ConfigError(f"{where}.scope: got '{config.scope}', expected one of {SCOPES}")
    if config.scope == "global" and config.pattern != "unstructured":
        raise ConfigError(
            f"{where}.scope: got 'global' with the pattern '{config.pattern}', which fixes the sparsity of every group; expected 'leaf'"
        )
    if config.begin < 0 or config.end < config.begin or config.every < 1:
        raise ConfigError(
            f"{where}.begin, end, every: got {config.begin}, {config.end}, {config.every}; expected 0 <= begin <= end and every >= 1"
        )


def _fit_prune(config: Prune, chosen: Mapping[str, ParamSpec], steps: int, where: str) -> None:
    if config.end > steps:
        raise ConfigError(
            f"{where}.end: got {config.end}, but the stage trains for {steps} steps, so the sparsity would never be reached; "
            f"expected at most {steps}" + (" (0 prunes at once)" if steps == 0 else "")
        )
    pattern = parse_pattern(config.pattern)
    for path, spec in chosen.items():
        if pattern is not None and spec.shape[spec.axes[-1]] % pattern[1]:
            letter, size = spec.letters[spec.axes[-1]], spec.shape[spec.axes[-1]]
            raise ConfigError(
                f"{where}.pattern: '{config.pattern}' runs along the contracted dim {letter} of '{path}', which is {size} and no multiple of "
                f"{pattern[1]}; change M or leave this weight out by a rule"
            )


def _build_prune(config: Prune, where: str) -> Compression:
    ramp = Ramp(_sparsity(config, where), config.begin, config.end, config.every)
    pattern = parse_pattern(config.pattern)
    return only(config.rules, magnitude_pruning(ramp, pattern=pattern, scope=config.scope), where=where)


def _prune_text(config: Prune, value: bool) -> str:
    if config.pattern != "unstructured":
        return f"prune {config.pattern}"
    return f"prune {config.sparsity:g}" + (" globally" if config.scope == "global" else "")


def _check_quantize(config: Quantize, where: str) -> None:
    if config.method not in METHODS:
        raise ConfigError(f"{where}.method: got '{config.method}', expected one of {METHODS}")
    for i, (_, text) in enumerate(config.rules):
        if text is not None:
            try:
                parse_format(text)
            except ConfigError as error:
                raise ConfigError(f"{where}.rules[{i}]: {error}") from error


def _fit_quantize(config: Quantize, chosen: Mapping[str, ParamSpec], steps: int, where: str) -> None:
    """Every format takes every matrix: a last group may be ragged."""


def _build_quantize(config: Quantize, where: str) -> Compression:
    return by_rule(config.rules, lambda text: fake_quantization(parse_format(text), method=config.method), where=where)


def _quantize_text(config: Quantize, value: str) -> str:
    return value if config.method == "minmax" else f"{value} ({config.method})"


KINDS: dict[type, Kind] = {
    Prune: Kind(_build_prune, _check_prune, _fit_prune, _prune_text),
    Quantize: Kind(_build_quantize, _check_quantize, _fit_quantize, _quantize_text),
}
