"""Products with quantized weights as Pallas kernels for TPUs: codes go from memory to the cores as they are stored and become numbers there.

Two kernels, each for few tokens, where a product takes as long as reading its weight. `weight_product`: activations are numbers. `integer_product`: both are
codes, multiplied and summed as integers. Codes of 4 bits are int4 arrays, which XLA for TPUs keeps two a byte and Mosaic reads as such on v5e, v5p and v6e.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lmeff.core.numerics import QTensor
from lmeff.kernels.traffic import LANES, SUBLANES, Blocks, Call, block_size, run

MOST_TOKENS_BYTES = 4 << 20  # of all tokens, which stay in a core's memory
MOST_INPUTS, MOST_OUTPUTS = 2048, 512  # of a block: its codes in float32 take 4 MiB of a core's memory


def refusal(tokens: int, inputs: int, outputs_first: bool, group: int | None) -> str | None:
    """Why `weight_product` does not take a product; None where it does."""
    if 4 * tokens * inputs > MOST_TOKENS_BYTES:
        return f"{tokens} tokens of {inputs} inputs do not stay in a core's memory"
    multiple = LANES if outputs_first else SUBLANES
    if group is not None and group % multiple:
        return f"groups of {group} along the {'last' if outputs_first else 'first'} dim of a weight are no multiple of {multiple}"
    return None


def product_call(tokens: int, w: Any, outputs_first: bool, x_dtype: Any, scaled_tokens: bool = False) -> Call:
    """Grid and operands of a product: tokens, codes, scales, zero points if any, scales of tokens if any, result. `w` may be a spec."""
    inputs, outputs = reversed(w.shape) if outputs_first else w.shape
    group = w.format.group
    size_i = block_size(inputs, math.lcm(LANES, group or 1), MOST_INPUTS)
    if group is not None:
        size_i = -(-size_i // group) * group
    size_o = block_size(outputs, LANES, MOST_OUTPUTS)
    grid = (-(-outputs // size_o), -(-inputs // size_i))
    x = Blocks((tokens, grid[1] * size_i), x_dtype, (tokens, size_i), lambda o, i: (0, i))
    if grid[1] > 1 and grid[0] > 1:  # read once, and not once for each block of outputs
        x = x._replace(block=x.shape, index=lambda o, i: (0, 0))
    if outputs_first:
        q = Blocks(w.shape, w.q.dtype, (size_o, size_i), lambda o, i: (o, i))
    else:
        q = Blocks(w.shape, w.q.dtype, (size_i, size_o), lambda o, i: (i, o))
    if group is None:
        of_scale = ((1, outputs), (1, size_o), lambda o, i: (0, o))
    else:
        of_scale = ((-(-inputs // group), 1, outputs), (size_i // group, 1, size_o), lambda o, i: (i, 0, o))
    operands = [x, q, Blocks(of_scale[0], jnp.float32, *of_scale[1:])]
    if w.zero is not None:
        operands.append(Blocks(of_scale[0], jnp.int32, *of_scale[1:]))
    if scaled_tokens:
        operands.append(Blocks((tokens, 1), jnp.float32, (tokens, 1), lambda o, i: (0, 0)))
    operands.append(Blocks((tokens, outputs), jnp.float32, (tokens, size_o), lambda o, i: (0, o)))
    return Call(grid, tuple(operands))


def weight_product(x_NI: jax.Array, w: QTensor, outputs_first: bool, *, interpret: bool = False) -> jax.Array:
    """Tokens times a packed weight [I, O], or [O, I] with `outputs_first`, symmetric or affine, with any scales: float32 [N, O].

    Codes are exact in the dtype of `x`. Scales of groups are multiplied into them, which rounds a weight once to that dtype; others multiply the sums.
    """
    call = product_call(x_NI.shape[0], w, outputs_first, x_NI.dtype)
    kernel = functools.partial(_weight_kernel, w=_static(w), turned=outputs_first, inputs=x_NI.shape[1])
    scales = [_rows(t, w, outputs_first) for t in (w.scale, w.zero) if t is not None]
    return run(kernel, call, jnp.float32, (_padded(x_NI, call), w.q, *scales), interpret)


def integer_product(x: QTensor, w: QTensor, outputs_first: bool, *, interpret: bool = False) -> jax.Array:
    """Codes [N, I], with a scale for each token or one for all, times codes of a weight with one scale an output or one for all: float32 [N, O].

    Both symmetric. Sums are exact; the two scales multiply them once at the end.
    """
    assert (x.zero, w.zero, w.format.group) == (None, None, None), (x.format, w.format)
    call = product_call(x.shape[0], w, outputs_first, jnp.int8, scaled_tokens=True)
    scale_N1 = jnp.broadcast_to(x.scale, (x.shape[0], 1))
    kernel = functools.partial(_integer_kernel, turned=outputs_first)
    given = (_padded(x.q.astype(jnp.int8), call), w.q, _rows(w.scale, w, outputs_first), scale_N1)
    return run(kernel, call, jnp.int32, given, interpret)


def _static(w: QTensor) -> tuple[int | None, bool]:
    """(group, whether it has zero points)."""
    return w.format.group, w.zero is not None


def _padded(x_NI: jax.Array, call: Call) -> jax.Array:
    """With zeros for inputs beyond the end: whatever a block has there is then not added."""
    return jnp.pad(x_NI, [(0, 0), (0, call.operands[0].shape[1] - x_NI.shape[1])])


def _rows(scale: jax.Array, w: QTensor, outputs_first: bool) -> jax.Array:
    """Scales [1, O], or of groups [G, 1, O]."""
    outputs = w.shape[0 if outputs_first else 1]
    if w.format.group is None:
        return jnp.broadcast_to(scale.reshape(1, -1), (1, outputs))
    return (scale.T if outputs_first else scale)[:, None, :]


# ---- inside a core


def _dot(x: jax.Array, w: jax.Array, turned: bool, sums: Any) -> jax.Array:
    """x [N, I] by w [I, O], or [O, I] where `turned`."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((1,), (1 if turned else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=exact, preferred_element_type=sums)


