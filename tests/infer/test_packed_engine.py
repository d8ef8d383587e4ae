"""Packed weights served by an engine: the logits of the same weights as numbers, in whatever form the table computes them, alone and on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from lmeff.core.numerics import is_qtensor, materialize, parse_format, quantize
from lmeff.core.tree import map_with_path
from lmeff.infer.engine import make_engine
from lmeff.models.cache import CacheFormat
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import shardings
from tests.infer.tiny import PLAIN, served

CACHE = CacheFormat(numbers="float32")
TOKENS = np.arange(4 * 5).reshape(4, 5) % PLAIN.vocab


def packed(model, format):
    """Every matrix packed, the tied table too, and placed as it lies."""
    specs = param_specs(model.cfg)

    def leaf(path, spec, w):
        return quantize(w, parse_format(format), spec.axes) if spec.is_matmul else w

    params = jax.jit(lambda params: map_with_path(leaf, specs, params))(model.params)
    params = jax.device_put(params, shardings(params, specs, model.layout))
    return dataclasses.replace(model, params=params)


def logits(model):
    """After a prompt, and after two more tokens."""
    engine = make_engine(model, batch=4, length=12, cache=CACHE)
    first, cache = engine.prefill(TOKENS, np.full(4, 5))
    second, cache = engine.decode(cache, TOKENS[:, 1])
    third, _ = engine.decode(cache, TOKENS[:, 3])
    return [np.asarray(x) for x in (first, second, third)], engine


@pytest.mark.parametrize(
    ("mesh", "format"),
    [
        ("one", "int4/g8"),
        pytest.param("one", "int8", marks=pytest.mark.slow),
        pytest.param("fsdp2-data2-tensor2", "int8", marks=pytest.mark.slow),
        pytest.param("fsdp2-data2-tensor2", "int4/g8", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_same_weights_as_numbers(mesh, format):
    model = packed(served(PLAIN, mesh), format)
    got, engine = logits(model)
    want, _ = logits(dataclasses.replace(model, params=jax.jit(materialize)(model.params)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())
    leaves = [x for x in jax.tree.leaves(engine.served.params, is_leaf=is_qtensor) if is_qtensor(x)]
    assert leaves
    assert all(x.paired == (mesh == "one" and format == "int4/g8") for x in leaves)
