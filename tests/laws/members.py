"""The table of the laws: every registered transform, alone and composed. A new transform adds its rows here and nothing else."""

from lmeff.compress.base import by_rule, chain, identity, only
from lmeff.compress.config import Prune, Quantize, build
from lmeff.compress.prune import Ramp, magnitude_pruning
from lmeff.compress.quantize import fake_quantization
from lmeff.core.numerics import parse_format

REST = (".*", None)
SOME = "blocks/(attn/wo|mlp/up)"  # one or two contracted dims; fewer leaves compile sooner
CHOSEN = ((SOME, True), (".*", False))


def prune(**options):
    return build((Prune(rules=CHOSEN, **options),))


def quantize(format, method="minmax"):
    return build((Quantize(method=method, rules=((SOME, format), REST)),))


def pruned_and_quantized(format, method="minmax", **options):
    return build((Prune(rules=CHOSEN, **options), Quantize(method=method, rules=((SOME, format), REST))))


MEMBERS = {
    "identity": identity(),
    "int8": quantize("int8"),
    "int8-affine": quantize("int8-affine"),
    "int8/tensor": quantize("int8/tensor"),
    "int4/g8": quantize("int4/g8"),
    "int3-affine/g12, ragged": quantize("int3-affine/g12"),
    "int2": quantize("int2"),
    "fp8": quantize("fp8"),
    "fp8/tensor": quantize("fp8/tensor"),
    "fp8/g12, ragged": quantize("fp8/g12"),
    "several formats, embedding too": by_rule(
        (("embed/table", "int8"), ("blocks/attn/w.", "int8-affine"), ("blocks/mlp/down", "int4/g32"), REST),
        lambda text: fake_quantization(parse_format(text)),
    ),
    "lsq int4": quantize("int4", "lsq"),
    "lsq int8-affine/g16": quantize("int8-affine/g16", "lsq"),
    "lsq fp8": quantize("fp8", "lsq"),
    "prune": prune(sparsity=0.6),
    "prune and quantize every matrix": build((Prune(sparsity=0.5), Quantize())),
    "prune globally": prune(sparsity=0.6, scope="global"),
    "prune 2:4": prune(pattern="2:4"),
    "prune by schedule": prune(sparsity=0.75, begin=1, end=5),
    "prune, int8-affine": pruned_and_quantized("int8-affine", sparsity=0.5),
    "prune 2:4, fp8": pruned_and_quantized("fp8", pattern="2:4"),
    "prune globally by schedule, int8": pruned_and_quantized("int8", sparsity=0.5, scope="global", end=4),
    "prune 2:4, lsq int4/g8": pruned_and_quantized("int4/g8", "lsq", pattern="2:4"),
    "only": only((("blocks/mlp/(up|down)", True), (".*", False)), fake_quantization(parse_format("int4"))),
}

# Members that change nothing: no sparsity, no format, no leaf, or a schedule that has not begun.
NEUTRAL = {
    "identity": identity(),
    "empty chain": chain(),
    "no sparsity": prune(sparsity=0.0),
    "no sparsity globally": prune(sparsity=0.0, scope="global", end=9),
    "all of each group": only((("blocks/mlp/up", True), (".*", False)), magnitude_pruning(Ramp(0.0), pattern=(4, 4))),
    "before the schedule": prune(sparsity=0.5, begin=7, end=9),
    "no format": build((Quantize(rules=(REST,)),)),
    "no leaf": only(((".*", False),), fake_quantization(parse_format("int4"))),
    "chain of neutrals": build((Prune(sparsity=0.0, rules=CHOSEN), Quantize(rules=(REST,)))),
}
