"""Sums over the operations of a traced program that somebody needs: what XLA would drop as dead does not count, and a loop counts as often as it turns.

XLA's own `cost_analysis()` counts the body of a loop once, however often it runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

Weigh = Callable[[Any], float]
"""What one operation (a `JaxprEqn`) counts."""


def total(closed: Any, weigh: Weigh) -> float:
    """The sum of `weigh` over the operations that the outputs of a `ClosedJaxpr` need.

    Of branches the heaviest counts. A loop whose number of turns is not known when it is traced counts one turn.
    """
    return _sum(closed.jaxpr, [True] * len(closed.jaxpr.outvars), weigh)[0]


def traced(fn: Callable[..., Any], *shapes: Any) -> Any:
    """The `ClosedJaxpr` of a function on shapes."""
    return jax.make_jaxpr(fn)(*shapes)


def product_flops(active: float = 0.0) -> Weigh:
    """Weighs products of arrays by their FLOPs. active: rows of a product of groups that have a token (the others are a buffer's empty end)."""

    def weigh(eqn: Any) -> float:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        if name.startswith("ragged_dot"):
            out, right = eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape
            return 2.0 * active * math.prod(out[1:] if len(out) == 3 else right[1:])
        return 0.0

    return weigh


def elementwise_flops(eqn: Any) -> float:
    """One for each number that arithmetic on single numbers makes, or that a reduction reads. Casts, copies and moves are none."""
    name = eqn.primitive.name
    if name in REDUCTIONS:
        return float(math.prod(eqn.invars[0].aval.shape))
    return float(math.prod(eqn.outvars[0].aval.shape)) if name in ARITHMETIC else 0.0


def named(name: str) -> Weigh:
    """Weighs what `checkpoint_name` calls so as 1."""
    return lambda eqn: float(eqn.primitive.name == "name" and eqn.params["name"] == name)


def _sum(jaxpr: Any, needed: Sequence[bool], weigh: Weigh) -> tuple[float, list[bool]]:
    """The sum, and which inputs are needed for the outputs that are."""
    live = {var for var, need in zip(jaxpr.outvars, needed, strict=True) if need and _is_var(var)}
    found = 0.0
    for eqn in reversed(jaxpr.eqns):
        wanted = [var in live for var in eqn.outvars]
        if not any(wanted) and not eqn.effects:  # kernels write to memory and give nothing
            continue
        own, inputs = _operation(eqn, wanted, weigh)
        found += own
        live |= {var for var, need in zip(eqn.invars, inputs, strict=True) if need and _is_var(var)}
    return found, [var in live for var in jaxpr.invars]


def _operation(eqn: Any, wanted: list[bool], weigh: Weigh) -> tuple[float, list[bool]]:
    own, everything = weigh(eqn), [True] * len(eqn.invars)
    inner = _inner(eqn)
    if not inner:
        return own, everything
    if len(inner) == 1 and _alike(inner[0], eqn):  # a call
        found, inputs = _sum(inner[0], wanted, weigh)
        return own + found, inputs
    sums = [_sum(jaxpr, [True] * len(jaxpr.outvars), weigh)[0] for jaxpr in inner]
    if eqn.primitive.name == "cond":
        return own + max(sums), everything
    return own + eqn.params.get("length", 1) * sum(sums), everything


def _inner(eqn: Any) -> list[Any]:
    """The programs within an operation."""
    found = []
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)  # of a `ClosedJaxpr`
            if hasattr(part, "eqns"):
                found.append(part)
    return found


def _alike(jaxpr: Any, eqn: Any) -> bool:
    """Whether inputs and outputs are those of the operation, one for one: a function that is called once."""
    counts = len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)
    return counts and eqn.primitive.name not in LOOPS


def _is_var(var: Any) -> bool:
    return not hasattr(var, "val")  # literals have one


LOOPS = ("scan", "while", "cond", "pallas_call")
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "cumsum")
# fmt: off
ARITHMETIC = frozenset((
    "add", "sub", "mul", "div", "rem", "neg", "sign", "abs", "max", "min", "floor", "ceil", "round", "clamp", "select_n", "sqrt", "rsqrt", "cbrt",
    "square", "integer_pow", "pow", "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sin", "cos", "is_finite",
    "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "shift_left", "shift_right_logical", "shift_right_arithmetic",
))
# fmt: on
