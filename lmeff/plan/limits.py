"""When a layout is bound by the network rather than by arithmetic: the closed forms of the Scaling Book (https://jax-ml.github.io/scaling-book/training).

They are about one large matrix product after another in bfloat16, forward and backward, on rings: quick answers, and anchors for the estimates.
"""

import math

from lmeff.plan.hardware import Chip


def alpha(of: Chip) -> float:
    """FLOPs that a chip could do for each byte it sends along one torus axis (or to its NVLink domain).

    >>> from lmeff.plan.hardware import chip
    >>> round(alpha(chip("v5p")))
    2550
    """
    return of.rate("bfloat16") / (of.ici or of.nvlink)


def data_limit(of: Chip, axes: int = 1) -> float:
    """Tokens a chip below which data parallelism and FSDP over so many torus axes are bound by the network.

    >>> from lmeff.plan.hardware import chip
    >>> round(data_limit(chip("v5p"), axes=3))
    850
    """
    return alpha(of) / axes


def tensor_limit(of: Chip, ffn: int, axes: int = 1) -> float:
    """The degree above which tensor parallelism over so many torus axes is bound by the network, for an ffn of that width.

    >>> from lmeff.plan.hardware import chip
    >>> int(tensor_limit(chip("v5p"), 30_000))
    11
    """
    return axes * ffn / alpha(of)


def fsdp_share(tokens: float, ffn: int, devices: int, fsdp_axes: int, tensor_axes: int) -> float:
    """The degree of FSDP beside tensor parallelism that moves the fewest bytes, for a batch of so many tokens and an axis count for each.

    >>> round(fsdp_share(48 * 1024, 32_768, 64, 2, 1), 1)
    13.9
    """
    return math.sqrt(tokens / ffn * fsdp_axes / tensor_axes * devices)


def mixed_limit(of: Chip, ffn: int, fsdp_axes: int, tensor_axes: int) -> float:
    """Tokens a chip below which FSDP beside tensor parallelism, at their best shares, are bound by the network.

    >>> from lmeff.plan.hardware import chip
    >>> round(mixed_limit(chip("v5p"), 32_768, 2, 1))
    397
    """
    return 4 * alpha(of) ** 2 / (fsdp_axes * tensor_axes * ffn)


def slice_limit(of: Chip, dcn: float | None = None) -> float:
    """Tokens of a slice below which data parallelism between slices is bound by the data-center network; `dcn` in bytes/s of a host.

    >>> from lmeff.plan.hardware import chip
    >>> round(slice_limit(chip("v5p")) / 1000, 1)
    73.4
    """
    return of.host * of.rate("bfloat16") / (dcn or of.dcn)


def critical_batch(of: Chip, *, weights: float = 16, arithmetic: str = "bfloat16") -> float:
    """Tokens at a time from which a product is bound by arithmetic and not by reading its weights, of so many bits each.

    >>> from lmeff.plan.hardware import chip
    >>> round(critical_batch(chip("v5e"))), round(critical_batch(chip("v5e"), weights=8))
    (241, 120)
    """
    return of.rate(arithmetic) * weights / 16 / of.bandwidth
