"""The compiled programs of inference: a prompt into a cache, and new tokens after it.

Programs are compiled once for each model, mesh, cache and shape: prompts are padded to a few widths, and all rows step together. The cache is donated:
a step writes to it in place, and whoever held the old one holds nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError, UsageError
from lmeff.core.ops import Numerics
from lmeff.core.precision import Policy
from lmeff.infer.served import Served
from lmeff.models.cache import Cache, CacheFormat, cache_letters, cache_specs, empty_cache
from lmeff.models.config import ModelConfig
from lmeff.models.legal import check_context
from lmeff.models.transformer import Output, forward, param_specs, project
from lmeff.parallel.mesh import BATCH_AXES, Layout, indivisible
from lmeff.parallel.packed import stored_for
from lmeff.parallel.seam import layout_ops

ROOM = 128  # what caches of generation are rounded up to, in tokens
SHORTEST = 16  # the smallest width that prompts are padded to; the others are its doubles


class Program(NamedTuple):
    """All that a compiled program depends on besides its arguments' shapes; hashable.

    length: tokens that a row's cache has room for. chunk: tokens that may come at once after the prompt.
    """

    cfg: ModelConfig
    numerics: Numerics
    layout: Layout
    policy: Policy
    format: CacheFormat
    length: int
    chunk: int


class Engine(NamedTuple):
    """A served model with programs for so many rows, each with room for so many tokens.

    prefill: `(tokens_BT, lengths_B) -> (logits_BV, cache)`: prompts, padded on the right, and the logits after each row's last token. A row may have none.
    decode:  `(cache, tokens_B) -> (logits_BV, cache)`: one more token a row. The cache that is given is donated.
    extend:  `(cache, tokens_BT, counts_B) -> (logits_BTV, cache)`: up to `chunk` more tokens, of which each row takes its first `counts`.
    """

    prefill: Callable[[Any, Any], tuple[jax.Array, Cache]]
    decode: Callable[[Cache, Any], tuple[jax.Array, Cache]]
    extend: Callable[[Cache, Any, Any], tuple[jax.Array, Cache]]
    served: Served
    program: Program
    batch: int

    @property
    def weights(self) -> tuple[Any, Any]:
        """What the programs below take as such: parameters, and ranges of activations."""
        return self.served.params, self.served.ranges

    @property
    def length(self) -> int:
        """Tokens that a row has room for."""
        return self.program.length

    @property
    def specs(self) -> Cache:
        """Shapes, dtypes and shardings of the cache that `decode` takes."""
        specs = dataclasses.replace(specs_of(self.program, self.batch), fresh=False)
        leaves, structure = jax.tree.flatten(specs)
        letters = jax.tree.leaves(cache_letters(specs))
        layout = self.program.layout
        return structure.unflatten(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(own, x.shape))
            for x, own in zip(leaves, letters, strict=True)
        )


def make_engine(served: Served, *, batch: int, length: int, cache: CacheFormat, chunk: int = 1) -> Engine:
    """Programs for `batch` rows of at most `length` tokens, prompt and all; nothing is compiled yet.

    Experts take all tokens that choose them, whatever `model.moe.capacity` says: it is a part of a row's length, and a row that grows has none. Rotary scalings
    that look at the row's length ("dynamic", "longrope") turn each key by what it was when the key came, as Hugging Face's caches do.
    Raises `ConfigError` for meshes that cut layers or rows or do not divide the model, batches that do not divide, and rows beyond its positions.
    """
    check_engine(served, batch, length)
    cfg = served.cfg
    if cfg.moe is not None:
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, capacity=None))
    program = Program(cfg, served.numerics, served.layout, served.policy, cache, length, chunk)
    specs_of(program, batch)  # refuses chunks that the format does not take
    served = dataclasses.replace(served, params=stored_for(served.layout, served.params))
    weights = (served.params, served.ranges)

    def prefill_prompts(tokens_BT: Any, lengths_B: Any) -> tuple[jax.Array, Cache]:
        tokens_BT, lengths_B = np.asarray(tokens_BT, np.int32), np.asarray(lengths_B, np.int32)
        if tokens_BT.shape[0] != batch or lengths_B.shape != (batch,) or lengths_B.max() > tokens_BT.shape[1]:
            raise UsageError(
                f"prefill: got tokens {list(tokens_BT.shape)} and lengths {lengths_B.tolist()}, expected {batch} rows, none longer than its tokens"
            )
        return prefill(program, weights, padded(tokens_BT, length), lengths_B)

    return Engine(
        prefill=prefill_prompts,
        decode=functools.partial(decode, program, weights),
        extend=functools.partial(extend, program, weights),
        served=served,
        program=program,
        batch=batch,
    )


def check_engine(served: Served, batch: int, length: int) -> None:
    """Refuses what no program is made for."""
    layout, cfg = served.layout, served.cfg
    for axis in ("pipe", "context"):
        if layout.mesh.shape[axis] > 1:
            raise ConfigError(
                f"mesh.{axis}: got {layout.mesh.shape[axis]} for inference, expected 1: rows and heads are cut, layers and tokens of a row are not. "
                "Use data, fsdp, expert and tensor."
            )
    if problems := indivisible(param_specs(cfg), dict(layout.mesh.shape)):
        raise ConfigError(
            f"mesh: got {layout.describe()}, which does not divide {', '.join(problems)}; expected divisors. Change the degrees of the mesh."
        )
    rows = layout.size(BATCH_AXES)
    if batch < 1 or batch % rows:
        raise ConfigError(f"batch: got {batch} rows, expected a multiple of {rows}, the devices that rows are cut over")
    if length < 1:
        raise ConfigError(f"length: got rows of {length} tokens, expected at least 1")
    check_context(cfg, length, "prompt and max_tokens")


def check_prompts(cfg: ModelConfig, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
    """Refuses prompts that the model cannot continue."""
    if max_tokens < 1:
        raise UsageError(f"max_tokens: got {max_tokens}, expected at least 1")
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(
                f"prompt {i}: got an array of {ids.dtype} {list(ids.shape)}, expected ids [N] of at least one token; begin with tokenizer.bos"
            )
        if ids.min() < 0 or ids.max() >= cfg.vocab:
            raise UsageError(
                f"prompt {i}: got ids from {ids.min()} to {ids.max()}, expected 0 to {cfg.vocab - 1}, the model's vocabulary; is it the model's tokenizer?"
            )


def rows_for(layout: Layout, rows: int) -> int:
    """So many rows or a few more, so that they divide over the mesh."""
    parts = layout.size(BATCH_AXES)
    return -(-rows // parts) * parts


def length_for(cfg: ModelConfig, tokens: int) -> int:
    """So many tokens or a few more, so that rows of about the same length share programs; not more than the model has positions."""
    rounded = -(-tokens // ROOM) * ROOM
    return max(tokens, rounded if cfg.context is None else min(rounded, cfg.context))


def padded(tokens_BT: np.ndarray, length: int) -> np.ndarray:
    """Prompts in one of few widths, so that few programs are compiled: 16, 32, 64, ..., at most the cache's length."""
    if tokens_BT.shape[1] > length:
        raise UsageError(
            f"prompt: got {tokens_BT.shape[1]} tokens, expected at most {length}, what the cache has room for"
        )
    width = min(max(SHORTEST, 1 << (tokens_BT.shape[1] - 1).bit_length()), length)
    return np.pad(tokens_BT, [(0, 0), (0, width - tokens_BT.shape[1])])


