"""A collective of a compiled program, and what it costs: bytes of its results, and what each device sends when it runs as a ring."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lmeff.core.errors import ConfigError
from lmeff.parallel.replica_groups import Groups

Key = tuple[str, tuple[str, ...]]  # kind, mesh axes

_BITS = {"pred": 8, "token": 0, "s2": 2, "u2": 2, "s4": 4, "u4": 4}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction, as it is reached on one way through the program's calls.

    shapes, dtypes: of its results on one device, several where XLA combined collectives.
    groups: the sets of devices that work together, by their place in the mesh. pairs: of a collective permute, (source, target); its groups are these, too.
    times:  how often it runs in a call of the program: the product of the trip counts of the loops around it, or the number of runs of its branch; NaN where a
        loop does not tell.
    loop:   whether it is inside a while loop. branches: the conditionals around it, outermost first, and which branch of each.
    chain:  names a collective that runs in steps, empty elsewhere.
    inside: the computation that it stands in. origin: the path of the operation in the Python program, with `transpose(...)` for the backward pass.
    """

    kind: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    groups: Groups = frozenset()
    pairs: tuple[tuple[int, int], ...] = ()
    times: float = 1
    loop: bool = False
    branches: tuple[tuple[str, int], ...] = ()
    chain: str = ""
    inside: str = ""
    origin: str = ""

    @property
    def elements(self) -> int:
        """Of all results on one device."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Of all results on one device, in one run."""
        return sum(math.prod(s) * bits(d) for s, d in zip(self.shapes, self.dtypes, strict=True)) // 8

    @property
    def largest(self) -> int:
        """Elements of the largest result."""
        return max(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Devices in a group."""
        return max((len(group) for group in self.groups), default=1)

    def arrays(self) -> "Collective":
        """The same without its scalars, which are counted apart: they cost latency and no bandwidth."""
        kept = [i for i, shape in enumerate(self.shapes) if math.prod(shape) > 1]
        parts = (tuple(x[i] for i in kept) for x in (self.shapes, self.dtypes))
        return dataclasses.replace(self, **dict(zip(("shapes", "dtypes"), parts, strict=True)))


def bits(dtype: str) -> int:
    """Bits of an element: "bf16" is 16, "f8e4m3fn" 8, "s4" 4."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    assert found, dtype
    return int(found.group(1))


def axes_of(collective: Collective, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a collective differ, outermost first; `mesh` is `{axis: size}`, also outermost first."""
    members = [sorted(group) for group in collective.groups]
    places = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())), axis=-1)
    differ = [(places[group] != places[group[:1]]).any(0) for group in members]
    return tuple(axis for axis, here in zip(mesh, np.any(differ, axis=0), strict=True) if here)


def sent(collective: Collective) -> float:
    """Bytes that a device sends in one run, as a ring (`RING`)."""
    if collective.kind == "collective-permute":
        return collective.bytes if any(a != b for a, b in collective.pairs) else 0
    whole = collective.bytes * (collective.size if collective.kind == "reduce-scatter" else 1)
    return whole * RING[collective.kind](collective.size)


def volumes(found: Iterable[Collective], mesh: Mapping[str, int]) -> dict[Key, float]:
    """Bytes that a device sends in a call of the program, by kind and mesh axes; without scalars.

    Raises `ConfigError` where a loop around a collective does not tell how often it runs.
    """
    total: dict[Key, float] = {}
    for collective in found:
        arrays = collective.arrays()
        if arrays.shapes and math.isnan(arrays.times):
            raise ConfigError(
                f"HLO text: {arrays.name} is in a loop that does not tell how often it runs; expected a known_trip_count, or a condition that "
                f"compares with a constant. Its origin: {arrays.origin or 'unknown'}"
            )
        bytes_sent = arrays.times * sent(arrays) if arrays.shapes else 0
        if bytes_sent:
            key = (arrays.kind, axes_of(arrays, mesh))
            total[key] = total.get(key, 0) + bytes_sent
    return total


# What each of n devices in a ring sends, in parts of the whole tensor: what a gather ends with and a reduction starts with. Of an all-to-all, and of a permute
# between neighbours, in parts of what one device holds.
RING: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: 1.0,
    "collective-permute": lambda n: 1.0,
}
