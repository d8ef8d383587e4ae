"""Bytes by formula, for the back of an envelope. What a device really holds is counted from the code's own arrays, elsewhere in this room."""

import math


def quantized_bytes(
    params: int, bits: int, group: int | None = None, scale_bits: int = 32, zero_bits: int = 0
) -> float:
    """Bytes of so many weights in `bits` each, with a scale (and a zero point) for each run of `group`; without a group scales are left out.

    Codes are packed: 3 bits take 3 bits. lmeff's arrays have slots of 4 or 8 (`compress.storage`).

    >>> quantized_bytes(7_000_000_000, 4)
    3500000000.0
    >>> quantized_bytes(1024, 4, group=32, scale_bits=16)
    576.0
    >>> quantized_bytes(1024, 4, group=32, scale_bits=16, zero_bits=4) * 8 / 1024  # bits a weight
    4.625
    """
    groups = 0 if group is None else math.ceil(params / group)
    return (params * bits + groups * (scale_bits + zero_bits)) / 8


def zero_bytes_per_parameter(stage: int, devices: int) -> float:
    """Bytes of model state a parameter takes on each of so many data-parallel devices, with Adam in mixed precision (Rajbhandari et al. 2020,
    https://arxiv.org/abs/1910.02054, section 3.1 and figure 1): 2 for the weight and 2 for its gradient in 16 bits, 12 for weight and moments in 32.

    stage: 0 cuts nothing, 1 the 12, 2 also gradients, 3 also weights.

    >>> [zero_bytes_per_parameter(stage, 64) for stage in (0, 1, 2, 3)]
    [16.0, 4.1875, 2.21875, 0.25]

    The paper's 7.5 billion parameters on 64 devices, in GB:

    >>> [round(7.5 * zero_bytes_per_parameter(stage, 64), 1) for stage in (0, 1, 2, 3)]
    [120.0, 31.4, 16.6, 1.9]
    """
    whole = {0: 16.0, 1: 4.0, 2: 2.0, 3: 0.0}[stage]
    return whole + (16 - whole) / devices
