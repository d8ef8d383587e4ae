"""Parameter trees are nested dicts; a leaf's path is its keys joined by `/` (`blocks/attn/wq`)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util

Tree = Mapping[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts to `{path: leaf}`, in the order of the tree. Whatever is not a dict is a leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> dict[str, Any]:
    """Maps `fn(path, leaf, *other leaves)` over the leaves of `tree`; `rest` must hold the same paths."""
    others = [flatten(other) for other in rest]
    return unflatten({path: fn(path, leaf, *(o[path] for o in others)) for path, leaf in flatten(tree).items()})


def merge(base: Tree, over: Tree) -> dict[str, Any]:
    """`base` with the leaves of `over` put in place of its own; every path of `over` must exist in `base`."""
    flat = flatten(base)
    changed = flatten(over)
    assert changed.keys() <= flat.keys(), sorted(changed.keys() - flat.keys())
    return unflatten({**flat, **changed})


def select(tree: Tree, paths: set[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The part of `tree` whose paths are in `paths`."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if path in paths})


def owner(path: Any, paths: Mapping[str, Any]) -> str | None:
    """The parameter that a leaf of some state mirrors: the longest run of dict keys in its `tree_map_with_path` path that is one of `paths`.

    Keys around the run are the state's own: optax's partitions (Muon) and dicts within a leaf's entry have some.
    """
    keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    runs = ("/".join(keys[i : i + n]) for n in range(len(keys), 0, -1) for i in range(len(keys) - n + 1))
    return next((run for run in runs if run in paths), None)
