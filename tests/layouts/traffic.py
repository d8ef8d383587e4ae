"""What the collectives of a compiled program move in one run of it, loops counted as often as they turn."""

import re
from collections import Counter

from tests.layouts.hlo import ITEM, KINDS, computations

MOVES = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(")


def turns(parts, entry):
    """`{computation: how often it runs}` in one run of `entry`; None where a loop does not say how often it turns."""
    found = dict.fromkeys(parts, 0)
    found[entry] = 1
    todo = [(entry, 1)]
    while todo:
        name, times = todo.pop()
        for line in parts[name]:
            inner = times
            if re.search(r"\bwhile\(", line):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                inner = int(known.group(1)) * times if known and times is not None else None
            for callee in callees(line) & parts.keys():
                found[callee] = None if inner is None or found[callee] is None else found[callee] + inner
                todo.append((callee, inner))
    return found


def callees(line):
    """The computations that an instruction runs."""
    names = set(re.findall(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)", line))
    for listed in re.findall(r"(?:calls|branch_computations)=\{([^}]*)\}", line):
        names |= {name.strip(" %") for name in listed.split(",")}
    return names


def received(text, *, within=""):
    """`{(kind, dtype): bytes}` of the results of all collectives on one device; `within` is a part of the path of the operation in the Python program."""
    parts = computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M).group(1)
    times = turns(parts, entry)
    found = Counter()
    for name, lines in parts.items():
        for line in lines:
            match = MOVES.match(line)
            if match is None or within not in line.partition('op_name="')[2].partition('"')[0]:
                continue
            assert times[name] is not None, f"in a loop without end: {line}"
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match.group(1)):
                size = ITEM[dtype]
                for n in filter(None, dims.split(",")):
                    size *= int(n)
                found[match.group(2), dtype] += size * times[name]
    return dict(found)
