"""JSON values to dataclasses, checked against their annotations."""

import dataclasses
import math
import types
import typing
from typing import Any


class Mismatch(ValueError):
    """A JSON value that does not fit its annotation; says where, got, expected."""


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass, tuple, dict, union with None, scalar or Any. Null is NaN where a float is expected."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in arguments if a is not types.NoneType)
        return None if value is None else decode(inner, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        return {key: decode(arguments[1], inner, f"{where}.{key}") for key, inner in value.items()}
    return _scalar(kind, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    hints = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - value.keys()):
        raise Mismatch(f"{where}: lacks {', '.join(missing)}")
    if unknown := sorted(value.keys() - hints.keys()):
        raise Mismatch(f"{where}: holds {', '.join(unknown)}, which this version does not know")
    return kind(**{name: decode(hints[name], inner, f"{where}.{name}") for name, inner in value.items()})


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    _expect(len(arguments) == len(value), f"{len(arguments)} entries", value, where)
    return tuple(decode(kind, inner, f"{where}[{i}]") for i, (kind, inner) in enumerate(zip(arguments, value)))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        _expect(value is None or type(value) in (int, float), "a number", value, where)
        return math.nan if value is None else float(value)
    _expect(type(value) is kind, kind.__name__, value, where)
    return value


def _expect(holds: bool, what: str, value: Any, where: str) -> None:
    if not holds:
        raise Mismatch(f"{where}: got {str(value)[:80]!r}, expected {what}")
