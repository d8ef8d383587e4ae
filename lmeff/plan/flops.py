"""FLOPs by formula, for the back of an envelope: what people quote. `plan.count` and `plan.work` count the code itself.

A FLOP is one multiplication or one addition; a product of matrices has as many of each.
"""

from lmeff.models.cost import mean_visible


def matmul_forward(m: int, k: int, n: int) -> int:
    """[m, k] times [k, n]: 2mkn.

    >>> matmul_forward(1, 4096, 14336)
    117440512
    """
    return 2 * m * k * n


def matmul_backward(m: int, k: int, n: int) -> int:
    """Both gradients of [m, k] times [k, n]: 4mkn.

    >>> matmul_backward(8, 4, 2) == 2 * matmul_forward(8, 4, 2)
    True
    """
    return 4 * m * k * n


def weight_forward(m: int, n: int) -> int:
    """A weight [m, n], for each token: 2mn.

    >>> weight_forward(4096, 4096)
    33554432
    """
    return matmul_forward(1, m, n)


def weight_backward(m: int, n: int) -> int:
    """Both gradients of a weight's product, for each token: 4mn.

    >>> weight_backward(4096, 4096)
    67108864
    """
    return matmul_backward(1, m, n)


def attention_forward(
    rows: int, tokens: int, heads: int, head_width: int, *, causal: bool = False, window: int | None = None
) -> float:
    """Scores and values of one layer: 4 x rows x tokens x keys x heads x head width. Key-value heads do not matter: every query head has its scores.

    causal: each token sees those up to itself (`window` of them): half of all keys and a half more. Without it all see all.

    >>> attention_forward(1, 4096, 32, 128)
    274877906944.0
    >>> attention_forward(1, 4096, 32, 128, causal=True) / attention_forward(1, 4096, 32, 128)
    0.5001220703125
    """
    keys = mean_visible(tokens, window) if causal else tokens
    return 4.0 * rows * tokens * keys * heads * head_width


def attention_backward(forward: float) -> float:
    """Of a kernel that makes the scores again: 5 products for the 2 of the forward pass (Dao et al. 2022, https://arxiv.org/abs/2205.14135).

    >>> attention_backward(2.0)
    5.0
    """
    return 2.5 * forward


def train(n_params: float, n_tokens: float) -> float:
    """6ND: 2 forward and 4 backward for each parameter and token (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361). Attention is left out.

    Llama 3 405B on 15.6T tokens is given as 3.8e25 (Llama Team 2024, https://arxiv.org/abs/2407.21783).

    >>> f"{train(405e9, 15.6e12):.1e}"
    '3.8e+25'
    """
    return 6.0 * n_params * n_tokens


def train_with_remat(n_params: float, n_tokens: float) -> float:
    """8ND: the forward pass of every layer runs twice. What runs, not what the model needs.

    >>> train_with_remat(1e9, 1e9) / train(1e9, 1e9)
    1.3333333333333333
    """
    return 8.0 * n_params * n_tokens


def palm_per_token(n_params: float, layers: int, heads: int, head_width: int, tokens: int) -> float:
    """6N + 12LHQT: forward and backward for each token of rows of T, attention counted full (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
    appendix B).

    PaLM 540B, 118 layers of 48 heads of 256, rows of 2,048:

    >>> f"{palm_per_token(540.35e9, 118, 48, 256, 2048):.4e}"
    '3.2777e+12'
    """
    return 6.0 * n_params + 12.0 * layers * heads * head_width * tokens


def mfu(tokens_per_second: float, flops_per_token: float, devices: int, peak: float) -> float:
    """Model FLOPs utilization: the part of the devices' peak FLOP/s that the model's own work takes. With FLOPs that run in place of those that the model
    needs, hardware FLOPs utilization.

    PaLM 540B made 238.3 thousand tokens a second on 6,144 TPU v4 of 275 TFLOP/s: 46.2%, and 45.7% without attention.

    >>> round(mfu(238.3e3, palm_per_token(540.35e9, 118, 48, 256, 2048), 6144, 275e12), 3)
    0.462
    >>> round(mfu(238.3e3, 6 * 540.35e9, 6144, 275e12), 3)
    0.457
    """
    return tokens_per_second * flops_per_token / (devices * peak)
