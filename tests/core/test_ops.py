"""The seam's product: its own gradients equal automatic differentiation's, alone, mapped and inside shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lmeff.core.ops import plain_einsum

SIZES = {"B": 2, "T": 6, "D": 8, "H": 4, "K": 2, "C": 3, "F": 5, "V": 7, "N": 12}
EQUATIONS = ["BTD,DHC->BTHC", "BTHC,HCD->BTD", "BTD,DF->BTF", "ND,VD->NV", "ND,DV->NV"]


def operands(equation):
    left, right = equation.split("->")[0].split(",")
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.random.normal(key, tuple(SIZES[x] for x in letters)) for key, letters in zip(keys, (left, right)))


def gradients(product, x, w):
    return jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), argnums=(0, 1))(x, w)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_equal_automatic_differentiation(equation):
    x, w = operands(equation)
    got = gradients(functools.partial(plain_einsum, equation), x, w)
    want = gradients(functools.partial(jnp.einsum, equation), x, w)
    for g, h in zip(got, want, strict=True):
        np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-5)


def test_low_precision_gradients_keep_their_dtypes():
    x, w = operands("BTD,DF->BTF")
    d_x, d_w = gradients(functools.partial(plain_einsum, "BTD,DF->BTF"), x.astype(jnp.bfloat16), w)
    assert (d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.float32)


def test_mapped_over_rows_that_share_a_weight():
    x, w = operands("BTD,DF->BTF")
    per_row = jax.vmap(lambda x: gradients(functools.partial(plain_einsum, "TD,DF->TF"), x, w)[1])(x)
    np.testing.assert_allclose(
        per_row.sum(0), gradients(functools.partial(plain_einsum, "BTD,DF->BTF"), x, w)[1], rtol=1e-5, atol=1e-5
    )


def test_a_weight_that_all_shards_share_gets_the_sum_of_their_gradients():
    x, w = operands("BTD,DF->BTF")
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    product = functools.partial(plain_einsum, "BTD,DF->BTF")
    sharded = jax.shard_map(
        functools.partial(gradients, product), mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P())
    )
    for g, h in zip(jax.jit(sharded)(x, w), gradients(product, x, w), strict=True):
        np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-5)
