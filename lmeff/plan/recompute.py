"""What a backward pass computes again, from the traced gradient of a block: with its remat policy, less without one.

The policy is the model's own (`models.remat`), applied by JAX; nothing is said here about what it keeps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmeff.core.batch import Batch
from lmeff.core.exchange import ALONE, ExpertLayer, Routed
from lmeff.core.grouped import FORMS as GROUPED
from lmeff.core.ops import Ops, Products, make_ops, plain_einsum
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import map_with_path
from lmeff.models.attention import FORMS, blocked, form_of
from lmeff.models.config import ModelConfig
from lmeff.models.mask import Mask
from lmeff.models.remat import parse, wrapper
from lmeff.models.transformer import block, param_specs, sites
from lmeff.plan.jaxprs import named, product_flops, total, traced


class Again(NamedTuple):
    """What one layer computes again for one row.

    products:  FLOPs of products of activations and weights. attention: how often attention's forward pass runs once more.
    """

    products: float
    attention: float


@functools.lru_cache(maxsize=1024)
def again(cfg: ModelConfig, remat: str, tokens: int, dtype: Any) -> Again:
    """Of a layer under a remat policy, which is no budget; expert buffers without a capacity count their real rows."""
    if parse(remat, sites(cfg)).kind == "none":
        return Again(0.0, 0.0)
    rerun, plain = _ran(cfg, remat, tokens, dtype), _ran(cfg, "none", tokens, dtype)
    return Again(rerun.products - plain.products, rerun.attention / plain.attention - 1)


@functools.lru_cache(maxsize=1024)
def _ran(cfg: ModelConfig, remat: str, tokens: int, dtype: Any) -> Again:
    """The same of all that runs in a layer's forward and backward pass, attention in turns of its loop."""
    program = _gradient(cfg, remat, tokens, dtype)
    active = tokens * cfg.moe.top_k if cfg.moe is not None else 0
    return Again(total(program, product_flops(active)), total(program, named(MARK)))


@functools.cache
def attention_backward(platform: str, tokens: int, heads: int, kv_heads: int, width: int, mixed: bool = False) -> float:
    """FLOPs of attention's backward pass over those of its forward pass, counted in the kernel of these local shapes.

    A backward pass that keeps no scores makes them again: 5 products where the forward pass has 2. The TPU's kernel has two backward passes, one for
    queries and one for keys and values, and each makes them: 7. Where some layers have a window and others not (`mixed`) it runs its forward pass again: 9.
    """
    form = form_of(platform, (1, tokens, heads, width), (1, tokens, kv_heads, width))
    return _ratio(form) + (form == "splash" and mixed)


@functools.cache
def _ratio(form: str) -> float:
    """Of one tile of the form against itself: tiles are alike."""
    shape = jax.ShapeDtypeStruct((1, TILE[form], 1, 128), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, TILE[form]), jnp.int32)

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return FORMS[form](q, k, v, ids, Mask(None, None))

    def gradient(q: Any, k: Any, v: Any, ids: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)
        return out, pull(out)

    first, both = (total(traced(fn, shape, shape, shape, ids), product_flops()) for fn in (forward, gradient))
    return round(both / first - 1, 1)  # what sums outputs times their gradients is no part of a tile


def _gradient(cfg: ModelConfig, remat: str, tokens: int, dtype: Any) -> Any:
    """The program of a layer's output and both its gradients, for one row."""
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    x = jax.ShapeDtypeStruct((1, tokens, cfg.width), dtype)
    p = map_with_path(functools.partial(_layer, dtype), param_specs(cfg)["blocks"])

    def run(x: Any, p: Any, ids: Any) -> Any:
        batch = Batch(ids, ids, ids, ids, jnp.ones(ids.shape, jnp.float32))
        step = wrapper(parse(remat, sites(cfg)))(lambda x, p: block(x, p, batch, cfg, _ops(), 0))
        out, pull = jax.vjp(step, x, p)
        return out, pull(out)

    return traced(run, x, p, ids)


def _layer(dtype: Any, path: str, spec: ParamSpec) -> Any:
    return jax.ShapeDtypeStruct(spec.shape[1:], dtype)


def _ops() -> Ops:
    """The model's seam, but for an attention that only keeps what the real ones keep, and products of groups in the form whose rows can be counted."""

    def grouped(equation: str, x: Any, w: Any, rows: Any, *, site: str) -> jax.Array:
        return checkpoint_name(GROUPED["tpu"](equation, x, w, rows), "product")

    def experts(layer: ExpertLayer, x_BTD: Any, batch: Batch, weights: Any, *, reveal: bool = False) -> Routed:
        return layer.run(x_BTD, batch, weights, Products(plain_einsum, grouped), ALONE, reveal)

    def attend(q: Any, k: Any, v: Any, segments: Any, *, full: Any, **seen: Any) -> jax.Array:
        return _attend(q, k, v, segments, Mask(**seen))

    return make_ops(attend=attend)({}).ops._replace(experts=experts)


def _marked(q_TGC: Any, k_SC: Any, v_SC: Any, segments_T: Any, mask: Mask) -> Any:
    """Output and log-sum-exp as attention has them, made of all it is given."""
    o_TGC = checkpoint_name(q_TGC.astype(jnp.float32) + (k_SC + v_SC)[:, None].astype(jnp.float32), MARK)
    return o_TGC, o_TGC[..., 0]


def _pulled(q: Any, k: Any, v: Any, segments: Any, o: Any, lse: Any, g: Any, mask: Mask) -> Any:
    """Gradients made of all that the backward pass of attention reads."""
    d_q = (q + o + g).astype(jnp.float32) + lse[..., None]
    return d_q, (k + v).astype(jnp.float32) + d_q.sum(1), (k + v).astype(jnp.float32) + d_q.sum(1)


MARK = "attention ran"
TILE = {"panels": 64, "tiles": 256, "splash": 128}
_attend = blocked(_marked, _pulled, 1)
