"""Packed matrices, and their products in float64 by NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.core.numerics import QTensor, parse_format, quantize


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="dtype")
def packed(inputs, outputs, format, outputs_first, dtype=jnp.float32) -> QTensor:
    """A random weight [I, O] or [O, I] in a format; its mean is not 0, so that zero points matter."""
    shape = (outputs, inputs) if outputs_first else (inputs, outputs)
    parsed = parse_format(format)
    axes = (-2, -1) if parsed.granularity == "tensor" else (-1,) if outputs_first else (-2,)
    w = jax.random.normal(jax.random.key(1), shape, dtype) + jnp.asarray(0.2, dtype)
    return quantize(w, parsed, axes)


def values(t) -> np.ndarray:
    """`(q - zero) * scale` in float64, scales repeated along the one dim that is shorter."""

    def whole(x):
        for axis, (have, want) in enumerate(zip(x.shape, t.shape)):
            if have not in (1, want):
                x = np.repeat(x, t.format.group, axis)[tuple(slice(n) for n in t.shape[: axis + 1])]
        return x

    zero = 0 if t.zero is None else whole(np.asarray(t.zero, np.float64))
    return (np.asarray(t.q.astype(jnp.int8), np.float64) - zero) * whole(np.asarray(t.scale, np.float64))


def product(x, w, outputs_first) -> np.ndarray:
    """Tokens [N, I] times a packed weight."""
    dense = values(w)
    return np.asarray(x, np.float64) @ (dense.T if outputs_first else dense)


def tokens(n, inputs, dtype=jnp.float32):
    """Random tokens [N, I]."""
    return jax.random.normal(jax.random.key(0), (n, inputs), dtype)


def error(got, want) -> float:
    """The largest difference, of the largest number."""
    assert got.shape == want.shape
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def shapes(fast, slow):
    """Cases as parameters with ids; the long tail is slow."""
    mark = pytest.mark.slow
    return [pytest.param(*c, id=name(c)) for c in fast] + [pytest.param(*c, id=name(c), marks=mark) for c in slow]


def name(case) -> str:
    """ "3x43x70-int8-True"."""
    return "-".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in case)
