"""The kernel of one token's attention to a cache, run step by step, against NumPy; and the bytes that its blocks move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.kernels.decode_attention import Seen, decode_attention, decode_call
from lmeff.kernels.traffic import bytes_moved
from lmeff.models.cache import CacheFormat, Stack
from lmeff.models.cached import How as CachedHow
from lmeff.models.cached import encode_rows, form_of, pack
from tests.kernels.cases import error, shapes

LAYERS, LAYER = 2, 1
# (rows, query heads, key-value heads, slots, width), numbers, window, softcap, tokens of each row
FAST = [((3, 4, 2, 40, 16), "int8", None, None, (7, 40, 0))]
SLOW = [
    ((2, 4, 1, 700, 16), "int4", None, 5.0, (300, 700)),
    ((2, 4, 4, 600, 16), "float32", None, None, (600, 599)),
    ((3, 4, 1, 24, 8), "int8", 20, None, (100, 24, 3)),
    ((2, 4, 2, 130, 32), "bfloat16", None, None, (5, 130)),
    ((1, 8, 2, 512, 64), "int8", None, None, (512,)),
    ((1, 8, 2, 513, 64), "int8", None, None, (513,)),
    ((2, 4, 2, 1100, 16), "float32", 37, 3.0, (1000, 36)),
    ((2, 4, 2, 64, 16), "int4", 64, None, (64, 1000)),
    ((2, 2, 2, 1, 8), "int8", None, None, (1, 0)),
]


def stack_of(shape, numbers):
    """A stack of random keys and values."""
    rows, _, heads, slots, width = shape
    format = CacheFormat(numbers=numbers)
    keys = jax.random.split(jax.random.key(3), 2)
    k, v = (jax.random.normal(key, (LAYERS, rows, heads, slots, width)) for key in keys)
    if format.quantized is None:
        return Stack(k.astype(numbers), v.astype(numbers))
    (k, k_scale), (v, v_scale) = (encode_rows(x, format.quantized, -1) for x in (k, v))
    return Stack(pack(k, format), pack(v, format), k_scale, v_scale)


def layer_of(codes, scale, numbers):
    """Keys or values of one layer in float64: the bytes of 4-bit codes taken apart by their bits."""
    x = np.asarray(codes[LAYER].astype(jnp.float32 if numbers == "bfloat16" else codes.dtype))
    if numbers == "int4":
        low, high = x.view(np.uint8) & 15, x.view(np.uint8) >> 4
        x = np.concatenate([low, high], -1).astype(np.int32)
        x = np.where(x > 7, x - 16, x)
    return x.astype(np.float64) * (1 if scale is None else np.asarray(scale[LAYER], np.float64)[..., None])


def oracle(q, k, v, lengths, window, softcap):
    """Each row and head by itself, over the positions that its slots hold."""
    rows, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(rows):
        slots, n = k.shape[2], lengths[b]
        first = max(0, n - slots, 0 if window is None else n - window)
        held = np.arange(first, n) % slots
        for h in range(heads):
            kv = h * k.shape[1] // heads
            scores = k[b, kv, held] @ q[b, h]
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max(initial=-np.inf)) if n else np.zeros(0)
            out[b, h] = (weights @ v[b, kv, held]) / weights.sum() if n else 0
    return out


@pytest.mark.parametrize(("shape", "numbers", "window", "softcap", "lengths"), shapes(FAST, SLOW))
def test_attention_equals_numpy(shape, numbers, window, softcap, lengths):
    rows, heads, _, _, width = shape
    stack = jax.jit(lambda: stack_of(shape, numbers))()
    k, v = (layer_of(*pair, numbers) for pair in ((stack.k, stack.k_scale), (stack.v, stack.v_scale)))
    q = jax.random.normal(jax.random.key(4), (rows, heads, width)) * width**-0.5
    length_B = jnp.array(lengths)
    given = (*stack[:4], LAYER, length_B, length_B - 1, Seen(window, softcap))
    made = decode_attention(q, *given, interpret=True)
    assert error(made, oracle(np.asarray(q, np.float64), k, v, lengths, window, softcap)) < 1e-6


@pytest.mark.slow
def test_a_row_whose_token_is_padding_sees_nothing():
    stack = stack_of((2, 4, 2, 40, 16), "int8")
    q, length_B = jnp.ones((2, 4, 16)), jnp.array([9, 9])
    made = decode_attention(q, *stack[:4], 0, length_B, jnp.array([-1, 8]), Seen(), interpret=True)
    assert not made[0].any()
    assert made[1].any()


@pytest.mark.parametrize("numbers", ["int8", "int4", "bfloat16"])
def test_bytes_moved_are_those_that_rows_hold(numbers):
    shape = (4, 32, 8, 2048, 128)
    stack = jax.eval_shape(lambda: stack_of(shape, numbers))
    call = decode_call(jax.ShapeDtypeStruct((4, 32, 128), jnp.bfloat16), *stack[:4])
    layer = sum(x.size * x.dtype.itemsize for x in stack[:4] if x is not None) // LAYERS

    def moved(*lengths):
        length_B = np.array(lengths, np.int32)
        return bytes_moved(call, (np.array([1], np.int32), length_B, length_B - 1))

    assert moved(2048, 2048, 2048, 2048) == pytest.approx(layer, rel=0.05)
    assert moved(1024, 512, 1, 512) == pytest.approx(layer * 5 / 16, rel=0.1), "of 512 slots each, two blocks and three"
    assert moved(9000, 9000, 9000, 9000) == moved(2048, 2048, 2048, 2048)


@pytest.mark.parametrize(
    ("platform", "tokens", "width", "format", "form"),
    [
        ("tpu", 1, 128, "int8", "kernel"),
        ("tpu", 1, 128, "bfloat16", "kernel"),
        ("tpu", 1, 128, "int4", "plain"),
        ("tpu", 1, 256, "int4", "kernel"),
        ("tpu", 2, 128, "int8", "plain"),
        ("tpu", 1, 64, "int8", "plain"),
        ("cpu", 1, 128, "int8", "plain"),
        ("gpu", 1, 128, "int8", "plain"),
    ],
)
def test_where_the_kernel_is_chosen(platform, tokens, width, format, form):
    stored = width // 2 if format == "int4" else width
    spec = jax.ShapeDtypeStruct((1, 1, 2, 64, stored), jnp.int8)
    how = CachedHow(CacheFormat(numbers=format))
    assert form_of(platform, (1, tokens, 2, width), Stack(spec, spec), how) == form
