"""Tiny models and text for the tests of structured pruning."""

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.tree import map_with_path
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import forward, param_specs, project
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.seam import layout_ops

ONE = make_layout(MeshPlan(), jax.devices()[:1])
SMALL = {"vocab": 32, "width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 24}


def make_model(seed=0, **changes):
    """A config and random weights in which biases and norms are random too, so that none of them can be forgotten unnoticed.

    Made by NumPy: nothing to compile.
    """
    cfg = ModelConfig(**{**SMALL, **changes})
    rng = np.random.default_rng(seed)

    def leaf(_, spec):
        return jnp.asarray((spec.init == "ones") + 0.15 * rng.standard_normal(spec.shape), jnp.float32)

    return cfg, map_with_path(leaf, param_specs(cfg))


def make_batch(seed=0, rows=8, length=16, vocab=32, padding=3):
    """Rows of two documents of learnable text (each token is mostly a function of the last), the last `padding` tokens of each row empty."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, length + 1), np.int32)
    tokens[:, 0] = rng.integers(vocab, size=rows)
    for t in range(length):
        follow = (tokens[:, t] * 5 + 3) % vocab
        tokens[:, t + 1] = np.where(rng.random(rows) < 0.85, follow, rng.integers(vocab, size=rows))
    segments = np.where(np.arange(length) < length // 2, 1, 2)
    segments = np.where(np.arange(length) < length - padding, segments, 0).astype(np.int32)
    positions = (np.arange(length) % (length // 2)).astype(np.int32)
    weights = (segments > 0) & np.append(segments[1:] == segments[:-1], False)
    spread = (np.broadcast_to(x, (rows, length)).copy() for x in (segments, positions, weights.astype(np.float32)))
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), *spread)


def logits(cfg, params, batch):
    make = layout_ops(ONE)

    @jax.jit
    def run(params):
        out = forward(params, jax.tree.map(jnp.asarray, batch), cfg, make_ops=make)
        return project(out.hidden_BTD, out.head, cfg, make({}).ops)

    return np.asarray(run(params))