def _own_inputs(x_ref: Any, size: int) -> jax.Array:
    """The inputs of this step of a row that is here as a whole."""
    if x_ref.shape[1] == size:
        return x_ref[...]
    return x_ref[:, pl.ds(pl.multiple_of(pl.program_id(1) * size, LANES), size)]


def _start(acc_ref: Any) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)


def _end(acc_ref: Any, out_ref: Any, scale: jax.Array | None) -> None:
    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        sums = acc_ref[...].astype(jnp.float32)
        out_ref[...] = sums if scale is None else sums * scale


def _weight_kernel(
    x_ref: Any, q_ref: Any, scale_ref: Any, *refs: Any, w: tuple[int | None, bool], turned: bool, inputs: int
) -> None:
    (group, affine), (*zero_ref, out_ref, acc_ref) = w, refs
    size = q_ref.shape[1 if turned else 0]
    _start(acc_ref)
    x_NI = _own_inputs(x_ref, size)
    codes = q_ref[...].astype(jnp.float32)
    if group is None:
        # A code less its zero point has at most 9 bits with its sign: exact in bfloat16, too.
        zero = zero_ref[0][...].astype(jnp.float32) if affine else 0.0
        if affine and turned:
            acc_ref[...] += _dot(x_NI, codes.astype(x_NI.dtype), turned, jnp.float32)
            acc_ref[...] -= x_NI.astype(jnp.float32).sum(1, keepdims=True) * zero
        else:
            acc_ref[...] += _dot(x_NI, (codes - zero).astype(x_NI.dtype), turned, jnp.float32)
        return _end(acc_ref, out_ref, scale_ref[...])
    zeros = zero_ref[0][...].astype(jnp.float32) if affine else None
    if turned:
        for g in range(size // group):  # whole vectors: groups are multiples of their lanes
            own = slice(g * group, (g + 1) * group)
            part = _dot(x_NI[:, own], codes[:, own].astype(x_NI.dtype), turned, jnp.float32)
            if zeros is not None:
                part -= x_NI[:, own].astype(jnp.float32).sum(1, keepdims=True) * zeros[g]
            acc_ref[...] += jnp.where(pl.program_id(1) * size + g * group < inputs, part * scale_ref[g], 0.0)
        return _end(acc_ref, out_ref, None)
    codes_GIO = codes.reshape(size // group, group, -1)
    values_IO = ((codes_GIO if zeros is None else codes_GIO - zeros) * scale_ref[...]).reshape(size, -1)
    if inputs % size:
        row = pl.program_id(1) * size + jax.lax.broadcasted_iota(jnp.int32, values_IO.shape, 0)
        values_IO = jnp.where(row < inputs, values_IO, 0.0)  # what lies beyond the end may be anything
    acc_ref[...] += _dot(x_NI, values_IO.astype(x_NI.dtype), turned, jnp.float32)
    return _end(acc_ref, out_ref, None)


def _integer_kernel(
    x_ref: Any, q_ref: Any, scale_ref: Any, tokens_ref: Any, out_ref: Any, acc_ref: Any, *, turned: bool
) -> None:
    _start(acc_ref)
    x_NI = _own_inputs(x_ref, q_ref.shape[1 if turned else 0])
    acc_ref[...] += _dot(x_NI, q_ref[...].astype(jnp.int8), turned, jnp.int32)
    _end(acc_ref, out_ref, tokens_ref[...] * scale_ref[...])
