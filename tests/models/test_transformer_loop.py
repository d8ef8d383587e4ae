"""Running several layers in one turn of the scan changes nothing but the time."""

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.ops import make_ops
from lmeff.core.specs import initialize
from lmeff.models.attention import attention
from lmeff.models.config import preset
from lmeff.models.transformer import forward, param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout


def test_several_layers_in_a_turn_give_the_same_values_and_gradients():
    cfg = preset("tiny", layers=3)
    params = initialize(jax.random.key(0), param_specs(cfg))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, tokens, ones, jnp.cumsum(ones, axis=1) - 1, ones.astype(jnp.float32))

    def attend(q, k, v, segments, **options):
        return attention(q, k, v, segments_BT=segments, **options)

    def run(layers):
        def loss(params):
            out = forward(params, batch, cfg, make_ops=make_ops(attend=attend), unroll=layers)
            return jnp.sin(out.hidden_BTD).sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    one_by_one = run(1)
    for layers in (2, 8):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), run(layers), one_by_one)


def test_only_a_single_cpu_device_without_rematerialisation_takes_several():
    alone = make_layout(MeshPlan(), jax.devices()[:1])
    assert alone.layers_at_once("none") == 8
    assert alone.layers_at_once("full") == 1
    assert make_layout(MeshPlan()).layers_at_once("none") == 1
