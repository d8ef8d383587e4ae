"""The kernels compiled for TPUs that are not here, and what XLA's plain forms move there: the evidence that the table goes by."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.numerics import dequantize, parse_format, quantize
from lmeff.kernels.decode_attention import Seen, decode_attention
from lmeff.kernels.quantized import integer_product, weight_product
from lmeff.kernels.sparse import Sparse, sparse_product
from lmeff.parallel.devices import topology
from tests.kernels.cases import packed
from tests.kernels.test_decode_kernel import stack_of
from tests.tpu.programs import needs_libtpu

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow, needs_libtpu]

each_chip = pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])


def compiled(chip, fn, *specs):
    """For one device of a topology."""
    sharding = jax.sharding.SingleDeviceSharding(topology(chip)[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), specs)
    # Other tests ask for the highest precision, which a kernel of bfloat16 products cannot have.
    with jax.default_matmul_precision("default"):
        return jax.jit(fn).lower(*placed).compile()


def kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')


WEIGHTS = [
    ((8, 4096, 4096), "int8", False),
    ((1, 4096, 4096), "int4", False),
    ((8, 4096, 4096), "int4/g32", False),
    ((8, 4096, 4096), "int4-affine/g128", True),
    ((3, 768, 50304), "int8-affine", True),
    ((5, 1000, 1100), "int4", False),
    ((1, 5000, 1100), "int4/g32", False),
    ((4, 43, 70), "int4", True),
]


@each_chip
def test_products_with_packed_weights(chip):
    for (n, inputs, outputs), format, outputs_first in WEIGHTS:
        w = jax.eval_shape(functools.partial(packed, inputs, outputs, format, outputs_first))
        for dtype in (jnp.bfloat16, jnp.float32):
            program = compiled(
                chip,
                lambda x, w, turned=outputs_first: weight_product(x, w, turned),
                jax.ShapeDtypeStruct((n, inputs), dtype),
                w,
            )
            assert kernels(program) == 1, (n, inputs, outputs, format)


@each_chip
def test_integer_products(chip):
    for (n, inputs, outputs), format, outputs_first in WEIGHTS:
        parsed = parse_format(format)
        if parsed.group is None and parsed.symmetric:
            w = jax.eval_shape(functools.partial(packed, inputs, outputs, format, outputs_first))
            x = jax.eval_shape(lambda n=n, i=inputs: quantize(jnp.zeros((n, i)), parse_format("int8"), (-1,)))
            program = compiled(chip, lambda x, w, turned=outputs_first: integer_product(x, w, turned), x, w)
            assert kernels(program) == 1, (n, inputs, outputs, format)


@each_chip
@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((4, 32, 8, 2048, 128), "int8"),
        ((4, 16, 4, 1000, 256), "int4"),
        ((4, 32, 8, 2048, 128), "bfloat16"),
        ((2, 12, 12, 1000, 128), "float32"),
    ],
    ids=["int8", "int4 of 256 channels", "bfloat16", "float32"],
)
def test_attention_reads_its_layer_in_place(chip, shape, numbers):
    stack = jax.eval_shape(lambda: stack_of(shape, numbers))
    rows, heads, _, _, width = shape
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = compiled(
        chip,
        lambda q, stack, layer, length, position: decode_attention(
            q, *stack[:4], layer, length, position, Seen(100, 5.0)
        ),
        jax.ShapeDtypeStruct((rows, heads, width), jnp.bfloat16),
        stack,
        jax.ShapeDtypeStruct((), jnp.int32),
        ints,
        ints,
    )
    assert kernels(program) == 1
    stored = sum(x.size * x.dtype.itemsize for x in stack[:4] if x is not None)
    assert program.memory_analysis().temp_size_in_bytes < stored / 20, "no layer is copied"


@each_chip
@pytest.mark.parametrize(
    ("inputs", "n", "m", "dtype"), [(4096, 2, 4, jnp.bfloat16), (1000, 2, 4, jnp.int8), (4096, 2, 8, jnp.float32)]
)
def test_sparse_products(chip, inputs, n, m, dtype):
    runs, outputs = -(-inputs // m), 1100
    w = Sparse(
        values=jax.ShapeDtypeStruct((n, runs, outputs), dtype),
        places=jax.ShapeDtypeStruct((runs, outputs), jnp.int4 if m == 4 else jnp.int8),
        n=n,
        m=m,
        inputs=inputs,
    )
    x = jax.ShapeDtypeStruct((8, inputs), jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    assert kernels(compiled(chip, sparse_product, x, w)) == 1


def looped(product):
    """Two products a layer over stacked weights, as the model's scan has them."""

    def run(x, up, down):
        def layer(x, w):
            h = product(x, w[0]).astype(x.dtype)
            return x + product(h, w[1]).astype(x.dtype), None

        return jax.lax.scan(layer, x, (up, down))[0]

    return run


@each_chip
def test_the_plain_form_reads_codes_where_the_table_trusts_it(chip):
    """With a scale an output no weight is written as numbers; with scales of groups the scales are, and the kernel does not."""

    def plain(x, w):
        return jnp.dot(x, dequantize(w), preferred_element_type=jnp.float32)

    def temporaries(product, format):
        up, down = (
            jax.eval_shape(lambda s=s: quantize(jnp.zeros(s, jnp.bfloat16), parse_format(format), (-2,)))
            for s in ((4, 2048, 8192), (4, 8192, 2048))
        )
        program = compiled(chip, looped(product), jax.ShapeDtypeStruct((8, 2048), jnp.bfloat16), up, down)
        return program.memory_analysis().temp_size_in_bytes

    one_layer = 2048 * 8192
    assert temporaries(plain, "int8") < one_layer / 20
    assert temporaries(plain, "int4") < one_layer / 20
    assert temporaries(plain, "int4/g128") >= 2 * one_layer
    assert temporaries(lambda x, w: weight_product(x, w, False), "int4/g128") <= 2 * one_layer / 2