def specs_of(program: Program, batch: int) -> Cache:
    """Shapes and dtypes of the cache of so many rows."""
    return cache_specs(program.cfg, program.format, rows=batch, tokens=program.length, chunk=program.chunk)


def on_mesh(cache: Cache, layout: Layout) -> Cache:
    """The cache as it lies on the mesh."""
    leaves, structure = jax.tree.flatten(cache)
    letters = jax.tree.leaves(cache_letters(cache))
    return structure.unflatten([layout.place(x, own) for x, own in zip(leaves, letters, strict=True)])


# ---- programs: pure functions of (weights, arrays)


def run(
    program: Program, weights: Any, cache: Cache, tokens_BT: jax.Array, counts_B: jax.Array
) -> tuple[Output, Cache]:
    """The next tokens of each row, its first `counts` of them, through the model."""
    params, ranges = weights
    offsets_T = jnp.arange(tokens_BT.shape[1])
    segments_BT = (offsets_T < counts_B[:, None]).astype(jnp.int32)
    positions_BT = cache.length_B[:, None] + offsets_T
    place = program.layout.place
    fields = (place(x, "BS") for x in (tokens_BT, tokens_BT, segments_BT, positions_BT))
    batch = Batch(*fields, weights=jnp.zeros(tokens_BT.shape, jnp.float32))
    out = forward(
        params,
        batch,
        program.cfg,
        make_ops=layout_ops(program.layout, program.numerics),
        ranges=ranges,
        compute_dtype=program.policy.compute,
        output_dtype=program.policy.output,
        cache=cache,
    )
    assert out.cache is not None
    return out, on_mesh(out.cache, program.layout)


def logits_of(program: Program, out: Output, hidden_ND: jax.Array) -> jax.Array:
    """Logits [N, V] in float32, the vocabulary whole on every device."""
    ops = layout_ops(program.layout, program.numerics)(out.ranges).ops
    return program.layout.place(project(hidden_ND, out.head, program.cfg, ops), "B_")


@functools.partial(jax.jit, static_argnums=0)
def prefill(program: Program, weights: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, Cache]:
    """`Engine.prefill`."""
    cache = on_mesh(empty_cache(specs_of(program, tokens_BT.shape[0])), program.layout)
    out, cache = run(program, weights, cache, tokens_BT, lengths_B)
    last_B = jnp.maximum(lengths_B - 1, 0)
    hidden_BD = jnp.take_along_axis(out.hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    return logits_of(program, out, hidden_BD), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(program: Program, weights: Any, cache: Cache, tokens_B: jax.Array) -> tuple[jax.Array, Cache]:
    """`Engine.decode`."""
    tokens_B = jnp.asarray(tokens_B, jnp.int32)
    out, cache = run(program, weights, cache, tokens_B[:, None], jnp.ones_like(tokens_B))
    return logits_of(program, out, out.hidden_BTD[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(
    program: Program, weights: Any, cache: Cache, tokens_BT: jax.Array, counts_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """`Engine.extend`."""
    out, cache = run(program, weights, cache, tokens_BT, counts_B)
    b, t, d = out.hidden_BTD.shape
    logits_NV = logits_of(program, out, out.hidden_BTD.reshape(b * t, d))
    return logits_NV.reshape(b, t, -1), cache
