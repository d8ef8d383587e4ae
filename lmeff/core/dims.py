"""The letters of every tensor: one vocabulary for names, einsum strings, shapes, shardings and FLOPs.

A tensor's name ends in its letters (`q_BTHC`) and its einsum uses the same letters, so a shape, a sharding
and a cost follow from the string alone.
"""

import math
from collections.abc import Mapping

LETTERS: dict[str, str] = {
    "B": "batch",
    "T": "time (query positions)",
    "S": "positions not cut for sequence parallelism; key positions",
    "D": "model width",
    "H": "query heads",
    "K": "key-value heads",
    "G": "query heads per key-value head",
    "C": "head width",
    "F": "ffn width",
    "V": "vocabulary",
    "L": "layers",
    "E": "experts",
    "R": "rank",
    "N": "flattened tokens",
    "P": "positions of a learned table",
}


def shape(letters: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor from its letters: `shape("DHC", {"D": 8, "H": 2, "C": 4}) == (8, 2, 4)`."""
    return tuple(sizes[letter] for letter in letters)


def split_einsum(equation: str) -> tuple[str, str, str]:
    """Splits `"BTD,DF->BTF"` into its left, right and output letters."""
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    return left, right, out


def contracted(equation: str) -> str:
    """The letters summed over, in the order of the right operand: `contracted("BTHC,HCD->BTD") == "HC"`."""
    left, right, out = split_einsum(equation)
    return "".join(letter for letter in right if letter in left and letter not in out)


def matmul_flops(equation: str, sizes: Mapping[str, int]) -> int:
    """FLOPs of an einsum: 2 x the product of its distinct letters (one multiply and one add each)."""
    left, right, out = split_einsum(equation)
    return 2 * math.prod(sizes[letter] for letter in dict.fromkeys(left + right + out))
