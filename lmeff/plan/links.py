"""How long a collective takes on a torus of neighbours, on a switch, or between slices.

Bandwidth follows the Scaling Book (https://jax-ml.github.io/scaling-book/sharding): on a ring both directions carry data, so an all-gather of P bytes takes
P / (2 x one way), and axes of a torus add up. A line lacks the closing link and takes twice as long. Below some size only hops count: a collective takes the
longer of the two.

Every way has the same three methods: `gather(bytes)` of a whole tensor (a reduction to parts takes as long), `exchange(bytes)` of what a device holds, all to
all, and `send(bytes)` to the next device.
"""

import math
from typing import NamedTuple, Protocol

ICI_HOP = 1e-6  # Scaling Book: about a microsecond a hop
SWITCH_HOP = 1e-6  # an assumption of the same order
FABRIC_HOP = 5e-6  # InfiniBand, with NCCL's own work; an assumption
DCN_HOP = 20e-6  # data-center network: an assumption


class Way(Protocol):
    """What devices along some mesh axes are joined by."""

    @property
    def network(self) -> str:
        """ "ici", "dcn" or "nvlink": the slowest of them."""
        ...

    @property
    def size(self) -> int:
        """Devices that are joined."""
        ...

    def gather(self, data: float) -> float:
        """Seconds of an all-gather that ends with so many bytes."""
        ...

    def exchange(self, data: float) -> float:
        """Seconds of an all-to-all of so many bytes on each device."""
        ...

    def send(self, data: float) -> float:
        """Seconds of a permute of so many bytes."""
        ...


class Side(NamedTuple):
    """Devices along one side of a torus, or a part of it. one_way: bytes/s to a neighbour, for one of the rings that share the link."""

    length: int
    one_way: float
    ring: bool

    @property
    def both_ways(self) -> float:
        """Bytes/s that a device sends when data goes round."""
        return self.one_way * (2 if self.ring else 1)

    @property
    def hops(self) -> float:
        """To the farthest device."""
        return self.length / 2 if self.ring else self.length - 1


class Torus(NamedTuple):
    """Sides of a torus of chips."""

    sides: tuple[Side, ...]
    network: str = "ici"

    @property
    def size(self) -> int:
        """Devices that are joined."""
        return math.prod(side.length for side in self.sides)

    def gather(self, data: float) -> float:
        """All sides at a time, each with its part of the data."""
        rate = sum(side.both_ways for side in self.sides)
        hops = sum(side.hops for side in self.sides)
        return max((self.size - 1) / self.size * data / rate, hops * ICI_HOP)

    def exchange(self, data: float) -> float:
        """The longest side is the last to finish. On a ring of n, bytes go n / 4 links far on average: a quarter of a gather of all devices' data."""
        return max(max(side.length * data / (4 * side.both_ways), side.hops * ICI_HOP) for side in self.sides)

    def send(self, data: float) -> float:
        """One hop, one direction."""
        return data / min(side.one_way for side in self.sides) + ICI_HOP


class Switch(NamedTuple):
    """Groups of `members` that a switch joins, and `groups` of them that a slower network joins through a link of each member.

    inside, outside: bytes/s that a device sends to its group, and out of it.
    """

    members: int
    groups: int
    inside: float
    outside: float
    hop: float
    network: str

    @property
    def size(self) -> int:
        """Devices that are joined."""
        return self.members * self.groups

    @property
    def hops(self) -> float:
        """Seconds of the hops of a tree over the groups, and of a switch within."""
        return self.hop * math.ceil(math.log2(self.groups)) + SWITCH_HOP * (self.members > 1)

    def gather(self, data: float) -> float:
        """Members bring what other groups have over all their links, while they exchange what each has or has brought."""
        within = (self.members - 1) / self.members * data / self.inside if self.members > 1 else 0.0
        between = (self.groups - 1) / self.groups * data / (self.members * self.outside) if self.groups > 1 else 0.0
        return max(within, between, self.hops)

    def exchange(self, data: float) -> float:
        """What goes out of a group leaves by the device's own link."""
        within = (self.members - 1) / self.size * data / self.inside if self.members > 1 else 0.0
        between = (self.size - self.members) / self.size * data / self.outside if self.groups > 1 else 0.0
        return max(within, between, self.hops)

    def send(self, data: float) -> float:
        """The slowest neighbours decide."""
        return data / (self.inside if self.groups == 1 else self.outside) + self.hops


class Nested(NamedTuple):
    """An outer way over groups that an inner way joins: first the inner devices share the work, so that each takes its part over the outer network."""

    outer: Way
    inner: Way

    @property
    def network(self) -> str:
        """The slower one."""
        return self.outer.network

    @property
    def size(self) -> int:
        """Devices that are joined."""
        return self.outer.size * self.inner.size

    def gather(self, data: float) -> float:
        """One after the other."""
        return self.outer.gather(data / self.inner.size) + self.inner.gather(data)

    def exchange(self, data: float) -> float:
        """One after the other."""
        return self.outer.exchange(data) + self.inner.exchange(data)

    def send(self, data: float) -> float:
        """The slower neighbours decide."""
        return max(self.outer.send(data), self.inner.send(data))


def seconds(kind: str, way: Way, data: float) -> float:
    """Of one collective; `data` as `lmeff.parallel.volume.Term.elements` counts: the whole tensor, or what a device holds for an all-to-all and a permute."""
    if kind in ("all-gather", "reduce-scatter"):
        return way.gather(data)
    if kind == "all-reduce":
        return 2 * way.gather(data)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return way.exchange(data)
    assert kind == "collective-permute", kind
    return way.send(data)
