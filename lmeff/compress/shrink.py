"""Structured pruning: a smaller model of the same family, cut out of a trained one.

`plan` ranks, `shrink` cuts, `masked` is the same plan as zeros in the big model: both give the same logits and, with the optimizer's state cut along,
the same training. Which dim of which array is cut follows from letters alone (L layers, F neurons, K key-value heads, H query heads), for parameters
and for everything that mirrors them: moments, averages, masks, learned scales.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.compress.importance import METHODS, Scores
from lmeff.core.errors import ConfigError
from lmeff.core.specs import ParamSpec, count
from lmeff.core.tree import flatten, merge, owner, select, unflatten
from lmeff.models.config import ModelConfig, with_layers
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, shardings


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """The shape to cut down to, in absolute sizes; None leaves a size alone.

    ffn:                 neurons kept in each layer; not of experts, which are not cut.
    kv_heads:            key-value heads kept in each layer, each with its query heads.
    queries:             query heads kept for each key-value head.
    layers:              layers kept.
    importance:          "activation" (Minitron, block influence), "magnitude" or "random" (the control arm).
    calibration_batches: batches of training data that "activation" reads.
    seed:                of "random".
    """

    ffn: int | None = None
    kv_heads: int | None = None
    queries: int | None = None
    layers: int | None = None
    importance: str = "activation"
    calibration_batches: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what no model could satisfy."""
        if all(value is None for value in self.targets.values()):
            raise ConfigError(f"shrink: no size is given, so nothing is cut; set one of {', '.join(self.targets)}")
        if self.importance not in METHODS:
            near = difflib.get_close_matches(self.importance, METHODS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"shrink.importance: got '{self.importance}', expected one of {', '.join(sorted(METHODS))}{hint}"
            )
        if self.calibration_batches < 1:
            raise ConfigError(f"shrink.calibration_batches: got {self.calibration_batches}, expected at least 1")

    @property
    def targets(self) -> dict[str, int | None]:
        """The sizes asked for."""
        return {"ffn": self.ffn, "kv_heads": self.kv_heads, "queries": self.queries, "layers": self.layers}

    def apply(self, cfg: ModelConfig) -> ModelConfig:
        """The shape after shrinking; raises `ConfigError` where a target is not smaller than what the model has.

        Which layers go is found later (`plan`): of layers that differ in what they see, the first are taken to stay.
        """
        if cfg.moe is not None and self.ffn is not None:
            raise ConfigError(
                f"shrink.ffn: got {self.ffn} for a model with {cfg.moe.experts} experts in each layer, whose neurons lmeff does not rank; expected None. "
                "Cut layers or heads, or prune the experts' weights with compress."
            )
        has = {"ffn": cfg.ffn, "kv_heads": cfg.kv_heads, "queries": cfg.sizes["G"], "layers": cfg.layers}
        for name, target in self.targets.items():
            if target is not None and not 1 <= target < has[name]:
                raise ConfigError(f"shrink.{name}: {_refusal(name, target, has)}")
        new = {name: has[name] if target is None else target for name, target in self.targets.items()}
        return _resized(cfg, range(new["layers"]), new["ffn"], new["kv_heads"], new["kv_heads"] * new["queries"])


def _refusal(name: str, target: int, has: Mapping[str, int]) -> str:
    if has[name] > 1:
        return f"got {target}, expected 1 to {has[name] - 1} (the model has {has[name]}), or None to leave it alone"
    why = {
        "kv_heads": "the model has one key-value head (multi-query attention); cut its query heads with shrink.queries",
        "queries": "each key-value head has one query head (multi-head attention); cut both with shrink.kv_heads",
    }
    return f"got {target}, but {why.get(name, f'the model has only one of its {name}')}, or leave this at None"


def _resized(cfg: ModelConfig, layers: Sequence[int], ffn: int, kv_heads: int, heads: int) -> ModelConfig:
    # The head width must stay what it was, not become width / fewer heads.
    width = cfg.head_width if heads == cfg.heads else cfg.head_size
    cfg = with_layers(cfg, layers)
    return dataclasses.replace(cfg, ffn=ffn, kv_heads=kv_heads, heads=heads, head_width=width)


