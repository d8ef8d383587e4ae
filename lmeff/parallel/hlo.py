"""Reads the collectives of a compiled program's text: kind, bytes, devices, and how often each runs in a call of the program.

For what XLA writes for the CPU and for TPUs. A TPU's reduce-scatter is a fusion of an all-reduce and a slice, and a collective that runs beside other work
may be spread over several fusions: both are read as what they are.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.parallel.collective import RING, Collective
from lmeff.parallel.replica_groups import device_groups

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COLLECTIVE = re.compile("(" + "|".join(RING) + r")(-start)?$")


class Conditional(NamedTuple):
    """A conditional that holds collectives: `times` it is reached, how many branches it has, the conditionals around it, its path in the Python program."""

    name: str
    times: float
    count: int
    around: tuple[tuple[str, int], ...]
    origin: str


Taken = Callable[[Conditional], Sequence[float]]


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str

    def names(self, *attributes: str) -> list[str]:
        """Computations named by attributes, `body=%a` or `branch_computations={%a, %b}`."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest)
        return [name.strip(" %") for many, one in found for name in (many or one).split(",")]

    @property
    def origin(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


def computations(text: str) -> dict[str, list[str]]:
    """`{name: lines}` of a program; the one that is run first is also there as "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$", line)
        if head and not line.startswith((" ", "HloModule")):
            lines = found.setdefault(head.group(2), [])
            if head.group(1):
                found["ENTRY"] = lines
        elif re.match(r"\}(?!\})", line):  # a kernel's text may end in a line that begins with two
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def collectives(text: str, taken: Taken | None = None) -> list[Collective]:
    """All collectives of a compiled program's text, each once for every way it is reached; the two halves of an asynchronous one count once.

    taken: how often each branch of a conditional is taken in a call of the program; without it, every branch counts as if it were always taken.
    """
    parts = {name: [_parse(line) for line in lines] for name, lines in computations(text).items()}
    parts = {name: [i for i in found if i is not None] for name, found in parts.items()}
    if "ENTRY" not in parts:
        raise ConfigError(
            "HLO text: got no ENTRY computation, expected the text of a compiled program (`compiled.as_text()`)"
        )
    devices = re.search(r"num_partitions=(\d+)", text)
    walk = _Walk(parts, int(devices.group(1)) if devices else 1, taken)
    return _whole(list(walk.through("ENTRY", Collective(kind="", name="", shapes=(), dtypes=()))))


def _whole(found: list[Collective]) -> list[Collective]:
    """Counts once what a TPU runs in steps, spread over several fusions: the steps have one `chain`, and its first and last stand where it belongs."""
    least: dict[str, float] = {}
    for c in found:
        least[c.chain] = min(least.get(c.chain, c.times), c.times)
    seen: set[str] = set()
    kept = []
    for c in found:
        if not c.chain or (c.chain not in seen and not c.times > least[c.chain]):
            kept.append(c)
            seen.add(c.chain)
    return kept


def _parse(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    return _Instruction(*match.groups()) if match else None


class _Walk:
    """Follows calls from the entry. `at` below says where: how often, in which loops and branches."""

    def __init__(self, parts: Mapping[str, list[_Instruction]], devices: int, taken: Taken | None) -> None:
        self.parts, self.devices, self.taken = parts, devices, taken
        self.known: dict[str, bool] = {}

    def through(self, name: str, at: Collective) -> Iterator[Collective]:
        """All collectives of a computation and of what it calls."""
        for instruction in self.parts[name]:
            match = _COLLECTIVE.match(instruction.opcode)
            if match:
                yield _collective(instruction, match.group(1), self.devices, dataclasses.replace(at, inside=name))
            for target, there in self.calls(instruction, at):
                yield from map(functools.partial(_scattered, instruction), self.through(target, there))

    def calls(self, instruction: _Instruction, at: Collective) -> Iterator[tuple[str, Collective]]:
        """What an instruction calls, and how often."""
        if instruction.opcode == "while":
            if any(map(self.holds, instruction.names("body", "condition"))):
                loop = dataclasses.replace(at, times=at.times * self.trips(instruction), loop=True)
                yield from ((name, loop) for name in instruction.names("body", "condition"))
        elif instruction.opcode == "conditional":
            yield from self.branches(instruction, at)
        elif not instruction.opcode.endswith(("-done", "-update")):
            names = instruction.names("calls", "to_apply", "called_computations")
            yield from ((name, at) for name in names if self.holds(name))

    def branches(self, instruction: _Instruction, at: Collective) -> Iterator[tuple[str, Collective]]:
        """The branches of a conditional that hold collectives; of an if, the one for false comes first."""
        names = instruction.names("branch_computations") or instruction.names("false_computation", "true_computation")
        if "true_computation" in instruction.rest:
            names = instruction.names("false_computation") + instruction.names("true_computation")
        if not any(map(self.holds, names)):
            return
        seen = Conditional(instruction.name, at.times, len(names), at.branches, instruction.origin)
        counts = [at.times] * len(names) if self.taken is None else self.taken(seen)
        for index, (name, times) in enumerate(zip(names, counts, strict=True)):
            if self.holds(name):
                yield name, dataclasses.replace(at, times=times, branches=(*at.branches, (instruction.name, index)))

    def holds(self, name: str) -> bool:
        """Whether a computation, or what it calls, holds a collective."""
        if name not in self.known:
            attributes = ("calls", "to_apply", "called_computations", "body", "condition", "branch_computations")
            attributes += ("true_computation", "false_computation")
            self.known[name] = any(
                _COLLECTIVE.match(i.opcode) or any(map(self.holds, i.names(*attributes)))
                for i in self.parts.get(name, ())
            )
        return self.known[name]

    def trips(self, instruction: _Instruction) -> float:
        """How often a loop's body runs: told by XLA, or the bound of a counter that starts at 0; NaN where neither is there."""
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
        if told:
            return int(told.group(1))
        (condition,) = instruction.names("condition")
        found = self.parts[condition]
        constants = {
            i.name: int(i.rest.split(")")[0])
            for i in found
            if re.fullmatch(r"[su]\d+\[\](\{.*\})? constant", f"{i.type} {i.opcode}")
        }
        bounds = [
            constants[operand] + ("direction=LE" in i.rest)
            for i in found
            if i.opcode == "compare" and re.search(r"direction=L[TE]", i.rest)
            for operand in re.findall(r"%?([\w.\-]+)", i.rest.split(")")[0])[1:]
            if operand in constants
        ]
        return bounds[0] if len(bounds) == 1 else math.nan


def _collective(instruction: _Instruction, kind: str, devices: int, at: Collective) -> Collective:
    results = _plain(instruction.type)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        results = _second(results)  # (operands, results, what the hardware needs)
    shapes, dtypes = _arrays(results)
    chain = re.search(r'chain_id="(\w+)"', instruction.rest)
    channel = re.search(r"channel_id=(\d+)", instruction.rest)
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.rest)
    return dataclasses.replace(
        at,
        kind=kind,
        name=instruction.name,
        shapes=shapes,
        dtypes=dtypes,
        groups=device_groups(instruction.rest, devices),
        pairs=tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))) if pairs else (),
        chain=f"{chain.group(1)} {channel and channel.group(1)} {instruction.origin}" if chain else "",
        origin=instruction.origin,
    )


def _scattered(caller: _Instruction, inner: Collective) -> Collective:
    """A TPU's reduce-scatter is a fusion of an all-reduce and a slice; its results are the fusion's."""
    if not any(name.startswith("all-reduce-scatter") for name in caller.names("calls")):
        return inner
    shapes, dtypes = _arrays(caller.type)
    return dataclasses.replace(inner, kind="reduce-scatter", shapes=shapes, dtypes=dtypes, origin=caller.origin)


def _arrays(type: str) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Shapes and dtypes of a type, several of a tuple."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", _plain(type))
    return tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in found), tuple(dtype for dtype, _ in found)


def _plain(type: str) -> str:
    """A type without layouts and comments."""
    return re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", type)


def _second(type: str) -> str:
    """The second element of a tuple type."""
    depth, starts = 0, []
    for i, letter in enumerate(type):
        depth += (letter in "([") - (letter in ")]")
        if depth == 1 and letter in "(,":
            starts.append(i)
    return type[starts[1] : starts[2] if len(starts) > 2 else None]
