"""Five train steps of a tiny model on a mesh, with everything a layout could get wrong recorded."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmeff.compress.activations import Activations
from lmeff.compress.config import MATRICES, Prune, Quantize, build
from lmeff.core.batch import Batch
from lmeff.core.ops import FLOATING
from lmeff.core.precision import Policy
from lmeff.core.specs import initialize
from lmeff.core.tree import map_with_path
from lmeff.distill.objectives import Distill, Projection, head_objective
from lmeff.models.config import ModelConfig, MoE, RopeScaling
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import AXES, MeshPlan, make_layout, shardings
from lmeff.parallel.rows import place_batch
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import create_state
from lmeff.train.step import make_train_step

ROWS, TOKENS, STEPS = 16, 16, 5
UNOPTIMIZED = {"xla_backend_optimization_level": 0}  # of LLVM: half the compile time, the same HLO

MODELS = {
    "grouped": ModelConfig(vocab=96, width=64, layers=2, heads=8, kv_heads=4, ffn=128, tied=False),
    "tied": ModelConfig(vocab=96, width=64, layers=2, heads=8, kv_heads=8, ffn=128, qk_norm="head", logit_softcap=20.0),
    "uneven": ModelConfig(vocab=96, width=32, layers=5, heads=4, kv_heads=2, ffn=64),
    "experts": ModelConfig(vocab=96, width=64, layers=2, heads=4, kv_heads=2, ffn=32, moe=MoE(experts=8, shared=1)),
    "capacity": ModelConfig(
        vocab=96, width=64, layers=2, heads=4, kv_heads=2, ffn=32, moe=MoE(experts=8, capacity=1.0, normalize=False)
    ),
    "four": ModelConfig(vocab=96, width=32, layers=4, heads=4, kv_heads=2, ffn=64),
    "six": ModelConfig(vocab=96, width=32, layers=6, heads=4, kv_heads=4, ffn=64, tied=False),
    "moe": ModelConfig(
        vocab=96, width=32, layers=4, heads=4, kv_heads=2, ffn=32, tied=False, moe=MoE(experts=4, shared=1)
    ),
    # What families combine: windows and thetas by layer, norms on both sides; one RMS over heads that are on several devices; a table of positions.
    "gemma": ModelConfig(
        vocab=96,
        width=32,
        layers=5,
        heads=4,
        kv_heads=2,
        ffn=64,
        activation="geglu",
        norm_plus_one=True,
        norm_at="both",
        qk_norm="head",
        embed_scale=32**0.5,
        window=4,
        full_layers=(1, 4),
        rope_theta=1e5,
        rope_local_theta=1e3,
        rope_scaling=RopeScaling(kind="linear", factor=4.0),
        attention_scale=0.3,
        attention_softcap=20.0,
    ),
    "olmo": ModelConfig(
        vocab=96,
        width=64,
        layers=4,
        heads=4,
        kv_heads=4,
        ffn=64,
        norm_at="post",
        qk_norm="width",
        tied=False,
        window=4,
        full_layers=(0, 3),
    ),
    "gpt": ModelConfig(
        vocab=96,
        width=32,
        layers=4,
        heads=4,
        kv_heads=4,
        ffn=64,
        activation="gelu",
        norm="layer",
        bias="all",
        positions="learned",
        context=32,
        qk_norm="head",  # without it, and without rotation, no score depends on the keys' bias
    ),
    "phi": ModelConfig(
        vocab=96,
        width=64,
        layers=4,
        heads=4,
        kv_heads=2,
        ffn=64,
        bias="qkv",
        rope_fraction=0.5,
        rope_scaling=RopeScaling(
            kind="longrope", factor=8.0, original=6, short=(1.0, 1.2, 1.5, 2.0), long=(2.0, 4.0, 8.0, 9.0)
        ),
    ),
    "deep": ModelConfig(vocab=96, width=32, layers=16, heads=4, kv_heads=4, ffn=128),
}
TEACHER = ModelConfig(vocab=96, width=32, layers=2, heads=8, kv_heads=8, ffn=64, tied=False)
INT8 = Quantize(rules=((MATRICES, "int8"), (".*", None)))
LSQ = Quantize(method="lsq", rules=((MATRICES, "int4/g16"), (".*", None)))


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What is composed with the layout."""

    compress: tuple[Any, ...] = ()
    distill: Distill | None = None
    activations: Activations | None = None


