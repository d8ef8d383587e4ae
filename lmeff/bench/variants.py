"""One model in several formats, as texts: WEIGHTS[+table][@CACHE], such as "f32", "int8", "int4/g32+table" or "bf16@int8"."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmeff.core.errors import UsageError
from lmeff.core.numerics import is_qtensor, parse_format
from lmeff.core.precision import DTYPES
from lmeff.core.specs import initialize
from lmeff.core.tree import Tree, flatten, map_with_path
from lmeff.infer.packing import SERVED, pack_leaf
from lmeff.infer.served import Served
from lmeff.models.cache import CacheFormat, parse_cache
from lmeff.models.transformer import cast_floating, param_specs
from lmeff.parallel.mesh import Layout, shardings

TABLE = "embed/table"


class Variant(NamedTuple):
    """What is run: a model, and in which numbers its keys and values are kept."""

    served: Served
    cache: CacheFormat


def make_variants(served: Served, formats: Sequence[str]) -> dict[str, Variant]:
    """The model in each format, by its text.

    A float ("f32", "bf16") is the dtype of weights and arithmetic. A packed format leaves arithmetic and all other weights as `served` has them, and packs the
    matrices of the blocks and an untied head; "+table" packs a tied table, too, which is the head. "@" says how keys and values are kept; without it
    they are in float32 under arithmetic in float32, else in bfloat16.
    Raises `UsageError` for a text that is none of these, or for weights that are packed already.
    """
    if twice := sorted({text for text in formats if list(formats).count(text) > 1}):
        raise UsageError(f"formats: {', '.join(twice)} is given twice, expected each once")
    return {text: make_variant(served, text) for text in formats}


def make_variant(served: Served, text: str) -> Variant:
    """The model in one format."""
    match = re.fullmatch(r"([^+@]+)(\+table)?(?:@(.+))?", text)
    if match is None:
        raise UsageError(
            f"formats: got '{text}', expected WEIGHTS[+table][@CACHE], such as f32, int8, int4/g32+table or bf16@int8"
        )
    weights, table, cache = match.groups()
    if any(is_qtensor(leaf) for leaf in flatten(served.params).values()):
        raise UsageError(f"formats: got '{text}' for weights that are packed already, expected a model in floats")
    if weights in DTYPES:
        if table:
            raise UsageError(f"formats: got '{text}', expected +table behind a packed format alone")
        made = in_dtype(served, DTYPES[weights])
    else:
        made = in_format(served, weights, table=bool(table))
    plain = CacheFormat(numbers="float32" if made.policy.compute == jnp.float32 else "bfloat16")
    kept = parse_cache(cache) if cache else plain
    return Variant(made, kept)


def in_dtype(served: Served, dtype: Any) -> Served:
    """Weights and arithmetic in a float; the last hidden state, too."""
    policy = dataclasses.replace(served.policy, params=dtype, compute=dtype, output=dtype)
    return dataclasses.replace(served, params=jax.jit(lambda p: cast_floating(p, dtype))(served.params), policy=policy)


def in_format(served: Served, text: str, *, table: bool = False) -> Served:
    """Matrices packed in a format, leaf by leaf and placed as the layout cuts them."""
    format, specs = parse_format(text), param_specs(served.cfg)
    table = table and served.cfg.tied

    def leaf(path: str, w: Any, spec: Any) -> Any:
        packs = re.fullmatch(SERVED, path) or (table and path == TABLE)
        return pack_leaf(path, w, spec, format, served.layout) if packs else w

    return dataclasses.replace(served, params=map_with_path(leaf, served.params, specs))


def random_model(cfg: Any, layout: Layout, policy: Any, seed: int = 0) -> Served:
    """Random weights of a config: what a benchmark of speed needs of a model that is nowhere."""
    specs = param_specs(cfg)

    def make(key: jax.Array) -> Tree:
        return initialize(key, specs, policy.params)

    key = jax.random.key(seed)
    params = jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), specs, layout))(key)
    return Served(cfg=cfg, params=params, layout=layout, policy=policy)
