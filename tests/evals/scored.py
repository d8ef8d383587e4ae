"""A tiny model of random weights with large logits, its scorer, and its log-probabilities in NumPy float64."""

import functools

import jax
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.numerics import materialize, parse_format, quantize
from lmeff.core.precision import Policy
from lmeff.core.specs import initialize
from lmeff.core.tree import flatten, map_with_path
from lmeff.data.tokenizer import ByteTokenizer
from lmeff.evals.score import make_scorer
from lmeff.infer.served import Served
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout, shardings
from tests.models import oracle

CFG = ModelConfig(vocab=264, width=32, layers=2, heads=4, kv_heads=2, ffn=64)
TOKENIZER = ByteTokenizer()


@functools.cache
def params(cfg=CFG, seed=0):
    """Weights ten times as large as usual: a model with opinions, so that choices and greedy answers differ."""
    made = initialize(jax.random.key(seed), param_specs(cfg))
    return map_with_path(
        lambda path, w: w * 10 if w.ndim > 2 else w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), made
    )


def packed(weights, specs, text):
    """Every matrix in a packed format."""
    return map_with_path(
        lambda path, w, spec: quantize(w, parse_format(text), spec.axes) if spec.is_matmul else w, weights, specs
    )


def make_served(cfg=CFG, *, plan=None, devices=1, weights=None, seed=0, **options):
    """The model on a mesh; `weights` packs its matrices."""
    layout = make_layout(plan or MeshPlan(), jax.devices()[:devices])
    specs = param_specs(cfg)
    pack = jax.jit(lambda made: made if weights is None else packed(made, specs, weights))
    held = pack(params(cfg, seed))
    held = jax.device_put(held, shardings(held, specs, layout))
    return Served(cfg=cfg, params=held, layout=layout, policy=Policy(), **options)


@functools.cache
def plain_scorer(longest=64, seed=0):
    return make_scorer(make_served(seed=seed), rows=4, longest=longest)


HELD = {}


def _held(served):
    """The weights as NumPy arrays by path, made once a model."""
    if id(served) not in HELD:
        made = jax.jit(materialize)(served.params)
        HELD[id(served)] = served, {path: np.asarray(w) for path, w in flatten(made).items()}
    return HELD[id(served)][1]


def log_probabilities(served, ids):
    """Of every next id of one document, [n - 1, V]."""
    held = _held(served)
    row = np.asarray(ids[:-1])[None]
    batch = Batch(row, row, np.ones_like(row), np.arange(row.shape[1])[None], np.ones(row.shape))
    logits = oracle.forward(held, batch, served.cfg)[0]
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def sample(rng, *lengths):
    return [rng.integers(0, CFG.vocab, n).astype(np.int32) for n in lengths]
