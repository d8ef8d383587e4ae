"""The model in all its variants: equal to an oracle, causal, blind across documents, and with no dead parameter."""

import dataclasses
import functools
import json
from collections import Counter

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
from lmeff.models.config import PRESETS, ModelConfig, MoE, RopeScaling, preset, read, with_layers
from lmeff.models.transformer import forward, param_specs, project, sites
from tests.models import oracle
from tests.models.families import FAMILIES

T = 12
FIRST = 5  # tokens of the first document; the second has the rest
BASE = {"vocab": 23, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24}
VARIANTS = {
    "grouped": {},
    "multi-head, untied": {"kv_heads": 4, "tied": False},
    "multi-query, geglu": {"kv_heads": 1, "activation": "geglu"},
    "plain gelu, biases, layer norms": {"activation": "gelu", "bias": "all", "norm": "layer", "tied": False},
    "head norms, window": {"qk_norm": "head", "window": 3},
    "softcaps, wide heads": {"logit_softcap": 3.0, "attention_softcap": 2.0, "head_width": 6},
    "experts": {"moe": MoE(experts=4, top_k=2, shared=1)},
    "experts, softmax over all, plain": {"moe": MoE(experts=3, top_k=2, normalize=False), "activation": "gelu"},
    "linear scaling": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "dynamic scaling": {"rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original=6)},
    "yarn": {"head_width": 8, "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original=256, beta_fast=8.0)},
    "yarn, own amplitude, whole bounds off": {
        "head_width": 8,
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original=256, attention=1.3, truncate=False),
    },
    "width norms that keep the difference to 1": {"qk_norm": "width", "norm_plus_one": True},
    "biases of all of attention, scaled scores": {"bias": "attention", "attention_scale": 0.2},
    "windows apart, one theta": {"layers": 3, "window": 3, "full_layers": (1,)},
    "every layer local": {"window": 4, "rope_local_theta": 50.0, "rope_scaling": RopeScaling(kind="linear", factor=2)},
    "scaling in the layers that see all": {
        "window": 3,
        "full_layers": (1,),
        "rope_local_theta": 100.0,
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original=256),
    },
    "experts, biased queries, norms of both": {
        "moe": MoE(experts=4, top_k=2),
        "bias": "qkv",
        "norm_at": "both",
        "window": 3,
        "full_layers": (0,),
    },
    **FAMILIES,
    "everything": {
        "kv_heads": 1,
        "activation": "geglu",
        "bias": "all",
        "norm": "layer",
        "qk_norm": "head",
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
        def attend(q, k, v, segments, **seen):
            return attention(q, k, v, segments_BT=segments, **seen)

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
    together, hears = (segments[:, None] == segments[None, :]) & (s <= t), np.eye(T, dtype=bool)
    for layer in range(found.cfg.layers):
        window = T if found.cfg.window is None or layer in found.cfg.full_layers else found.cfg.window
        hears = (together & (t - s < window)) @ hears
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
        # A key bias moves all scores of a query alike but for the rotation between positions, so its gradient is small, and nothing without rotation.
        if path.endswith("k_bias") and found.cfg.positions == "learned":
            assert (per_layer < 1e-5).all(), (path, per_layer)
        else:
            assert (per_layer > 1e-6).all(), (path, per_layer)


def test_fields_change_the_tree():
    def paths(**changes):
        return set(flatten(param_specs(ModelConfig(**{**BASE, **changes}))))

    base = paths()
    assert paths(tied=False) - base == {"head/w"}
    assert paths(qk_norm="head") - base == {"blocks/attn/q_norm", "blocks/attn/k_norm"}
    assert paths(bias="qkv") - base == {f"blocks/attn/{name}_bias" for name in "qkv"}
    assert paths(bias="attention") - paths(bias="qkv") == {"blocks/attn/o_bias"}
    assert paths(bias="all") - paths(bias="attention") == {"blocks/mlp/up_bias", "blocks/mlp/down_bias"}
    assert paths(positions="learned", context=8) - base == {"embed/positions"}
    after = {f"blocks/{name}_post_norm/scale" for name in ("attn", "mlp")}
    assert paths(norm_at="both") - base == paths(norm_at="post") - base == after
    assert base - paths(norm_at="post") == {"blocks/attn_norm/scale", "blocks/mlp_norm/scale"}
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
    "model.norm_at: got 'middle'": {"norm_at": "middle"},
    "model.positions: got 'sine'": {"positions": "sine"},
    "model.bias: got True": {"bias": True},
    "model.qk_norm: got 'all'": {"qk_norm": "all"},
    "model.norm_plus_one: got True with model.norm 'layer'": {"norm": "layer", "norm_plus_one": True},
    "model.context: got None": {"positions": "learned"},
    "model.context: got 0": {"context": 0},
    "model.rope_fraction: got 0.5 with": {"positions": "learned", "context": 8, "rope_fraction": 0.5},
    "model.rope_fraction: got 1.5": {"rope_fraction": 1.5},
    "turns 3 channels": {"rope_fraction": 0.75},
    "model.rope_theta: got 1": {"rope_theta": 1},
    "model.rope_local_theta: got 100.0 without": {"rope_local_theta": 100.0},
    r"model.full_layers: got \(0,\) without": {"full_layers": (0,)},
    r"model.full_layers: got \(2,\), expected": {"window": 3, "full_layers": (2,)},
    r"model.full_layers: got \(1, 0\), expected": {"window": 3, "full_layers": (1, 0)},
    "model.full_layers: got all 2": {"window": 3, "full_layers": (0, 1)},
    "model.attention_scale: got 0": {"attention_scale": 0.0},
    "model.embed_scale: got -1": {"embed_scale": -1.0},
    "model.attention_softcap: got 0": {"attention_softcap": 0.0},
    "rope_scaling.short: got 0 divisors, expected 2": {
        "rope_scaling": RopeScaling(kind="longrope", factor=2.0, original=8)
    },
    "'dynamic' for 2 channels": {
        "head_width": 2,
        "rope_scaling": RopeScaling(kind="dynamic", factor=2.0, original=8),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_shapes_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**BASE, **BAD[message]})


def test_bad_names_are_refused():
    with pytest.raises(ConfigError, match="expected one of"):
        preset("huge")


BAD_SCALINGS = {
    "kind: got 'ntk'": {"kind": "ntk"},
    "original: got None": {"kind": "llama3", "factor": 2.0},
    "factor: got 0.5": {"kind": "linear", "factor": 0.5},
    "low: got 4.0 with high = 2.0": {"kind": "llama3", "factor": 2.0, "original": 8, "low": 4.0, "high": 2.0},
    "beta_slow: got 9.0": {"kind": "yarn", "factor": 2.0, "original": 8, "beta_slow": 9.0, "beta_fast": 3.0},
    "attention: got 0": {"kind": "yarn", "factor": 2.0, "original": 8, "attention": 0.0},
    "long: got ": {"kind": "longrope", "factor": 2.0, "original": 8, "short": (1.0,), "long": (0.0,)},
}


@pytest.mark.parametrize("message", BAD_SCALINGS)
def test_bad_scalings_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**BAD_SCALINGS[message])


