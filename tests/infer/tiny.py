"""Small models to serve, and their logits from one plain forward pass over the whole row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.numerics import parse_format, quantize
from lmeff.core.precision import Policy
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import map_with_path
from lmeff.infer.served import Served
from lmeff.models.config import ModelConfig, MoE, preset
from lmeff.models.transformer import forward, param_specs, project
from lmeff.parallel.mesh import MeshPlan, make_layout, shardings
from lmeff.parallel.seam import layout_ops

PLAIN = preset("tiny", kv_heads=4)
MODELS: dict[str, ModelConfig] = {
    "plain": PLAIN,
    "gqa-untied": preset("tiny", tied=False),
    "window": preset("tiny", window=4, attention_softcap=2.0, logit_softcap=3.0),
    "moe": preset("moe_tiny", moe=MoE(experts=4, top_k=2, shared=1)),
    "gpt2": preset(
        "tiny",
        positions="learned",
        context=32,
        norm="layer",
        activation="gelu",
        bias="all",
        attention_scale=0.3,
        embed_scale=2.0,
    ),
    "gemma": preset("tiny", qk_norm="head", norm_at="both", norm_plus_one=True, rope_fraction=0.5),
    "mixed": preset("tiny", layers=4, window=3, full_layers=(1, 3), rope_local_theta=100.0),
    "uneven": preset("tiny", layers=5, window=3, full_layers=(2,)),
}
MESHES: dict[str, MeshPlan] = {
    "one": MeshPlan(),
    "data4-tensor2": MeshPlan(data=4, tensor=2),
    "fsdp2-data2-tensor2": MeshPlan(fsdp=2, data=2, tensor=2),
    "expert2-data2-tensor2": MeshPlan(expert=2, data=2, tensor=2),
}


@functools.lru_cache
def served(cfg: ModelConfig, mesh: str = "one", seed: int = 0) -> Served:
    """Random weights, norms and biases too, large enough that tokens matter to one another."""
    plan = MESHES[mesh]
    layout = make_layout(plan, jax.devices()[: 1 if mesh == "one" else 8])
    specs, rng = param_specs(cfg), np.random.default_rng(seed)

    def leaf(_: str, spec: ParamSpec) -> np.ndarray:
        middle = {"normal": 0.0, "ones": 1.0, "zeros": 0.0}[spec.init]
        return (middle + (0.2 if spec.is_matmul else 0.1) * rng.normal(size=spec.shape)).astype(np.float32)

    params = map_with_path(leaf, specs)
    params = jax.device_put(params, shardings(params, specs, layout))
    return Served(cfg=cfg, params=params, layout=layout, policy=Policy())


def pack(model: Served, text: str) -> Any:
    """Its parameters with the blocks' matrices as integers."""
    format = parse_format(text)

    def leaf(path: str, spec: ParamSpec, w: jax.Array) -> Any:
        return quantize(w, format, spec.axes) if spec.is_matmul and path.startswith("blocks/") else w

    return jax.jit(lambda params: map_with_path(leaf, param_specs(model.cfg), params))(model.params)


@functools.lru_cache
def rows(vocab: int, count: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens [count, length]."""
    return np.random.default_rng(seed).integers(0, vocab, (count, length)).astype(np.int32)


def full_logits(model: Served, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of whole rows, without a cache, on the model's own layout."""
    ones = np.ones_like(tokens_BT)
    positions = np.arange(tokens_BT.shape[1]) * ones
    batch = Batch(tokens_BT, tokens_BT, ones, positions, np.zeros(tokens_BT.shape, np.float32))
    batch = jax.device_put(batch, model.layout.sharding("BS", tokens_BT.shape))

    @jax.jit
    def run(params, batch):
        make = layout_ops(model.layout, model.numerics)
        out = forward(params, batch, model.cfg, make_ops=make, ranges=model.ranges, compute_dtype=jnp.float32)
        return project(out.hidden_BTD, out.head, model.cfg, make(out.ranges).ops)

    return np.asarray(run(model.params, batch))