class Plan(NamedTuple):
    """What is kept, as ascending indices into the big model; None where nothing is cut. Rows are the kept layers, in order.

    layers: [L']. neurons: [L', F']. groups: [L', K']. heads: [L', H'], whole groups of equal size.
    """

    layers: np.ndarray | None = None
    neurons: np.ndarray | None = None
    groups: np.ndarray | None = None
    heads: np.ndarray | None = None

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """The same by letter: the one table that slicing, masking and shapes go by."""
        named = {"L": self.layers, "F": self.neurons, "K": self.groups, "H": self.heads}
        return {letter: index for letter, index in named.items() if index is not None}


def plan(config: ShrinkConfig, cfg: ModelConfig, scores: Scores) -> Plan:
    """The most important of everything that `config` cuts; of equals the first. Layers are ranked over the model, the rest within each layer."""
    new = config.apply(cfg)
    layers = _top(scores.layers, new.layers)
    groups = _top(scores.groups[layers], new.kv_heads)
    by_group = scores.heads[layers].reshape(new.layers, cfg.kv_heads, -1)
    own = np.take_along_axis(by_group, groups[..., None], axis=1)
    within = _top(own, new.heads // new.kv_heads)
    heads = (groups[..., None] * cfg.sizes["G"] + within).reshape(new.layers, -1)
    return Plan(
        layers=layers if new.layers < cfg.layers else None,
        neurons=_top(scores.neurons[layers], new.ffn) if new.ffn < cfg.ffn else None,
        groups=groups if new.kv_heads < cfg.kv_heads else None,
        heads=heads if new.heads < cfg.heads else None,
    )


def _top(score: np.ndarray, keep: int) -> np.ndarray:
    """Ascending indices of the `keep` largest along the last dim."""
    return np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :keep], axis=-1).astype(np.int32)


def smaller(cfg: ModelConfig, plan: Plan) -> ModelConfig:
    """The shape that a plan leaves."""
    size = {letter: index.shape[-1] for letter, index in plan.kept.items()}
    has, layers = cfg.sizes, range(cfg.layers) if plan.layers is None else plan.layers.tolist()
    return _resized(cfg, layers, *(size.get(letter, has[letter]) for letter in "FKH"))


def shrink(
    cfg: ModelConfig, params: Any, state: Any, plan: Plan, *, layout: Layout | None = None
) -> tuple[ModelConfig, Any, Any]:
    """Cuts a model and whatever mirrors its parameters out of the big one: `(cfg, params, state)` of the small one. Not for use inside jit.

    params: arrays or packed leaves, sharded or not.
    state:  any pytree that mirrors the parameters (optimizer, compression, averages; a whole train state), or None. Arrays below the dict keys
            of a parameter are cut in the dims where they have the parameter's size; dims of size 1 (shared scales) and scalars stay.
            What cannot be cut exactly (factored moments, scales of groups that a cut would regroup) raises `ConfigError`.
            An N:M mask keeps its entries, not its pattern along a cut dim.
    layout: where the results are placed, as a model of the smaller shape is; None leaves that to XLA.
    """
    flat = flatten(param_specs(cfg))
    assert flatten(params).keys() == flat.keys(), "params are not those of cfg"
    kept = plan.kept

    def cut(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: _cut(path, x, flat, kept), tree)

    new = smaller(cfg, plan)
    shapes = jax.eval_shape(cut, (params, state))  # refuses before anything runs
    out = None if layout is None else shardings(shapes, param_specs(new), layout)
    return new, *jax.jit(cut, out_shardings=out)((params, state))


def _cut(path: Any, x: Any, specs: Mapping[str, ParamSpec], kept: Mapping[str, np.ndarray]) -> Any:
    """One array, cut along every letter of the parameter it mirrors that the plan cuts."""
    if x.size == 1:
        return x
    name = owner(path, specs)
    if name is None and not isinstance(path[-1], jax.tree_util.DictKey):
        return x  # the state's own, such as Muon's coefficients
    if name is None:
        raise ConfigError(
            f"shrink: {_of(path, x)} lies below no parameter, so which of its dims to cut is unknown; expected state that mirrors the "
            "parameters. Leave it out and make it anew for the smaller model."
        )
    spec = specs[name]
    if not any(letter in kept for letter in spec.letters):
        return x
    letters = _cut_letters(path, x, spec, kept)
    rows = kept["L"] if "L" in letters else None
    x = x if rows is None else jnp.take(x, rows, axis=0)
    for letter in letters.replace("L", ""):
        index = kept[letter]
        x = jnp.take_along_axis(x, _aligned(index, letter, spec.letters), axis=spec.letters.index(letter))
    return x


