"""Running several layers in one turn of the scan changes nothing but the time."""

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.core.batch import Batch
from lmeff.core.ops import make_ops
from lmeff.core.specs import initialize
from lmeff.models import transformer
from lmeff.models.attention import attention
from lmeff.models.config import preset


def test_several_layers_in_a_turn_give_the_same_values_and_gradients(monkeypatch):
    cfg = preset("tiny", layers=3)
    params = initialize(jax.random.key(0), transformer.param_specs(cfg))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, tokens, ones, jnp.cumsum(ones, axis=1) - 1, ones.astype(jnp.float32))

    def attend(q, k, v, segments, **options):
        return attention(q, k, v, segments_BT=segments, **options)

    def loss(params):
        return jnp.sin(transformer.forward(params, batch, cfg, make_ops=make_ops(attend=attend)).hidden_BTD).sum()

    def run(layers):
        monkeypatch.setattr(transformer, "layers_at_once", lambda cfg, remat: layers)
        return jax.jit(jax.value_and_grad(loss))(params)

    one_by_one = run(1)
    for layers in (2, 3):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), run(layers), one_by_one)


def test_only_a_single_cpu_device_without_rematerialisation_takes_several(monkeypatch):
    cfg = preset("tiny", layers=12)
    assert transformer.layers_at_once(cfg, "none") == 1  # eight simulated devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert transformer.layers_at_once(cfg, "none") == transformer.UNROLLED
    assert transformer.layers_at_once(cfg, "full") == 1
    assert transformer.layers_at_once(preset("tiny"), "none") == 2
