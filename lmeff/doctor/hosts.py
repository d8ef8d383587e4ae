"""Several processes: what each of them found, and whether they are alike enough to train together."""

import hashlib
import json
import platform
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

import lmeff
from lmeff.doctor.check import ORDER, Check, Problem, judge
from lmeff.doctor.folder import PREFIX
from lmeff.doctor.packages import Installed
from lmeff.parallel.processes import joined, leads

PATIENCE = 120  # seconds that a host may be later than the others
APART = 5.0  # seconds between clocks; below it is what waiting for each other costs
SHOWN = 4  # processes named in a line


class Report(NamedTuple):
    """One process.

    versions: of what must be alike. time: of its clock, in seconds, at a moment common to all. sees: whether the leader's mark is in its run folder.
    """

    process: int
    host: str
    versions: Mapping[str, str]
    checks: tuple[Check, ...]
    time: float = 0.0
    sees: bool = True

    def to_json(self) -> dict[str, Any]:
        """What it found, for `--json`."""
        return {
            "process": self.process,
            "host": self.host,
            "versions": dict(self.versions),
            "checks": [check.to_json() for check in self.checks],
        }

    def to_text(self) -> str:
        """The whole of it, for `from_text`."""
        return json.dumps({**self._asdict(), "checks": [list(check) for check in self.checks]})


def from_text(text: str) -> Report:
    """The inverse of `Report.to_text`."""
    values = json.loads(text)
    return Report(**{**values, "checks": tuple(Check(*check) for check in values["checks"])})


def versions(installed: Installed, config: str | None) -> dict[str, str]:
    """What must be alike on all hosts. config: the resolved one, as text."""
    found = {"python": platform.python_version(), "lmeff": f"{lmeff.__version__} of source {sources()}"}
    found |= {name: package.version for name, package in sorted(installed.items())}
    return found if config is None else found | {"config": hashlib.sha256(config.encode()).hexdigest()[:8]}


def sources() -> str:
    """A digest of lmeff's own files: a checkout has the same version before and after a change."""
    made, folder = hashlib.sha256(), Path(lmeff.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        made.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return made.hexdigest()[:8]


def wait(name: str) -> None:
    """Waits for all processes, no longer than `PATIENCE`."""
    if joined():
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(f"lmeff doctor {name}", timeout=PATIENCE, processes=everyone)


def exchange(own: str) -> list[str]:
    """The texts of all processes, in their order."""
    data = np.frombuffer(own.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths)]


@contextmanager
def marked(directory: Path) -> Iterator[str]:
    """A file in the run folder that the leader writes and deletes; its name, the same for all processes."""
    name = exchange(uuid.uuid4().hex)[0]
    file = directory / f"{PREFIX}{name}"
    try:
        if leads() and directory.is_dir():
            file.write_bytes(b"")
        wait("mark written")
        yield file.name
        wait("mark seen")
    finally:
        if leads():
            file.unlink(missing_ok=True)


def report(found: Mapping[str, str], checks: Sequence[Check], directory: Path) -> list[Report]:
    """What every process found, known to every process."""
    with marked(directory) as mark:
        sees = _sees(directory / mark)
    wait("clocks")
    own = Report(jax.process_index(), socket.gethostname(), found, tuple(checks), time.time(), sees)
    return [from_text(text) for text in exchange(own.to_text())]


def _sees(file: Path) -> bool:
    """Whether a file is there; a file server may tell other hosts of a new one some seconds later."""
    for _ in range(20):
        if file.exists():
            return True
        time.sleep(0.2)
    return False


def alike(reports: Sequence[Report]) -> Check:
    """Whether all run the same versions; those that most have count as right."""
    names = sorted({name for report in reports for name in report.versions})
    problems = []
    for name in names:
        got = [report.versions.get(name, "none") for report in reports]
        most, _ = Counter(got).most_common(1)[0]
        for other in dict.fromkeys(version for version in got if version != most):
            who = _named([report for report, version in zip(reports, got) if version == other])
            told = f"{name} {other} on {who}, {most} on the others"
            problems.append(Problem("FAIL", told, "install the same wheels and sources on every host"))
    return judge("versions", f"alike on {len(reports)} processes" if not problems else "", problems)


def one_folder(reports: Sequence[Report], directory: Path) -> Check:
    """Whether the run folder is the same for all."""
    blind = [report for report in reports if not report.sees]
    told = f"{_named(blind)} does not see what process 0 writes to {directory}"
    problem = Problem("FAIL", told, "set --runs to a file system that all hosts mount")
    return judge(
        "shared folder", f"{len(reports)} processes see one {directory}" if not blind else "", [problem] * bool(blind)
    )


def one_time(reports: Sequence[Report]) -> Check:
    """Whether the hosts' clocks are together."""
    times = sorted(report.time for report in reports)
    middle, spread = times[len(times) // 2], times[-1] - times[0]
    off = [report for report in reports if abs(report.time - middle) > APART]
    problems = [Problem("look", f"the clock of {_named(off)} is off", "sudo timedatectl set-ntp true, there")] * bool(
        off
    )
    return judge("clocks", f"{spread:.1f} s apart", problems)


def merged(reports: Sequence[Report]) -> list[Check]:
    """The checks of all processes: one line where all are well, else one for each thing that is found, with who found it."""
    found = []
    for position, first in enumerate(reports[0].checks):
        bad: dict[Check, list[Report]] = {}
        for report in reports:
            check = report.checks[position]
            if not check.ok:
                bad.setdefault(check, []).append(report)
        if not bad:
            found.append(first)
        for check, told in sorted(bad.items(), key=lambda pair: -ORDER.index(pair[0].level)):
            who = "" if len(told) == len(reports) else f"{_named(told)}: "
            found.append(check._replace(found=who + check.found))
    return found


def _named(reports: Sequence[Report]) -> str:
    names = [f"process {report.process} ({report.host})" for report in reports[:SHOWN]]
    more = f" and {len(reports) - SHOWN} more" if len(reports) > SHOWN else ""
    return ", ".join(names) + more
