"""Which form computes a product with a packed weight: by the platform that it will run on, its shape and its formats.

The plain form, weights turned into numbers or integer products by XLA, is right everywhere. What is better somewhere has a rule here and a row in `FORMS`.
Where the plain form moves more than the codes and nothing better is to be had, one line of the log says so, once for each reason.

| platform | products | form | why |
|---|---|---|---|
| cpu | up to 64 tokens; any number with two codes a byte | blocks | XLA writes the whole weight in float32 first |
| tpu | up to 64 tokens, weights with scales of groups | weights | XLA writes the scales as large as the weight, in float32 |
| tpu | others | plain | XLA reads codes as they are stored, inside the product; integer products are its own |
| gpu | codes of activations by weights of at most 4 bits | widened | XLA fails on some of them otherwise (one token; jaxlib 0.11.2) |
| others | all | plain | no kernel is written |

The plain form of codes by codes is `core.packed`, which on NVIDIA GPUs goes by way of bfloat16.

What XLA for TPUs does is seen in compiled programs (`tests/kernels/test_kernels_compile.py`), not in times.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmeff.core.dims import contracted, split_einsum
from lmeff.core.numerics import QFormat, QTensor, codes_of, dequantize, is_qtensor, pair
from lmeff.core.packed import packed_einsum
from lmeff.kernels.blocks import blocked_product
from lmeff.kernels.matrix import fits, matrices, outputs_first
from lmeff.kernels.quantized import refusal, weight_product

Form = Callable[..., Any]
"""`(x, w, outputs_first) -> float32 [N, O]`: tokens [N, I], numbers or codes, by a packed weight [I, O], or [O, I] with `outputs_first`."""

PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Product:
    """What the table goes by: a product on one device.

    tokens, inputs, outputs: N, I and O.
    paired:                  whether the weight's codes are two a byte.
    dtype:                   of the activations; of what was quantized, if they are codes.
    activations:             their format; None of floating ones.
    """

    platform: str
    tokens: int
    inputs: int
    outputs: int
    outputs_first: bool
    weights: QFormat
    paired: bool
    dtype: str
    activations: QFormat | None = None


def packed_product(platform: str, equation: str, x: Any, w: QTensor) -> jax.Array | None:
    """`einsum(equation, x, w)` in float32 on one device of a platform, `core.ops.Packed`; None where the plain form is best."""
    form = FORMS[form_of(platform, equation, x, w)]
    if form is None:
        return None
    made = matrices(equation, x, w)
    return form(made.x, made.w, made.outputs_first).reshape(made.shape)


def form_of(platform: str, equation: str, x: Any, w: QTensor, ways: Mapping[str, int] | None = None) -> str:
    """The form of a product, a key of `FORMS`. ways: into how many parts each letter is cut over devices."""
    if not fits(equation, w):
        return plain(f"{platform}: '{equation}' with {w.format} is no product of matrices")
    left, right, _ = split_einsum(equation)
    size = {c: n // (ways or {}).get(c, 1) for c, n in (*zip(left, x.shape), *zip(right, w.shape))}
    inner, activations = contracted(equation), x.format if is_qtensor(x) else None
    return choose(
        Product(
            platform=platform,
            tokens=math.prod(size[c] for c in left if c not in inner),
            inputs=math.prod(size[c] for c in inner),
            outputs=math.prod(size[c] for c in right if c not in inner),
            outputs_first=bool(outputs_first(equation)),
            weights=w.format,
            paired=w.paired,
            dtype=x.dtype if is_qtensor(x) else jnp.dtype(x.dtype).name,
            activations=activations,
        )
    )


def stored_for(platform: str, t: QTensor) -> QTensor:
    """A packed tensor as the platform's forms read it best: on CPUs two codes of at most 4 bits a byte. Outside of jit, for what is then used many times."""
    return jax.jit(pair)(t) if platform == "cpu" and _pairs(t) else t


def _pairs(t: QTensor) -> bool:
    group = t.format.group if t.axes[-1] == -1 else None
    return t.q.dtype == jnp.int4 and t.shape[-1] % 2 == 0 and (group or 2) % 2 == 0


def choose(product: Product) -> str:
    """The form of a product, a key of `FORMS`."""
    rule = RULES.get(product.platform)
    return rule(product) if rule else plain(f"{product.platform}: no kernel is written for this platform")


def plain(reason: str) -> str:
    """The plain form where another was to be expected; says why, once."""
    _log(f"packed weights on {reason}; XLA turns them into numbers before it multiplies")
    return PLAIN


@functools.cache
def _log(line: str) -> None:
    logging.getLogger("lmeff.kernels").warning(line)


def _on_cpu(product: Product) -> str:
    # More tokens pay for a weight in float32; not where XLA would put pairs of codes back in order.
    return "blocks" if product.tokens <= FEW_ON_CPU or product.paired else PLAIN


def _on_tpu(product: Product) -> str:
    group = product.weights.group
    if group is None or product.activations is not None or product.tokens > FEW_ON_TPU:
        return PLAIN
    if product.weights.is_float:
        return plain(f"tpu: no kernel is written for groups of {product.weights}")
    why = refusal(product.tokens, product.inputs, product.outputs_first, group)
    return "weights" if why is None else plain(f"tpu: {why}")


def _on_gpu(product: Product) -> str:
    if product.activations is not None and not product.weights.is_float and product.weights.bits <= 4:
        return "widened"
    return plain("gpu: no kernel is written for this platform")


def _widened(x: QTensor, w: QTensor, outputs_first: bool) -> jax.Array:
    """The integer product, with codes of four bits as int8 in memory: not widened inside the product."""
    codes = jax.lax.optimization_barrier(codes_of(w).astype(jnp.int8))
    return packed_einsum("NI,OI->NO" if outputs_first else "NI,IO->NO", x, dataclasses.replace(w, q=codes))


def _blocks(x: Any, w: QTensor, outputs_first: bool) -> jax.Array:
    """Codes are multiplied as the numbers they stand for: integer products are slower on CPUs, and these are the same but for the rounding of sums."""
    return blocked_product(dequantize(x) if is_qtensor(x) else x, w, outputs_first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weights(x_NI: jax.Array, w: QTensor, outputs_first: bool) -> jax.Array:
    """The kernel, with a gradient for tokens. Packed weights are not trained and have none."""
    return weight_product(x_NI, w, outputs_first)


def _weights_backward(outputs_first: bool, saved: Any, g_NO: jax.Array) -> Any:
    w, like = saved
    values = dequantize(w).astype(like.dtype)
    g_NI = jnp.einsum("NO,OI->NI" if outputs_first else "NO,IO->NI", g_NO.astype(like.dtype), values)
    return g_NI.astype(like.dtype), None


_weights.defvjp(lambda x, w, outputs_first: (_weights(x, w, outputs_first), (w, x[:0])), _weights_backward)

FEW_ON_CPU = 64
FEW_ON_TPU = 64

RULES: dict[str, Callable[[Product], str]] = {"cpu": _on_cpu, "gpu": _on_gpu, "tpu": _on_tpu}

FORMS: dict[str, Form | None] = {PLAIN: None, "blocks": _blocks, "weights": _weights, "widened": _widened}
