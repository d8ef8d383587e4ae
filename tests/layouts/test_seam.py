"""Weights that are brought whole over fsdp before they are multiplied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.ops import plain_einsum
from lmeff.parallel.hlo import collectives
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.seam import gathered, gathering_einsum

EQUATIONS = {"BTD,DF->BTF": (64, 96), "BTF,FD->BTD": (96, 64), "BTHC,HCD->BTD": (4, 16, 64)}


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_gathered_weight_and_its_gradient(equation):
    """The product and both gradients are those of one device; the weight goes in, and its gradient comes out, cut over fsdp and tensor."""
    layout = make_layout(MeshPlan(fsdp=4, tensor=2))
    left, letters = equation.split("->")[0].split(",")
    sizes = {"B": 8, "T": 6} | dict(zip(letters, EQUATIONS[equation], strict=True))
    x, w = draw(0, [sizes[letter] for letter in left]), draw(1, EQUATIONS[equation])

    def loss(x, w, *, whole):
        w = gathered(layout, letters, w) if whole else w
        return (jnp.einsum(equation, x, w) ** 2).sum()

    want = jax.grad(lambda x, w: loss(x, w, whole=False), (0, 1))(x, w)
    places = layout.sharding("BT" + "_" * (x.ndim - 2), x.shape), layout.sharding(letters, w.shape)
    step = jax.jit(jax.value_and_grad(lambda x, w: loss(x, w, whole=True), (0, 1)))
    given = jax.device_put((x, w), places)
    value, got = step(*given)
    np.testing.assert_allclose(value, loss(x, w, whole=False), rtol=1e-5)
    for g, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-3)
    assert got[1].sharding.is_equivalent_to(places[1], w.ndim)
    gathers = [c for c in collectives(step.lower(*given).compile().as_text()) if c.kind == "all-gather"]
    assert w.size // 2 in {c.elements for c in gathers}, "whole over fsdp, still cut over tensor"


def test_gathered_on_tpus_alone():
    assert gathering_einsum(make_layout(MeshPlan(fsdp=8)), "full") is plain_einsum
