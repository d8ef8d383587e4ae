"""One line of the doctor: what was looked at, how it is, what was found, and what to do."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "look", "FAIL"]
ORDER: tuple[Level, ...] = ("ok", "look", "FAIL")
SHOWN = 200  # characters told of an exception


class Check(NamedTuple):
    """A finding. level: "look" is worth a look and stops nothing, with "FAIL" a run cannot go well. remedy: empty where all is well."""

    name: str
    level: Level
    found: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is nothing to do."""
        return self.level == "ok"

    def to_json(self) -> dict[str, Any]:
        """Its fields and `ok`."""
        return {"name": self.name, "ok": self.ok, **self._asdict()}


class Problem(NamedTuple):
    """One of several things that a check may find."""

    level: Level
    found: str
    remedy: str


def judge(name: str, found: str, problems: Sequence[Problem]) -> Check:
    """One check of several problems: the gravest first, with all remedies; "ok" and `found` where there are none."""
    if not problems:
        return Check(name, "ok", found)
    grave = sorted(problems, key=lambda problem: -ORDER.index(problem.level))
    remedies = dict.fromkeys(problem.remedy for problem in grave)
    told = "; ".join([problem.found for problem in grave] + [found] * bool(found))
    return Check(name, grave[0].level, told, "; ".join(remedies))


def crashed(name: str, error: BaseException) -> Check:
    """A check that could not be made."""
    lines = str(error).strip().splitlines() or [""]
    told = f"{type(error).__name__}: {lines[0][:SHOWN]}"
    return Check(name, "FAIL", told, "mend this first; where it is no fault of the machine, report it with this line")


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
