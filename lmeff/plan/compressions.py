"""Recipes of compression, the damage that is expected of them, and what they store and take to decode.

The damage is expected, not measured: published rises of perplexity where weights are rounded, pruned or cut and nothing is trained afterwards (`EXPECTED`,
with sources), added up in nats where a recipe does several things. They are of 7B models; training after compression, which every recipe here does, makes all
of them smaller, and smaller models suffer more. So they give an order to try recipes in, and no promise.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lmeff.compress.config import MATRICES, Prune, Quantize, pruned
from lmeff.compress.shrink import ShrinkConfig
from lmeff.compress.storage import leaf_bits, pruned_bits
from lmeff.core.tree import flatten
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, plan_layout
from lmeff.plan.count import density
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Shape
from lmeff.plan.serving import serving
from lmeff.recipe.artifact import Recipe, abstract_arrays


class Candidate(NamedTuple):
    """A recipe before it is weighed. names: keys of `EXPECTED`."""

    names: tuple[str, ...]
    cfg: ModelConfig
    shrink: ShrinkConfig | None
    transforms: tuple[Prune | Quantize, ...]
    weights: str
    cache: str

    @property
    def nats(self) -> float:
        """Expected damage."""
        return sum(EXPECTED[name].nats for name in self.names)


def recipes(cfg: ModelConfig, caches: tuple[str, ...] = ("bfloat16",)) -> Iterator[Candidate]:
    """Every cut with every pattern, format and cache format that this model can take."""
    for (cut, shrink), pattern, (weights, ends), cache in itertools.product(
        cuts(cfg).items(), PATTERNS, FORMATS, caches
    ):
        smaller = cfg if shrink is None else shrink.apply(cfg)
        prune = PATTERNS[pattern]
        if prune is not None and not _divides(prune, smaller):
            continue
        transforms = (*(() if prune is None else (prune,)), *_quantize(cfg, weights, ends))
        names = (cut, pattern, weights, f"ends {ends}" if ends else "", f"cache {cache}")
        yield Candidate(
            tuple(name for name in names if name in EXPECTED), smaller, shrink, transforms, weights or "bfloat16", cache
        )


def cuts(cfg: ModelConfig) -> dict[str, ShrinkConfig | None]:
    """Smaller shapes of a model: parts of its layers, neurons and key-value heads, neurons in multiples of 128 where it has so many."""
    found: dict[str, ShrinkConfig | None] = {"": None}
    for share in (0.75, 0.5):
        layers = round(cfg.layers * share)
        if 1 <= layers < cfg.layers:
            found[f"layers {share}"] = ShrinkConfig(layers=layers)
        step = 128 if cfg.ffn >= 512 else 8
        ffn = round(cfg.ffn * share / step) * step
        if cfg.moe is None and 1 <= ffn < cfg.ffn:
            found[f"ffn {share}"] = ShrinkConfig(ffn=ffn)
    if cfg.kv_heads > 1 and cfg.kv_heads % 2 == 0:
        found["kv_heads 0.5"] = ShrinkConfig(kv_heads=cfg.kv_heads // 2)
    return found


def _divides(prune: Prune, cfg: ModelConfig) -> bool:
    """Whether an N:M pattern goes into every contracted dim."""
    _, colon, size = prune.pattern.partition(":")
    specs = flatten(param_specs(cfg))
    paths = pruned((prune,), param_specs(cfg))
    return not colon or all(specs[path].shape[specs[path].axes[-1]] % int(size) == 0 for path in paths)


def _quantize(cfg: ModelConfig, weights: str, ends: str) -> tuple[Quantize, ...]:
    """Blocks in one format and, in another, the embedding's table and the head."""
    if not weights:
        return ()
    outer = ((ENDS if not cfg.tied else TABLE, ends),) if ends else ()
    return (Quantize(rules=((MATRICES, weights), *outer, (".*", None))),)


ENDS, TABLE = "embed/table|head/w", "embed/table"


def stored_bytes(recipe: Candidate, dtype: str) -> float:
    """Of the packed artifact: shapes from the very code that packs, zeros of pruned weights as many as the sparsity says."""
    masked = pruned(recipe.transforms, param_specs(recipe.cfg))
    left = density(Shape(cfg=recipe.cfg, recipe=Recipe(transforms=recipe.transforms)))
    formats = tuple(transform for transform in recipe.transforms if isinstance(transform, Quantize))
    stored = 0
    for path, leaf in _packed(recipe.cfg, formats, dtype).items():
        nonzero = math.ceil(left.get(path, 1.0) * math.prod(leaf.shape))
        stored += pruned_bits(leaf, masked[path], nonzero) if path in masked else leaf_bits(leaf)
    return stored / 8