def _cut_letters(path: Any, x: Any, spec: ParamSpec, kept: Mapping[str, np.ndarray]) -> str:
    """The letters to cut `x` along; raises `ConfigError` where that could not be exact."""
    assert spec.stacked, "what is cut differs by layer, so every cut parameter is stacked over layers"
    if len(x.shape) != len(spec.letters):
        raise ConfigError(
            f"shrink: {_of(path, x)} does not have the dims {spec.letters} of its parameter {spec.shape}, so it cannot be cut exactly: it holds "
            "sums over dims that the cut changes (Adafactor's factored moments are such). Start the optimizer anew, or use adamw, lion or sgd."
        )
    whole = "".join(c for c, size, own in zip(spec.letters, x.shape, spec.shape, strict=True) if size == own)
    odd = [c for c, size in zip(spec.letters, x.shape, strict=True) if c in kept and c not in whole and size > 1]
    letters = "".join(c for c in whole if c in kept)
    if odd or (letters.replace("L", "") and "L" not in whole):
        raise ConfigError(
            f"shrink: {_of(path, x)} shares entries along {'/'.join(odd) or 'L'} of its parameter {spec.letters} {spec.shape}, and the cut would "
            "regroup them; expected dims of the parameter's size or 1. Quantize anew after shrinking."
        )
    return letters


def _of(path: Any, x: Any) -> str:
    return f"state '{jax.tree_util.keystr(path)}' {tuple(x.shape)}"


def _aligned(index: np.ndarray, letter: str, letters: str) -> np.ndarray:
    """[L, n] (n of `letter`, or 1) as indices or multipliers that broadcast against an array of these letters."""
    sizes = {letter: index.shape[1], "L": index.shape[0]}
    return index.reshape([sizes.get(c, 1) for c in letters])


def masked(cfg: ModelConfig, plan: Plan) -> dict[str, Any]:
    """The plan as 0/1 multipliers of the big model, a tree of the parameters it touches, in shapes that broadcast against them.

    Everything of a dropped layer is zero, so the layer adds nothing to the residual stream: the identity. Queries and keys that are normalized over all
    heads at once (`qk_norm="width"`) are the exception: a model without some heads has the mean of those it has, one with zeros the mean of all.
    """
    kept, sizes = plan.kept, cfg.sizes
    layers = kept.get("L", np.arange(cfg.layers))
    ones = {"L": np.isin(np.arange(cfg.layers), layers).astype(np.float32)[:, None]}
    for letter in [c for c in kept if c != "L"]:
        ones[letter] = np.zeros((cfg.layers, sizes[letter]), np.float32)
        ones[letter][layers[:, None], kept[letter]] = 1.0
    masks: dict[str, Any] = {}
    for path, spec in flatten(param_specs(cfg)).items():
        factors = [_aligned(ones[c], c, spec.letters) for c in spec.letters if c in kept]
        if factors:
            masks[path] = jnp.asarray(np.prod(np.broadcast_arrays(*factors), axis=0))
    return unflatten(masks)


def apply_masks(tree: Any, masks: Any) -> Any:
    """Parameters (or gradients) with what the plan cuts set to zero."""
    own = flatten(select(tree, flatten(masks)))
    return merge(tree, unflatten({path: own[path] * m.astype(own[path].dtype) for path, m in flatten(masks).items()}))


def describe(plan: Plan, cfg: ModelConfig) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, dropped) of a plan, for the terminal and the report; layers by their index in the big model."""
    new = smaller(cfg, plan)
    layers = plan.layers if plan.layers is not None else np.arange(cfg.layers)
    rows = [_layers_row(cfg, layers)] if plan.layers is not None else []
    tables = {"ffn neurons": (plan.neurons, cfg.ffn), "kv heads": (plan.groups, cfg.kv_heads)}
    for what, (index, size) in {**tables, "query heads": (plan.heads, cfg.heads)}.items():
        if index is not None:
            lost = [f"layer {at}: {_runs(np.setdiff1d(np.arange(size), row))}" for at, row in zip(layers, index)]
            rows.append((what, str(size), str(index.shape[-1]), "; ".join(lost)))
    before, after = count(param_specs(cfg)), count(param_specs(new))
    rows.append(("parameters", f"{before:,}", f"{after:,}", f"{1 - after / before:.1%} fewer"))
    return rows


def _layers_row(cfg: ModelConfig, layers: np.ndarray) -> tuple[str, str, str, str]:
    lost = np.setdiff1d(np.arange(cfg.layers), layers)
    return "layers", str(cfg.layers), str(len(layers)), _runs(lost)


def _runs(numbers: np.ndarray) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run))
