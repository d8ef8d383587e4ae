"""The model in all its variants: equal to an oracle, causal, blind across documents, and with no dead parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.core.ops import lookup, make_ops
from lmeff.core.specs import abstract, count, initialize
from lmeff.core.tree import flatten, map_with_path
from lmeff.models.attention import attention
from lmeff.models.config import PRESETS, ModelConfig, MoE, preset
from lmeff.models.transformer import forward, param_specs, project, sites
from tests.models import oracle

T = 12
FIRST = 5  # tokens of the first document; the second has the rest
BASE = {"vocab": 23, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24}
VARIANTS = {
    "grouped": {},
    "multi-head, untied": {"kv_heads": 4, "tied": False},
    "multi-query, geglu": {"kv_heads": 1, "activation": "geglu"},
    "plain gelu, biases, layer norms": {"activation": "gelu", "bias": True, "norm": "layer", "tied": False},
    "head norms, window": {"qk_norm": True, "window": 3},
    "softcaps, wide heads": {"logit_softcap": 3.0, "attention_softcap": 2.0, "head_width": 6},
    "experts": {"moe": MoE(experts=4, top_k=2, shared=1)},
    "experts, softmax over all, plain": {"moe": MoE(experts=3, top_k=2, normalize=False), "activation": "gelu"},
    "everything": {
        "kv_heads": 1,
        "activation": "geglu",
        "bias": True,
        "norm": "layer",
        "qk_norm": True,
        "window": 4,
        "logit_softcap": 5.0,
        "attention_softcap": 4.0,
        "tied": False,
    },
}


def make_batch():
    """Row 0: two documents. Rows 1 and 2: each of them alone, with padding behind."""
    ids = np.random.default_rng(0).integers(0, BASE["vocab"], T, dtype=np.int32)
    tokens, segments, positions = np.zeros((3, 3, T), np.int32)
    documents = (ids[:FIRST], ids[FIRST:])
    start = 0
    for i, document in enumerate(documents):
        n = len(document)
        for row, begin in ((0, start), (i + 1, 0)):
            tokens[row, begin : begin + n] = document
            segments[row, begin : begin + n] = i + 1
            positions[row, begin : begin + n] = np.arange(n)
        start += n
    weights = np.zeros((3, T), np.float32)
    weights[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return Batch(tokens, np.roll(tokens, -1, 1), segments, positions, weights)


def make_params(cfg):
    """Weights of a size at which every nonlinearity bends, and norms and biases off their neutral values."""
    params = initialize(jax.random.key(0), param_specs(cfg))
    noise = initialize(jax.random.key(1), map_with_path(lambda _, spec: _normal(spec), param_specs(cfg)))
    return map_with_path(lambda path, w, n: w + n if "norm" in path or "bias" in path else 15 * w, params, noise)


def _normal(spec):
    return type(spec)(letters=spec.letters, shape=spec.shape, init="normal", scale=0.2)


class Probe:
    """Everything the tests ask of a variant, from one compilation."""

    def __init__(self, cfg):
        self.cfg, self.batch, self.params = cfg, make_batch(), make_params(cfg)
        compiled = jax.jit(self.measure).lower(self.params, self.batch).compile({"xla_backend_optimization_level": 0})
        measured = jax.tree.map(np.asarray, compiled(self.params, self.batch))
        self.logits, self.losses, self.gradients, self.reach = measured

    def logits_of(self, params, batch, nudge):
        def attend(q, k, v, segments, *, window, softcap):
            return attention(q, k, v, segments_BT=segments, window=window, softcap=softcap)

        make = make_ops(attend=attend, embed=lambda table, tokens: lookup(table, tokens) + nudge)
        out = forward(params, batch, self.cfg, make_ops=make)
        return project(out.hidden_BTD, out.head, self.cfg, make({}).ops)

    def measure(self, params, batch):
        nudge = jnp.zeros((3, T, self.cfg.width))

        def loss(params):
            logits = self.logits_of(params, batch, nudge)
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
            return (nll * batch.weights).sum(), (logits, nll)

        gradients, (logits, losses) = jax.grad(loss, has_aux=True)(params)
        _, pull = jax.vjp(lambda nudge: self.logits_of(params, batch, nudge), nudge)
        direction = jax.random.normal(jax.random.key(2), (self.cfg.vocab,))
        outputs = jnp.zeros((T, 3, T, self.cfg.vocab)).at[jnp.arange(T), 0, jnp.arange(T)].set(direction)
        reach = jnp.abs(jax.vmap(lambda g: pull(g)[0])(outputs)).max(-1)
        return logits, losses, gradients, reach


@functools.cache
def probe(variant):
    return Probe(ModelConfig(**{**BASE, **VARIANTS[variant]}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_oracle(variant):
    found = probe(variant)
    want = oracle.forward(flatten(found.params), found.batch, found.cfg)
    real = found.batch.segments > 0
    assert np.abs(want[real]).max() > 0.5
    np.testing.assert_allclose(found.logits[real], want[real], atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_hears_its_own_document_up_to_itself_and_its_window(variant):
    found = probe(variant)
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    segments = found.batch.segments[0]
    hears = (segments[:, None] == segments[None, :]) & (s <= t)
    if found.cfg.window is not None:
        hears &= t - s <= found.cfg.layers * (found.cfg.window - 1)
    assert (found.reach[:, 0][~hears] == 0).all()
    assert (found.reach[:, 0][hears] > 1e-6).all()
    assert (found.reach[:, 1:] == 0).all(), "rows hear each other"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_costs_the_same_alone_and_packed(variant):
    losses = probe(variant).losses
    np.testing.assert_allclose(losses[0, : FIRST - 1], losses[1, : FIRST - 1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses[0, FIRST:-1], losses[2, : T - FIRST - 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_match_their_specs_and_none_is_dead(variant):
    found = probe(variant)
    specs = param_specs(found.cfg)
    assert jax.tree.structure(abstract(specs)) == jax.tree.structure(found.params)
    gradients, params = flatten(found.gradients), flatten(found.params)
    for path, spec in flatten(specs).items():
        assert params[path].shape == spec.shape == tuple(found.cfg.sizes[letter] for letter in spec.letters), path
        assert np.isfinite(gradients[path]).all(), path
        per_layer = np.abs(gradients[path]).reshape(found.cfg.layers if spec.stacked else 1, -1).max(-1)
        # A key bias moves all scores of a query alike but for the rotation between positions, so its gradient is small.
        assert (per_layer > 1e-6).all(), (path, per_layer)


def test_fields_change_the_tree():
    def paths(**changes):
        return set(flatten(param_specs(ModelConfig(**{**BASE, **changes}))))

    base = paths()
    assert paths(tied=False) - base == {"head/w"}
    assert paths(qk_norm=True) - base == {"blocks/attn/q_norm", "blocks/attn/k_norm"}
    assert base - paths(activation="gelu") == {"blocks/mlp/gate"}
    assert paths(norm="layer") - base == {
        f"{name}/bias" for name in ("final_norm", "blocks/attn_norm", "blocks/mlp_norm")
    }
    assert "mlp.gate" not in sites(ModelConfig(activation="gelu"))


def test_published_sizes():
    assert count(param_specs(PRESETS["llama3_8b"])) == 8_030_261_248
    assert count(param_specs(PRESETS["llama3_70b"])) == 70_553_706_496
    assert 120e6 < count(param_specs(PRESETS["125m"])) < 140e6
    assert 1.1e9 < count(param_specs(PRESETS["1b"])) < 1.3e9


BAD = {
    "model.vocab: got 0": {"vocab": 0},
    "divisor of model.heads = 4": {"kv_heads": 3},
    "divisor of model.width = 16": {"heads": 3, "kv_heads": 1},
    "expected an even number": {"head_width": 5},
    "model.norm: got 'batch'": {"norm": "batch"},
    "model.activation: got 'relu'": {"activation": "relu"},
    "model.window: got 0": {"window": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_shapes_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**BASE, **BAD[message]})


def test_bad_names_are_refused():
    with pytest.raises(ConfigError, match="expected one of"):
        preset("huge")
