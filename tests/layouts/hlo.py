"""Reads the collectives of a compiled program: kind, bytes, groups of devices, and whether a loop repeats them or a branch guards them."""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


class Collective(NamedTuple):
    """One collective instruction.

    shapes: of its results on one device. groups: the sets of devices that take part (of a permute: its pairs). loop: inside the body of a while
    loop. branches: the branches of conditionals that it is inside of, by the name of their computation.
    origin: the path of the operation in the Python program, with `transpose(...)` for the backward pass.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    groups: frozenset[frozenset[int]]
    loop: bool
    origin: str
    branches: frozenset[str] = frozenset()

    @property
    def elements(self):
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self):
        return sum(math.prod(s) * ITEM[d] for s, d in zip(self.shapes, self.dtypes, strict=True))

    @property
    def largest(self):
        return max(math.prod(shape) for shape in self.shapes)


def computations(text):
    """`{name: lines}` of an HLO module."""
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\([^{]*)?\{\s*$", line) or re.match(
            r"(?:ENTRY )?%?([\w.\-]+) \(.*\{", line
        )
        if head and not line.startswith(" "):
            name = head.group(1)
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def calls_of(parts, *, skip=r"^$"):
    """`{computation: those it calls}`, of whatever kind; lines that match `skip` are left out."""
    calls = {}
    for name, lines in parts.items():
        found = set()
        for line in lines:
            found |= set() if re.search(skip, line) else called(line)
        calls[name] = found & parts.keys()
    return calls


def called(line):
    """The computations that one instruction names."""
    found = set(re.findall(r"(?:calls|to_apply|body|condition|\w+_computation|computation)=%?([\w.\-]+)", line))
    for names in re.findall(r"(?:calls|branch_computations)=\{([^}]*)\}", line):
        found |= {name.strip(" %") for name in names.split(",")}
    return found


def reachable(calls, roots):
    """The computations that run where one of these does."""
    inside, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            todo += calls[name]
    return inside


def called_by(parts, kind):
    """The computations that instructions of a kind call."""
    found = set()
    for lines in parts.values():
        for line in lines:
            found |= called(line) if re.search(kind, line) else set()
    return found & parts.keys()


def loop_bodies(parts):
    """The names of all computations that run inside some while loop."""
    return reachable(calls_of(parts), called_by(parts, r"\bwhile\("))


def branches(parts):
    """`{branch of a conditional: all computations that run nowhere but inside it or other branches}`."""
    conditional = r"\bconditional\("
    calls = calls_of(parts)
    entry = parts.keys() - set().union(*calls.values())
    always = reachable(calls_of(parts, skip=conditional), entry)
    return {root: reachable(calls, [root]) - always for root in called_by(parts, conditional)}


def device_groups(line, devices):
    """The groups of `{{0,1},{2,3}}`, of `[4,2]<=[2,2,2]T(1,0,2)`, or of `mesh['a'=2,'b'=4] {'b'}`."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if listed:
        return frozenset(frozenset(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        ids = np.arange(devices).reshape(_numbers(iota.group(3)))
        ids = ids.transpose(_numbers(iota.group(4))) if iota.group(4) else ids
        return _rows(ids.reshape(int(iota.group(1)), int(iota.group(2))))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line
    )
    assert named, line
    assert ":" not in named.group(4), line  # part of an axis
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
    own = re.findall(r"'(\w+)'", named.group(4))
    ids = np.arange(devices)
    if named.group(2):
        ids = ids.reshape(_numbers(named.group(2)))
        ids = ids.transpose(_numbers(named.group(3))) if named.group(3) else ids
    ids = ids.reshape(list(axes.values()))
    moved = np.moveaxis(ids, [list(axes).index(axis) for axis in own], range(-len(own), 0))
    return _rows(moved.reshape(-1, math.prod(axes[axis] for axis in own)))


def _numbers(text):
    return [int(n) for n in text.split(",")]


def _rows(ids):
    return frozenset(frozenset(map(int, row)) for row in ids)


def collectives(text, devices=8):
    """All collectives of a compiled program's text."""
    parts = computations(text)
    inside, guarded = loop_bodies(parts), branches(parts)
    found = []
    for name, lines in parts.items():
        for line in lines:
            match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(KINDS) + r")(-start)?\(", line)
            if match is None:
                continue
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    kind=match.group(2),
                    shapes=tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in shapes),
                    dtypes=tuple(dtype for dtype, _ in shapes),
                    groups=device_groups(line, devices),
                    loop=name in inside,
                    origin=origin.group(1) if origin else "",
                    branches=frozenset(root for root, within in guarded.items() if name in within),
                )
            )
    return found
