"""Packed leaves as the matrices of somebody else's checkpoint, and back: codes, scales and zero points travel alike.

What `stored.py` says of a leaf's values holds for its scales, too, once the letters that share a scale are as short as the scale: one for a scale of each
output, the number of groups for groups. So a packed leaf needs no description of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import QFormat, QTensor
from lmeff.core.specs import ParamSpec
from lmeff.interop.compressed import fitted
from lmeff.interop.place import fetch_tensor
from lmeff.interop.stored import Piece, Stored, stored_value

Sizes = Mapping[str, int]
OUT_IN = (-1,)  # the axes of a matrix [out, in] that share a scale


def is_linear(stored: Stored, spec: ParamSpec) -> bool:
    """Whether the stored matrix is [out, in]: what contracts it lies last, whole and alone."""
    dims = stored.dims.split(" ")
    return spec.is_matmul and len(dims) == 2 and dims[1] == spec.contract


def packed_matrix(
    name: str,
    parts: Sequence[Piece],
    leaves: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
    sizes: Sizes,
    *,
    shapes: bool = False,
) -> QTensor:
    """The stored matrix [out, in] that these pieces of packed leaves make up, in NumPy; with `shapes` zeros in its place, and no number is fetched.

    Raises `ConfigError` where the parts of a fused matrix differ in their formats, or groups begin anew within a head and do not divide it.
    """
    first = leaves[parts[0].path]
    for piece in parts:
        other = leaves[piece.path]
        if not isinstance(other, QTensor) or other.format != first.format:
            got = other.format if isinstance(other, QTensor) else "no format"
            raise ConfigError(
                f"{name}: got {first.format} for {parts[0].path} and {got} for {piece.path}, expected one format for both: they are stored as one matrix. "
                "Quantize them alike."
            )
    format, spec = first.format, specs[parts[0].path]
    groups, format = _groups(format, spec, sizes, name)

    def fetched(field: str, path: str, at: tuple[int, ...]) -> np.ndarray:
        array = getattr(leaves[path], field)
        return np.broadcast_to(np.int8(0), array.shape[len(at) :]) if shapes else fetch_tensor(array, *at)

    def part(field: str, piece: Piece) -> np.ndarray:
        value = fetched(field, piece.path, piece.at)
        own = dict.fromkeys(piece.letters[len(piece.at) :], 1) if format.granularity == "tensor" else groups
        return stored_value([piece._replace(stored=_alone(piece.stored))], lambda *_: value, {**sizes, **own})

    codes = stored_value(list(parts), lambda path, at: fetched("q", path, at), sizes)
    rows = [_rows(piece, sizes) for piece in parts]
    joined = (
        len(parts) > 1 and format.granularity == "tensor"
    )  # each part has its own one: a scale for each output then
    scale, zero = (
        None
        if getattr(first, field) is None
        else np.concatenate(
            [np.repeat(part(field, p), n if joined else 1, 0) for p, n in zip(parts, rows, strict=True)]
        )
        for field in ("scale", "zero")
    )
    if joined:
        format = dataclasses.replace(format, granularity="channel")
    axes = (-2, -1) if format.granularity == "tensor" else OUT_IN
    return fitted(QTensor(codes, scale, zero, format, axes, first.dtype), name)


def _alone(stored: Stored) -> Stored:
    """A part of a fused matrix as if it were stored by itself."""
    return Stored(stored.name, " ".join(stored.own()))


def _rows(piece: Piece, sizes: Sizes) -> int:
    return int(np.prod([sizes[letter] for letter in piece.stored.own()[0]]))


def _groups(format: QFormat, spec: ParamSpec, sizes: Sizes, name: str) -> tuple[dict[str, int], QFormat]:
    """How long the scale is in the letters that contract the weight, and the format of the whole matrix.

    Groups run along the last of these letters and begin anew with every other one (heads): one longer than a head is as long as it.
    """
    short = dict.fromkeys(spec.contract, 1)
    if format.granularity != "group":
        return short, format
    assert format.group is not None
    last, size = spec.contract[-1], sizes[spec.contract[-1]]
    short |= {letter: sizes[letter] for letter in spec.contract[:-1]} | {last: -(-size // format.group)}
    if len(spec.contract) == 1:
        return short, format
    group = min(format.group, size)
    if size % group:
        raise ConfigError(
            f"{name}: got the format {format} over heads of {size} inputs, whose last groups have only {size % group}; compressed-tensors knows whole groups "
            f"alone. Quantize it with groups that divide {size} (such as {np.gcd(size, group)}) or with a scale for each output."
        )
    return short, dataclasses.replace(format, group=group)


def packed_leaf(
    path: str, spec: ParamSpec, stored: Stored, sizes: Sizes, read: Callable[..., QTensor], dtype: str | None
) -> QTensor:
    """The leaf, in NumPy, whose matrices [out, in] are `read(*at)` for each place of its stacks: the inverse of `packed_matrix`.

    dtype: of the values; None keeps that of the matrices. Raises `CheckpointError` where a group lies across heads in a way that no group of a head can say.
    """
    stacks = stored.stacks(spec.letters)
    found = [_own_part(read(*at), stored, sizes) for at in np.ndindex(*(sizes[letter] for letter in stacks))]
    format, repeat = _leaf_format(found[0].format, spec, sizes, path)
    own = spec.letters.removeprefix(stacks)
    stack = [sizes[letter] for letter in stacks]

    def whole(field: str, short: Sizes, times: int = 1) -> np.ndarray | None:
        if getattr(found[0], field) is None:
            return None
        flat = "".join(stored.own())
        each = [np.repeat(getattr(t, field), times, axis=1).reshape([short[letter] for letter in flat]) for t in found]
        turned = [x.transpose([flat.index(letter) for letter in own]) for x in each]
        return np.stack(turned).reshape(*stack, *turned[0].shape) if stack else turned[0]

    tensor = format.granularity == "tensor"
    groups = dict.fromkeys(own if tensor else spec.contract, 1)
    if format.granularity == "group":
        groups |= {letter: sizes[letter] for letter in spec.contract}
        groups[spec.contract[-1]] = sizes[spec.contract[-1]] // (format.group or 1)
    short = {**sizes, **groups}
    axes = spec.own_axes if tensor else spec.axes
    codes, scale, zero = whole("q", sizes), whole("scale", short, repeat), whole("zero", short, repeat)
    return QTensor(codes, scale, zero, format, axes, dtype or found[0].dtype)


def _own_part(t: QTensor, stored: Stored, sizes: Sizes) -> QTensor:
    """The rows of this part of a fused matrix."""
    parts = stored.dims.split(" ")[0].split("+")
    if len(parts) == 1:
        return t
    counts = [int(np.prod([sizes[letter] for letter in part])) for part in parts]
    start = sum(counts[: stored.part])
    rows = slice(start, start + counts[stored.part])
    one = t.format.granularity == "tensor"
    scale, zero = (x if x is None or one else x[rows] for x in (t.scale, t.zero))
    return QTensor(t.q[rows], scale, zero, t.format, t.axes, t.dtype)


def _leaf_format(format: QFormat, spec: ParamSpec, sizes: Sizes, path: str) -> tuple[QFormat, int]:
    """The format of the leaf, and how many times each scale is repeated: a group of several heads is the same group for each of them."""
    if format.granularity != "group" or len(spec.contract) == 1:
        return format, 1
    assert format.group is not None
    size = sizes[spec.contract[-1]]
    if size % format.group == 0:
        return format, 1
    if format.group % size == 0:
        return dataclasses.replace(format, group=size), format.group // size
    raise CheckpointError(
        f"{path}: got groups of {format.group} inputs over heads of {size}, expected one of the two to divide the other; nothing is loaded. "
        "Load the model's own weights and quantize them on opening."
    )
