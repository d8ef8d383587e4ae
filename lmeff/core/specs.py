"""Parameter specs and the rules that select parameters by path.

A spec tree has the shape of the parameter tree with a `ParamSpec` at each leaf. It is known before any array exists:
shapes, shardings, bytes and rules are settled on it, before anything compiles.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.errors import ConfigError
from lmeff.core.tree import Tree, flatten, map_with_path

Rules = Sequence[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter: its letters, its shape and what contracts it.

    letters:  dims in order, e.g. "LDHC"; a leading "L" is the stack of layers that the model scans over, "LE" or "E" that of experts.
    contract: the letters summed over where the model uses it ("D" for "DHC"). They say where the scales of a
              quantized weight lie and which dims an N:M pattern runs along. Empty for norms and biases.
    init:     "normal" (standard deviation `scale`), "ones" or "zeros".
    """

    letters: str
    shape: tuple[int, ...]
    contract: str = ""
    init: str = "normal"
    scale: float = 0.02

    @property
    def stacked(self) -> bool:
        """Whether the leading dim is the stack of layers."""
        return self.letters.startswith("L")

    @property
    def is_expert(self) -> bool:
        """Whether it holds a matrix for each expert."""
        return self.letters.removeprefix("L").startswith("E")

    @property
    def axes(self) -> tuple[int, ...]:
        """The contracted dims as negative axes: the same numbers hold inside and outside the scan over layers."""
        return tuple(self.letters.index(letter) - len(self.letters) for letter in self.contract)

    @property
    def own_axes(self) -> tuple[int, ...]:
        """The dims of one matrix, as negative axes: all but the stacks of layers and of experts."""
        count = len(self.letters.lstrip("LE"))
        return tuple(range(-count, 0))

    @property
    def is_matmul(self) -> bool:
        """Whether an einsum contracts it: what pruning and quantization act on."""
        return bool(self.contract)


def abstract(specs: Tree, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return map_with_path(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs)


def initialize(key: jax.Array, specs: Tree, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters. Each leaf's key is folded from its position in the sorted paths: the same on every mesh."""
    order = {path: i for i, path in enumerate(sorted(flatten(specs)))}

    def leaf(path: str, spec: ParamSpec) -> jax.Array:
        if spec.init == "normal":
            return spec.scale * jax.random.normal(jax.random.fold_in(key, order[path]), spec.shape, dtype)
        return {"ones": jnp.ones, "zeros": jnp.zeros}[spec.init](spec.shape, dtype)

    return map_with_path(leaf, specs)


def count(specs: Tree) -> int:
    """Number of parameters."""
    return sum(math.prod(spec.shape) for spec in flatten(specs).values())


def resolve(rules: Rules, paths: Iterable[str], *, where: str) -> dict[str, Any]:
    """Resolves `(pattern, value)` rules to `{path: value}`: full match, first match wins, total and live.

    Raises `ConfigError` where a path is matched by no rule or a rule matches nothing, and names the nearest path:
    a rule that silently matches nothing is the classic bug of compression tools.
    """
    paths = list(paths)
    table: dict[str, Any] = {}
    used = [False] * len(rules)
    for path in paths:
        for i, (pattern, value) in enumerate(rules):
            if _matches(pattern, path, where=f"{where}[{i}]"):
                used[i] = used[i] or path not in table
                table.setdefault(path, value)
                break
        else:
            raise ConfigError(
                f"{where}: no rule matches '{path}'. Rules are total: every path needs one, "
                f"so end them with ('.*', None) to leave the rest alone. Rules: {[pattern for pattern, _ in rules]}"
            )
    for i, (pattern, _) in enumerate(rules):
        if not used[i] and pattern != ".*":
            raise ConfigError(f"{where}[{i}]: '{pattern}' {_unused_reason(pattern, paths)}")
    return table


def _matches(pattern: str, path: str, *, where: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ConfigError(f"{where}: '{pattern}' is not a regular expression ({error})") from error


def _unused_reason(pattern: str, paths: Sequence[str]) -> str:
    if any(re.fullmatch(pattern, path) for path in paths):
        return "is never reached: earlier rules match all that it matches. Move it up or delete it."
    literal = re.sub(r"\\.|[.*+?()\[\]|^$]", "", pattern)
    nearest = difflib.get_close_matches(literal, paths, n=1, cutoff=0.0)
    return f"matches nothing (patterns match the whole path). Nearest: '{nearest[0] if nearest else ''}'."


def describe(specs: Tree, table: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (path, letters, shape, rule) of a resolved table, for printing before anything compiles."""
    return [
        (path, spec.letters, "x".join(map(str, spec.shape)), "-" if table.get(path) is None else str(table[path]))
        for path, spec in flatten(specs).items()
    ]
