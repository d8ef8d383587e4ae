"""The groups of devices that a collective of a compiled program names, in any of XLA's ways to write them."""

import math
import re

import numpy as np

Groups = frozenset[frozenset[int]]


def device_groups(line: str, devices: int) -> Groups:
    """The groups of `{{0,1},{2,3}}` (and the pairs of a permute), of `[4,2]<=[2,2,2]T(1,0,2)`, of `mesh['a'=2,'b'=4] {'b'}`, or of `{}`, which is all."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if listed:
        return frozenset(frozenset(_numbers(g)) for g in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return _rows(_arranged(iota.group(3), devices).reshape(int(iota.group(1)), int(iota.group(2))))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{([^}]*)\}", line
    )
    if named is None:
        return frozenset([frozenset(range(devices))])
    return _named_groups(named.group(1), named.group(3), _arranged(named.group(2) or f"[{devices}]", devices))


def _named_groups(mesh: str, axes: str, ids: np.ndarray) -> Groups:
    """Groups along axes of a mesh; `'a':(2)4` is the part of size 4 of axis a that comes after a part of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    dims: list[int] = []
    own: list[int] = []
    wanted = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, whole in sizes.items():
        before, size = wanted.get(name, (1, 1))
        own += [len(dims) + 1] if name in wanted else []
        dims += [before, size, whole // before // size]
    moved = np.moveaxis(ids.reshape(dims), own, range(-len(own), 0))
    return _rows(moved.reshape(-1, math.prod(dims[i] for i in own)))


def _arranged(text: str, devices: int) -> np.ndarray:
    """Device numbers as `[2,2,2]T(1,0,2)` arranges them."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore[union-attr]
    ids = np.arange(devices).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _rows(ids: np.ndarray) -> Groups:
    return frozenset(frozenset(map(int, row)) for row in ids)
