"""Evaluation where layers are cut over pipeline stages: one device's numbers, and one layer's memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.numerics import QFormat, quantize
from lmeff.core.precision import Policy
from lmeff.parallel.hlo import collectives
from lmeff.parallel.layers import layer_scan
from lmeff.parallel.mesh import shardings
from lmeff.parallel.rows import place_batch
from lmeff.train.evaluate import make_eval_step
from lmeff.train.runtime import Model
from tests.layouts.trial import MODELS, UNOPTIMIZED, Mesh, make_batch, make_params, param_specs

CFG = MODELS["deep"]


def evaluated(mesh):
    """(nats, compiled step) of the deep model."""
    params = make_params(CFG, 0)
    params = jax.device_put(params, shardings(params, param_specs(CFG), mesh.layout))
    batch = place_batch(make_batch(), mesh.layout)
    step = make_eval_step(Model(CFG), mesh.layout, Policy())
    compiled = step.lower(params, (), None, batch).compile(UNOPTIMIZED)
    return np.asarray(compiled(params, (), None, batch)), compiled


def test_layers_come_one_at_a_time():
    want, _ = evaluated(Mesh())
    got, compiled = evaluated(Mesh(pipe=4, data=2))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    blocks = param_specs(CFG)["blocks"]
    stack = sum(math.prod(spec.shape) for spec in jax.tree.leaves(blocks, is_leaf=lambda x: hasattr(x, "letters")))
    moved = [c for c in collectives(compiled.as_text()) if c.largest >= CFG.width * CFG.ffn]
    assert moved, "no weight moves"
    assert all(c.loop for c in moved)
    assert max(c.largest for c in moved) == CFG.width * CFG.ffn
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"\ntemporary bytes {temporary}; the stack {4 * stack}, a layer {4 * stack // CFG.layers}")
    assert temporary < 4 * stack / 2


@pytest.mark.parametrize("layers", [4, 6])
def test_every_dtype_comes_bit_for_bit(layers):
    """Not only numbers: a NaN keeps its bits, and zero its sign."""
    layout = Mesh(pipe=4, data=2).layout
    w = jax.random.normal(jax.random.key(0), (layers, 16, 8)).at[:, 0, 0].set(-0.0).at[:, 0, 1].set(jnp.nan)
    real = jnp.nan_to_num(w)
    tree = {
        **{dtype: w.astype(dtype) for dtype in ("float32", "bfloat16", "float16")},
        "float8": real.astype(jnp.float8_e5m2),  # XLA itself changes the bits of an 8-bit NaN
        "bool": real > 0,
        "int32": jnp.arange(layers * 3).reshape(layers, 3),
        "int4": quantize(real, QFormat(bits=4, symmetric=False, granularity="group", group=8), (-2,)),
        "fp8": quantize(real, QFormat(kind="float"), (-2,)),
    }
    placed = jax.device_put(tree, layout.sharding("L", (layers,)))

    def copied(layers):
        return layer_scan(layout)(lambda carry, layer: (carry, layer), 0, layers, unroll=1)[1]

    made = jax.jit(copied, compiler_options=UNOPTIMIZED)(placed)
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(tree), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
