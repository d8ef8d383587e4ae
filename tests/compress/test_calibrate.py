"""Calibrated ranges are those of the activations that real tokens make, on every mesh; and integer execution with them is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.activations import Activations
from lmeff.compress.base import LeafTransform, only, per_leaf
from lmeff.compress.calibrate import calibrate, extent
from lmeff.core.errors import ConfigError, DataError
from lmeff.core.numerics import dequantize, fake_quantize_min_max, parse_format, quantize
from lmeff.core.ops import Scope, recording
from lmeff.core.tree import flatten, map_with_path
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import forward, param_specs, project, sites
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.seam import layout_ops
from tests.compress.structure import ONE, SMALL, logits, make_batch, make_model

STATIC = Activations(rules=((".*", "int8/tensor"),))
BATCHES = [make_batch(seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def model():
    return make_model(tied=False, bias="all")


def recorded(cfg, params, batch, view=lambda p, s: p, state=()):
    """Every activation that enters a product, whole: {site: [L, B, T, ...]}, [B, T, D] for the head."""
    make = recording(layout_ops(ONE), lambda name, x: x if name in sites(cfg) else None)

    @jax.jit
    def run(params, state):
        return forward(params, jax.tree.map(jnp.asarray, batch), cfg, make_ops=make, view=view, view_state=state)

    out = run(params, state)
    found = {name.removeprefix("blocks/"): np.asarray(x) for name, x in out.records.items()}
    return {**found, "head": np.asarray(out.hidden_BTD)}


@pytest.fixture(scope="module")
def activations(model):
    cfg, params = model
    return [recorded(cfg, params, batch) for batch in BATCHES]


def real_entries(site, x, batch):
    """[L, n], of real tokens only."""
    layers = x[None] if site == "head" else x
    return np.stack([layer[np.asarray(batch.segments) > 0].reshape(-1) for layer in layers])


def oracle(activations, fn):
    """[N batches, L, 2] of each site."""
    found = {}
    for site in activations[0]:
        per_batch = [fn(real_entries(site, a[site], b)) for a, b in zip(activations, BATCHES, strict=True)]
        found[site] = np.stack(per_batch)[:, 0] if site == "head" else np.stack(per_batch)
    return found


def extremes(x):
    return np.stack([x.min(1), x.max(1)], axis=-1)


def test_minmax_equals_numpy(model, activations):
    cfg, params = model
    got = calibrate(STATIC, cfg, params, BATCHES, ONE)
    assert sorted(got) == sorted(sites(cfg))
    for site, value in oracle(activations, extremes).items():
        want = np.stack([value[..., 0].min(0), value[..., 1].max(0)], axis=-1)
        assert got[site].shape == ((2,) if site == "head" else (cfg.layers, 2))
        np.testing.assert_allclose(got[site], want, rtol=1e-6, atol=1e-6)


def test_moving_and_percentile_equal_numpy(model, activations):
    cfg, params = model
    moving = calibrate(Activations(rules=STATIC.rules, ranges="moving", decay=0.7), cfg, params, BATCHES, ONE)
    clipped = calibrate(Activations(rules=STATIC.rules, ranges="percentile", percentile=95), cfg, params, BATCHES, ONE)
    for site, value in oracle(activations, extremes).items():
        want = 0.7 * (0.7 * value[0] + 0.3 * value[1]) + 0.3 * value[2]
        np.testing.assert_allclose(moving[site], want, rtol=1e-6, atol=1e-6)
        assert (np.abs(clipped[site]) < np.abs(moving[site])).all()

    def percentiles(x):
        return np.quantile(x, [0.05, 0.95], axis=1, method="inverted_cdf").T

    for site, value in oracle(activations, percentiles).items():
        np.testing.assert_allclose(clipped[site], value.mean(0), rtol=2e-5, atol=2e-6)


def test_percentiles_of_plain_numbers():
    rng = np.random.default_rng(0)
    for percentile in (51.0, 75.0, 99.9, 100.0):
        config = Activations(rules=STATIC.rules, ranges="percentile", percentile=percentile)
        x = rng.standard_t(2, size=(4, 10, 25)).astype(np.float32)
        real = np.arange(40).reshape(4, 10) % 7 > 0
        got = extent(jnp.asarray(x), jnp.asarray(real), config)
        tail = 1 - percentile / 100
        want = np.quantile(x[real], [tail, 1 - tail], method="inverted_cdf")
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_padding_widens_nothing(model):
    cfg, params = model
    loud = jax.tree.map(lambda x: x, params)
    # All of its norm in one channel: after normalization far from what other tokens reach.
    loud["embed"]["table"] = params["embed"]["table"].at[31].set(100.0 * jnp.eye(cfg.width)[0])
    quiet = BATCHES[0]._replace(tokens=np.where(BATCHES[0].tokens == 31, 30, BATCHES[0].tokens))
    padded = quiet._replace(tokens=np.where(quiet.segments > 0, quiet.tokens, 31))
    want, got = (calibrate(STATIC, cfg, loud, [batch], ONE) for batch in (quiet, padded))
    for site in want:
        np.testing.assert_array_equal(got[site], want[site])
    everywhere = recorded(cfg, loud, padded)
    assert any(
        x.max() > 1.2 * want[site][..., 1].max() for site, x in everywhere.items()
    )  # padding would have widened it


def test_the_same_on_every_mesh(model):
    cfg, params = model
    want = calibrate(STATIC, cfg, params, BATCHES, ONE)
    layout = make_layout(MeshPlan(data=2, fsdp=2, tensor=2))
    got = calibrate(STATIC, cfg, params, BATCHES, layout)
    for site in want:
        np.testing.assert_allclose(got[site], want[site], rtol=1e-5, atol=1e-6)
        assert got[site].sharding.is_fully_replicated


def test_weights_are_calibrated_as_seen(model):
    """Through `view`, 2-bit weights give the ranges of a model whose weights are those very numbers."""
    cfg, params = model
    format = parse_format("int2")
    transform = LeafTransform(
        init=lambda w, spec: (None, jnp.zeros((cfg.layers, 0))),
        apply=lambda w, t, a: fake_quantize_min_max(w, format, (-2,)),
        update=lambda w, g, t, a, step: a,
        export=lambda w, t, a: w,
    )
    compression = only(((".*mlp/(up|down|gate)", True), (".*", False)), per_leaf(transform))
    state = compression.init(params, param_specs(cfg))
    plain = calibrate(STATIC, cfg, params, BATCHES, ONE)
    seen = calibrate(STATIC, cfg, params, BATCHES, ONE, view=compression.apply, view_state=state)
    want = calibrate(STATIC, cfg, jax.jit(compression.apply)(params, state), BATCHES, ONE)
    for site in seen:
        np.testing.assert_allclose(seen[site], want[site], rtol=1e-5, atol=1e-6)
    assert np.abs(seen["mlp.down"] - plain["mlp.down"]).max() > 1e-2


@pytest.mark.parametrize("format", ["int8/tensor", "int8-affine/tensor"])
def test_packed_equals_fake_quantized(model, format):
    cfg, params = model
    config = Activations(rules=((".*", format),))
    numerics = config.resolve(cfg)
    ranges = calibrate(config, cfg, params, BATCHES, ONE)
    specs, weights = flatten(param_specs(cfg)), parse_format("int8")
    make = layout_ops(ONE, numerics)

    def pack(path, w):
        return quantize(w, weights, specs[path].axes) if specs[path].is_matmul else w

    def compared(ranges):
        """A seam that runs every product both ways and records the relative difference; the model goes on with the fake-quantized one,
        so that a code on the edge of two steps, which rounding may tip, is not taken for a difference in the products after it."""
        inner, records = make(ranges), {}

        def einsum(equation, x, w, *, site):
            integer, fake = (inner.ops.einsum(equation, x, v, site=site) for v in (w, dequantize(w)))
            records[site] = jnp.abs(integer - fake).max() / jnp.abs(fake).max()
            return fake

        return Scope(inner.ops._replace(einsum=einsum), lambda: records)

    @jax.jit
    def run(params, ranges):
        packed = map_with_path(pack, params)
        out = forward(packed, jax.tree.map(jnp.asarray, BATCHES[0]), cfg, make_ops=compared, ranges=ranges)
        head = compared(out.ranges)
        values = project(out.hidden_BTD, out.head, cfg, head.ops)
        return values, {**out.records, **head.close()}

    fake, errors = run(params, ranges)
    assert sorted(name.removeprefix("blocks/") for name in errors) == sorted(sites(cfg))
    assert max(float(error.max()) for error in errors.values()) < 1e-6
    floating = logits(cfg, params, BATCHES[0])
    assert 1e-4 < float(jnp.abs(fake - floating).max() / jnp.abs(floating).max()) < 0.1  # int8 is near, but does round
    narrow, _ = run(params, {site: value * 0.05 for site, value in ranges.items()})
    assert float(jnp.abs(narrow - floating).max()) > 3 * float(jnp.abs(fake - floating).max())  # the ranges do matter


# ---- rules and bad inputs


def test_rules_resolve_to_sites():
    config = Activations(rules=(("attn.q|attn.k|attn.v", "int8"), ("mlp.*", "int8-affine/tensor"), (".*", None)))
    numerics = config.resolve(ModelConfig(**SMALL))
    found = {site: str(format) for site, format in numerics.activations}
    static = dict.fromkeys(("mlp.down", "mlp.gate", "mlp.up"), "int8-affine/tensor")
    assert found == {"attn.q": "int8", "attn.k": "int8", "attn.v": "int8", **static}
    assert numerics.static_sites == ("mlp.down", "mlp.gate", "mlp.up")
    assert hash(numerics) == hash(config.resolve(ModelConfig(**SMALL)))


def test_dynamic_formats_need_no_calibration(model):
    assert calibrate(Activations(), *model, [], ONE) == {}


BAD_RULES = {
    "unknown site": (
        (("attn.qq", "int8"), (".*", None)),
        {},
        r"rules\[0\]: 'attn.qq' matches nothing.*Nearest: 'attn.q'",
    ),
    "half unknown": ((("attn.q|mlp.gaet", "int8"), (".*", None)), {}, "'mlp.gaet' in .* Nearest: 'mlp.gate'"),
    "no gate": ((("mlp.gate", "int8"), (".*", None)), {"activation": "gelu"}, "'mlp.gate' matches nothing"),
    "not total": ((("attn.q", "int8"),), {}, "no rule matches 'attn.k'"),
    "never reached": ((("attn.*", "int8"), ("attn.q", None), (".*", None)), {}, "never reached"),
    "no regex": ((("attn.(", "int8"), (".*", None)), {}, "not a regular expression"),
}


@pytest.mark.parametrize("case", BAD_RULES)
def test_bad_rules(case):
    rules, changes, message = BAD_RULES[case]
    with pytest.raises(ConfigError, match=message):
        Activations(rules=rules).resolve(ModelConfig(**{**SMALL, **changes}))


BAD_FIELDS = {
    "group": ({"rules": ((".*", "int8/g32"),)}, r"rules\[0\].*'int8/g32', but groups are for weights"),
    "format": ({"rules": ((".*", "fp7"),)}, "got 'fp7', expected intBITS"),
    "ranges": ({"ranges": "percentle"}, "did you mean 'percentile'"),
    "batches": ({"batches": 0}, "batches: got 0"),
    "percentile": ({"percentile": 0.9999}, "percentile: got 0.9999, expected more than 50"),
    "decay": ({"decay": 1.0}, "decay: got 1.0"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields(case):
    fields, message = BAD_FIELDS[case]
    with pytest.raises(ConfigError, match=message):
        Activations(**fields)


def test_no_text_and_no_numbers_are_refused(model):
    cfg, params = model
    empty = BATCHES[0]._replace(segments=np.zeros_like(BATCHES[0].segments))
    with pytest.raises(DataError, match="no batch has a token outside padding"):
        calibrate(STATIC, cfg, params, [empty], ONE)
    broken = jax.tree.map(lambda x: x, params)
    broken["blocks"]["mlp"]["up"] = params["blocks"]["mlp"]["up"].at[1].set(jnp.nan)
    with pytest.raises(DataError, match=r"'attn.k' are not finite in layers \[2\]"):
        calibrate(STATIC, cfg, broken, BATCHES, ONE)
