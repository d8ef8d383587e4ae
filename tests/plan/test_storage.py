"""Stored sizes against the arguments of a program that is compiled for a TPU."""

import math

import jax
import jax.numpy as jnp
import pytest

from lmeff.parallel.devices import topology
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.plan.storage import bits_of, stored_bytes
from tests.tpu.programs import needs_libtpu

SHAPES = [
    (),
    (1,),
    (100,),
    (128,),
    (200,),
    (300,),
    (1000,),
    (1024,),
    (3000,),
    (4, 100),
    (1, 64),
    (3, 64),
    (9, 64),
    (33, 128),
]
SHAPES += [
    (4, 256, 4, 64),
    (4, 256, 1, 128),
    (4, 256, 3, 128),
    (2, 7, 130),
    (80, 8192),
    (10, 12, 16, 20),
    (4, 256, 1, 1),
    (256, 1),
]
SHAPES += [(17, 1, 256), (8, 2), (80, 2), (2, 3, 5, 7)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4, jnp.bool_, jnp.int32]


@pytest.mark.parametrize(
    ("dtype", "bits"), [(jnp.int4, 4), (jnp.int8, 8), (jnp.bool_, 8), (jnp.bfloat16, 16), (jnp.float32, 32)]
)
def test_elements_and_nothing_else(dtype, bits):
    assert bits_of(dtype) == bits
    assert stored_bytes((3, 5, 7), dtype, "cpu") == math.ceil(3 * 5 * 7 * bits / 8)
    assert stored_bytes((3, 5, 7), dtype, "gpu") == math.ceil(3 * 5 * 7 * bits / 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "stored"),
    [
        ((80, 8192), jnp.float32, 80 * 8192 * 4),
        ((4, 256, 4, 64), jnp.float32, 4 * 256 * 4 * 64 * 4),  # two other dims fill the tiles
        ((4, 100), jnp.float32, 4 * 128 * 4),
        ((9, 64), jnp.bfloat16, 16 * 128 * 2),
        ((4, 100), jnp.int4, 8 * 128 // 2),
        ((), jnp.int32, 512),
    ],
)
def test_tiles(shape, dtype, stored):
    assert stored_bytes(shape, dtype, "tpu") == stored


@pytest.mark.tpu_aot
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_tiles_are_those_of_the_compiler(dtype):
    place = make_layout(MeshPlan(), topology("v5e:2x2")[:1]).replicated
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in SHAPES]
    program = jax.jit(lambda *x: x).lower(*given).compile()
    assert program.memory_analysis().argument_size_in_bytes == sum(
        stored_bytes(shape, dtype, "tpu") for shape in SHAPES
    )