KD = Distill(teacher="teacher", mix=0.7, temperature=2.0)
FEATURES = {
    "plain": Feature(),
    "weights": Feature(compress=(LSQ,)),
    "mask": Feature(compress=(Prune(pattern="2:4"),)),
    "learned": Feature(compress=(Prune(pattern="2:4"), LSQ)),
    "teacher": Feature(distill=KD),
    "all": Feature(compress=(Prune(sparsity=0.5, scope="global"), INT8), distill=KD),
    "activations": Feature(compress=(INT8,), activations=Activations()),
}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A layout and the knobs that must not change results."""

    dcn: int = 1
    data: int = 1
    fsdp: int = 1
    pipe: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 3
    schedule: str = "1f1b"
    chunks: int | None = None
    stash: str = "input"
    sequence: str = "ring"
    accumulate: int = 1
    remat: str = "none"
    model: str = "grouped"

    @property
    def plan(self):
        return MeshPlan(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MeshPlan)})

    @property
    def degrees(self):
        """Of the axes wider than 1."""
        return {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) > 1}

    @property
    def devices(self):
        return math.prod(self.degrees.values())

    @property
    def layout(self):
        return make_layout(self.plan, jax.devices()[: self.devices])


class Trial(NamedTuple):
    """metrics of every step; leaves by path: first gradients, last parameters, the first auxiliary state; shard shapes; the compiled
    step's text and memory. Not the compiled step itself: programs for the CPU take thousands of memory maps each, and a process has 65,530.
    """

    metrics: list[dict[str, float]]
    gradients: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    auxiliary: dict[str, np.ndarray]
    shards: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    text: str
    memory: Any


def make_batch(rows=ROWS, tokens=TOKENS, vocab=96, seed=0):
    """Two documents in every row, cut at a different place in each, some with padding behind."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocab, (rows, tokens), dtype=np.int32)
    segments, positions = np.ones_like(ids), np.tile(np.arange(tokens, dtype=np.int32), (rows, 1))
    for row in range(rows):
        cut = random.integers(3, tokens - 4)
        segments[row, cut:], positions[row, cut:] = 2, np.arange(tokens - cut)
        if row % 3 == 0:
            segments[row, -3:], positions[row, -3:] = 0, 0
    weights = np.zeros((rows, tokens), np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    return Batch(ids, np.where(weights > 0, np.roll(ids, -1, 1), 0), segments, positions, weights)


SHARP = 5.0


def make_params(cfg, seed, sharpness=SHARP):
    """Larger than at the start of training, so that attention is far from uniform and a teacher has opinions."""
    params = initialize(jax.random.key(seed), param_specs(cfg))
    return map_with_path(lambda path, w: w if "norm" in path else w * sharpness, params)


def keep_gradients():
    """An optimizer in front of the real one whose state is the last gradient."""
    return optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None, **extra: (grads, grads)
    )


def make_runtime(mesh, feature_name):
    cfg, layout, feature = MODELS[mesh.model], mesh.layout, FEATURES[feature_name]
    specs, compression = param_specs(cfg), build(feature.compress)
    numerics = feature.activations.resolve(cfg) if feature.activations else FLOATING
    taught = feature.distill is not None
    # Adam divides by the size of each gradient: one that is small beside the rounding of its sum becomes a step of the size of the learning rate
    # in a random direction. What layouts differ by is therefore proportional to the learning rate, and floored by eps.
    optim = OptimConfig(learning_rate=3e-4, schedule="constant", warmup_steps=0, eps=1e-6)
    return Runtime(
        student=Model(cfg, numerics, compression.apply),
        teacher=Model(TEACHER) if taught else None,
        specs=specs,
        compression=compression,
        objective=head_objective(
            Projection(cfg, numerics), Projection(TEACHER) if taught else None, feature.distill, chunk=8
        ),
        tx=optax.chain(keep_gradients(), make_optimizer(optim, STEPS, policy=Policy(), specs=specs)),
        layout=layout,
        policy=Policy(),
        accumulate=mesh.accumulate,
        remat=mesh.remat,
    )


def make_inputs(rt, mesh, rows=ROWS, sharpness=SHARP):
    """A state, a batch and the frozen arrays, all on the mesh."""
    params = make_params(MODELS[mesh.model], 0, sharpness)
    state = create_state(params, rt.specs, rt.compression, rt.tx, rt.layout, ema=False)
    frozen = Frozen()
    if rt.teacher is not None:
        teacher = make_params(TEACHER, 1)
        frozen = Frozen(teacher=jax.device_put(teacher, shardings(teacher, param_specs(TEACHER), rt.layout)))
    return state, place_batch(make_batch(rows), rt.layout), frozen


def compile_step(rt, state, batch, frozen):
    """As `train.loop.compile_step`."""
    out = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_train_step(rt), donate_argnums=0, out_shardings=(out, None))
    return step.lower(state, batch, frozen).compile(UNOPTIMIZED)


@functools.cache
def run(mesh, feature_name):
    """The trial of a mesh with a feature; cached, so that several tests look at one compilation."""
    rt = make_runtime(mesh, feature_name)
    state, batch, frozen = make_inputs(rt, mesh)
    compiled = compile_step(rt, state, batch, frozen)
    auxiliary = leaves(state.auxiliary)
    shards = {path: (x.shape, x.addressable_shards[0].data.shape) for path, x in by_path(state).items()}
    metrics, first = [], {}
    for step in range(STEPS):
        state, values = compiled(state, batch, frozen)
        metrics.append({name: float(value) for name, value in values.items()})
        first = first if step else leaves(state.opt[0])
    return Trial(
        metrics, first, leaves(state.trainable), auxiliary, shards, compiled.as_text(), compiled.memory_analysis()
    )


COMPARED = ("loss", "objective", "kl", "balance", "router_z", "dropped")


def assert_equals_one_device(mesh, feature):
    """Losses, gradients, the compression's state, and the parameters after five steps."""
    got, want = run(mesh, feature), run(Mesh(model=mesh.model), feature)
    keys = want.metrics[0].keys() & set(COMPARED)
    assert {"loss", "objective", *(["kl"] if FEATURES[feature].distill else [])} <= keys
    for key in keys:
        assert abs(got.metrics[0][key] / want.metrics[0][key] - 1) <= 1e-6, key
    assert got.gradients.keys() == want.gradients.keys()
    for path, gradient in want.gradients.items():
        assert np.abs(gradient).max() > 0, path
        assert relative(got.gradients[path], gradient) <= 1e-5, path
    for path, value in want.auxiliary.items():
        assert (got.auxiliary[path] == value).all(), path
    for path, value in want.final.items():
        assert np.abs(got.final[path] - value).max() <= 1e-5, path
    assert want.metrics[-1]["objective"] < want.metrics[0]["objective"]


def by_path(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def leaves(tree):
    """`{path: NumPy array}`."""
    return {path: np.asarray(x) for path, x in by_path(tree).items()}


def relative(got, want):
    """Largest difference, as a part of the largest value."""
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
