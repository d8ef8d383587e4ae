"""Which shape a slice of TPUs has, and along which of its sides each mesh axis runs."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.parallel.devices import DCN, Topology
from lmeff.parallel.mesh import AXES
from lmeff.plan.hardware import Chip
from lmeff.plan.links import DCN_HOP, FABRIC_HOP, Nested, Side, Switch, Torus, Way


def default_topology(chip: Chip, devices: int, slices: int = 1) -> Topology:
    """The slice that such a number of devices is most likely rented as: sides that are as equal as they can be, and rings where the count allows it.

    Raises `ConfigError` where there is no such slice.
    """
    chips, rest = divmod(devices, chip.cores * slices)
    shapes = [] if rest or not chips or chips > chip.pod else list(_shapes(chips, chip.dims, chip.longest))
    if not shapes:
        raise ConfigError(
            f"topology: got {devices} devices of {chip.name} in {slices} slice(s), expected a multiple of {chip.cores * slices} that makes slices of at most "
            f"{chip.pod} chips with sides up to {chip.longest}; change --devices, or set mesh.dcn to the number of slices"
        )
    # Rings matter only where all sides can be: a 2x16 of v5e has one ring and half the links of a 4x8.
    shape = min(shapes, key=lambda s: (not all(chip.closes(side) for side in s), max(s), sum(s)))
    return Topology(chip.name, "x".join(map(str, shape)), slices)


def _shapes(chips: int, dims: int, longest: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """All shapes of so many chips, sides rising."""
    if dims == 1:
        if least <= chips <= longest:
            yield (chips,)
        return
    for side in range(least, longest + 1):
        if chips % side == 0:
            for others in _shapes(chips // side, dims - 1, longest, side):
                yield (side, *others)


class Ways(NamedTuple):
    """What joins the devices along each axis of a mesh."""

    degrees: Mapping[str, int]
    chip: Chip
    topology: Topology | None
    sides: Mapping[str, tuple[Side, ...]]

    def along(self, axes: Sequence[str]) -> Way:
        """The way along some axes together."""
        if self.topology is None:
            return self._switched(axes)
        inner = Torus(tuple(side for axis in axes for side in self.sides.get(axis, ())))
        if DCN not in axes or self.topology.slices == 1:
            return inner
        outer = self._between_slices()
        return Nested(outer, inner) if inner.size > 1 else outer

    def _between_slices(self) -> Switch:
        """A host's link is shared by its devices."""
        each = self.chip.dcn / (self.chip.host * self.chip.cores)
        return Switch(1, self.degrees[DCN], math.inf, each, DCN_HOP, "dcn")

    def _switched(self, axes: Sequence[str]) -> Switch:
        """Devices are numbered with the last axis fastest; a domain has consecutive ones."""
        stride, members, size = 1, 1, 1
        shared = self.chip.chips(math.prod(self.degrees.values())) == 1  # simulated devices share a memory
        for axis in reversed(AXES):
            degree = self.degrees[axis]
            if axis in axes:
                members *= max(1, math.gcd(degree, max(1, self.chip.domain // stride)))
                size *= degree
            stride *= degree
        inside = self.chip.nvlink / (stride if shared else 1)
        return Switch(
            members, size // members, inside, self.chip.ib, FABRIC_HOP, "nvlink" if members == size else "dcn"
        )


def ways(degrees: Mapping[str, int], chip: Chip, topology: Topology | None = None) -> Ways:
    """The ways of a mesh on chips; TPUs of no topology get the default one. Raises `ConfigError` where the devices are not those of the topology."""
    devices = math.prod(degrees.values())
    if chip.platform != "tpu":
        return Ways(degrees, chip, None, {})
    topology = topology or default_topology(chip, devices, degrees[DCN])
    if topology.family != chip.name or topology.devices != devices:
        raise ConfigError(
            f"topology: got {topology.family}:{topology.shape}:{topology.slices} with {topology.devices} devices, expected {devices} devices of {chip.name}"
        )
    if topology.slices > 1 and degrees[DCN] != topology.slices:
        raise ConfigError(f"mesh.dcn: got {degrees[DCN]} on {topology.slices} slices, expected {topology.slices}")
    inner = {axis: 1 if axis == DCN and topology.slices > 1 else size for axis, size in degrees.items()}
    return Ways(degrees, chip, topology, place(inner, chip, topology))


class _Free(NamedTuple):
    """A side of the slice, and how much of it is taken: devices `taken` apart are neighbours of what is left."""

    length: int
    one_way: float
    closed: bool
    taken: int = 1

    @property
    def left(self) -> int:
        return self.length // self.taken

    def part(self, length: int) -> Side:
        """The next part. Its neighbours are `taken` links apart, and as many rings share each link."""
        ring = self.closed and self.taken * length == self.length and length > 2
        return Side(length, self.one_way / self.taken, ring)


def place(degrees: Mapping[str, int], chip: Chip, topology: Topology) -> dict[str, tuple[Side, ...]]:
    """The sides that each axis runs along, inner axes first, in the way of `jax.experimental.mesh_utils.create_device_mesh`: whole sides, as many as can be,
    else parts of them.

    An axis of 16 on a 4x4x4 torus has two sides and twice the bandwidth of one.
    """
    lengths = [int(side) for side in topology.shape.split("x")]
    free = [_Free(chip.cores, chip.die, False)] if chip.cores > 1 else []
    free += [_Free(n, chip.ici / 2 / chip.cores, chip.closes(n)) for n in lengths]
    found = {}
    for axis in reversed(AXES):
        if degrees[axis] > 1:
            parts = _whole(free, degrees[axis]) or _split(free, degrees[axis])
            found[axis] = tuple(free[i].part(n) for i, n in parts.items())
            for i, n in parts.items():
                free[i] = free[i]._replace(taken=free[i].taken * n)
    return found


def _whole(free: Sequence[_Free], size: int) -> dict[int, int]:
    """Sides of which nothing is taken and whose product is `size`, the most of them."""
    untouched = [i for i, side in enumerate(free) if side.taken == 1 and side.length > 1]
    for count in range(len(untouched), 0, -1):
        for chosen in itertools.combinations(untouched, count):
            if math.prod(free[i].length for i in chosen) == size:
                return {i: free[i].length for i in chosen}
    return {}


def _split(free: Sequence[_Free], size: int) -> dict[int, int]:
    """Parts of sides, the largest first. Degrees and sides have the same product, so that some part is always left."""
    parts: dict[int, int] = {}
    for i in sorted(range(len(free)), key=lambda i: -math.gcd(size, free[i].left)):
        part = math.gcd(size, free[i].left)
        if part > 1:
            parts[i], size = part, size // part
    assert size == 1, "degrees and sides have different products"
    return parts