@functools.lru_cache(maxsize=1024)
def _packed(cfg: ModelConfig, formats: tuple[Quantize, ...], dtype: str) -> dict[str, Any]:
    """The leaves of an artifact as shapes; masks change none of them."""
    recipe = Recipe(transforms=formats, packed=True)
    return flatten(abstract_arrays(cfg, recipe, plan_layout(MeshPlan(), 1, "tpu"), jnp.dtype(dtype))["params"])


def decode_ms(recipe: Candidate, chip: Chip, devices: int, batch: int, context: int) -> float:
    """Milliseconds between two tokens."""
    found = serving(
        recipe.cfg, chip, devices=devices, weights=recipe.weights, cache=recipe.cache, batch=batch, context=context
    )
    return found.decode_ms


def code(value: Any) -> str:
    """A config as the Python that makes it, without what is left at its default."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if isinstance(value, tuple):
            return f"({', '.join(map(code, value))}{',' if len(value) == 1 else ''})"
        return repr(value)
    changed = [f for f in dataclasses.fields(value) if not _is_default(f, getattr(value, f.name))]
    inside = ", ".join(f"{f.name}={code(getattr(value, f.name))}" for f in changed)
    return f"{type(value).__name__}({inside})"


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    return field.default is not dataclasses.MISSING and field.default == value


class Damage(NamedTuple):
    """Nats per token that a change is expected to cost without training, and where that is from."""

    nats: float
    source: str


OMNIQUANT = "OmniQuant, table 1, Llama-2-7B, rounding alone: https://arxiv.org/abs/2308.13137"
WANDA = "Wanda's README, Llama-2-7B, magnitude: https://github.com/locuslab/wanda"
ORDER = "no published number; an assumption that sets its place in the order"
PATTERNS: dict[str, Prune | None] = {
    "": None,
    "unstructured 0.5": Prune(sparsity=0.5),
    "4:8": Prune(pattern="4:8"),
    "2:4": Prune(pattern="2:4"),
}
FORMATS = (
    ("", ""), ("int8", ""), ("int8", "int8"), ("int4/g32", ""), ("int4/g32", "int8"), ("int4/g128", ""),
    ("int4/g128", "int8"), ("int4", ""), ("int4", "int8"),
)  # fmt: skip
CACHES = ("bfloat16", "int8", "int4")

# ln of perplexity over that of the dense model. int8: 7.3451 of 7.3315; int4/g128: 5.72 of 5.47; int4: 6.11 of 5.47. Magnitude: 14.89, 16.48 and 54.59 of 5.12.
# Layers: 14.3 at a fifth of the layers, of 5.47; half of them is taken as twice that. Widths: SliceGPT at 20 to 30%, 7.7 to 12.5 of 5.47.
# Formats of less than 4 bits are not here: they take slots of 4 bits in lmeff, and so save nothing. Nor is fp8: of weights with a scale each channel, its 4
# significant bits round more coarsely than int8 does and take as much.
EXPECTED: Mapping[str, Damage] = {
    "int8": Damage(0.002, "torchao, Llama-3.1-8B, int8 by row: https://github.com/pytorch/ao"),
    "ends int8": Damage(0.001, ORDER),
    "cache int8": Damage(0.001, ORDER),
    "int4/g32": Damage(0.030, f"below int4/g128, for finer scales round less; {ORDER}"),
    "int4/g128": Damage(0.045, OMNIQUANT),
    "cache int4": Damage(0.060, ORDER),
    "int4": Damage(0.111, OMNIQUANT),
    "ffn 0.75": Damage(0.40, f"between SliceGPT's 20% and 30%: https://arxiv.org/abs/2401.15024; {ORDER}"),
    "kv_heads 0.5": Damage(0.50, ORDER),
    "layers 0.75": Damage(0.96, "ShortGPT, a fifth of a 7B's layers: https://arxiv.org/abs/2403.03853"),
    "unstructured 0.5": Damage(1.07, WANDA),
    "4:8": Damage(1.17, WANDA),
    "ffn 0.5": Damage(1.50, ORDER),
    "layers 0.5": Damage(1.92, f"twice that of 0.75; {ORDER}"),
    "2:4": Damage(2.37, WANDA),
}