def test_rows_longer_than_the_positions_are_refused():
    cfg = ModelConfig(**{**BASE, **FAMILIES["gpt 2"], "context": T - 1})
    make = make_ops(attend=lambda q, *rest, **seen: q)
    params = abstract(param_specs(cfg))
    with pytest.raises(ConfigError, match=r"batch: got 12 tokens a row, expected at most model\.context = 11"):
        jax.eval_shape(lambda p: forward(p, make_batch(), cfg, make_ops=make).hidden_BTD, params)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_is_read_back_from_json(variant):
    cfg = ModelConfig(**{**BASE, **VARIANTS[variant]})
    assert read(json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


@pytest.mark.parametrize(("bias", "qk_norm"), [(False, False), (True, True)])
def test_a_config_is_read_from_when_biases_and_norms_were_on_or_off(bias, qk_norm):
    old = {**BASE, "bias": bias, "qk_norm": qk_norm}
    assert read(old) == ModelConfig(**BASE, bias="all" if bias else "none", qk_norm="head" if qk_norm else None)


def test_dropped_layers_leave_the_others_as_they_were():
    cfg = ModelConfig(**{**BASE, "layers": 6, "window": 4, "full_layers": (1, 3, 5), "rope_local_theta": 100.0})
    assert with_layers(cfg, [0, 3, 4, 5]).full_layers == (1, 3)
    assert with_layers(cfg, [0, 2]) == dataclasses.replace(cfg, layers=2, full_layers=())
    alike = with_layers(cfg, [1, 5])
    assert (alike.layers, alike.window, alike.full_layers, alike.rope_local_theta) == (2, None, (), None)


def loops(**changes):
    """The loops over layers of a gradient, forward and backward."""
    cfg = ModelConfig(**{**BASE, "layers": 3, "window": 3, **changes})

    def loss(params, batch):
        make = make_ops(attend=lambda q, k, v, segments, **seen: attention(q, k, v, segments_BT=segments, **seen))
        return forward(params, batch, cfg, make_ops=make).hidden_BTD.sum()

    traced = jax.make_jaxpr(jax.grad(loss))(abstract(param_specs(cfg)), make_batch())
    return [eqn for eqn in traced.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == cfg.layers]


def test_a_plain_model_computes_nothing_of_what_it_does_not_have():
    """Of one layer forward: two norms; nothing is chosen, looked up, or measured of documents."""
    names = Counter(eqn.primitive.name for eqn in loops(window=None)[0].params["jaxpr"].eqns)
    none = ("cond", "select_n", "gather", "scatter_max")
    assert {name: names[name] for name in ("rsqrt", *none)} == {"rsqrt": 2, **dict.fromkeys(none, 0)}
    everything = Counter(
        eqn.primitive.name for eqn in loops(full_layers=(1,), norm_at="both", qk_norm="width")[0].params["jaxpr"].eqns
    )
    assert (everything["rsqrt"], everything["cond"]) == (6, 1)


def test_layers_that_differ_choose_inside_attention_and_keep_nothing_twice():
    def choices(loop):
        return sum(eqn.primitive.name == "cond" for eqn in loop.params["jaxpr"].eqns)

    def kept(loop):
        return sum(v.aval.size for v in loop.outvars if v.aval.dtype == jnp.float32)

    alike, mixed = loops(), loops(full_layers=(1,))
    assert [choices(loop) for loop in alike] == [0, 0]
    assert [choices(loop) for loop in mixed] == [1, 1]
    assert kept(mixed[0]) == kept(alike[0])
