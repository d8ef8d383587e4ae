"""Metrics as JSON lines: the source of truth of a run."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmeff.core.files import write_text
from lmeff.parallel.processes import leads
from lmeff.train.sinks import Sinks

Row = dict[str, Any]


class MetricsWriter:
    """Appends one object a line: step, wall-clock seconds, values. Resuming drops lines of steps that will be run again.

    Of several processes the first alone writes. Where there are sinks, each line goes on to them.
    """

    def __init__(
        self, path: Path, *, resume_step: int = 0, sinks: Callable[[Sequence[Row]], Sinks] | None = None
    ) -> None:
        """Opens the file; lines after `resume_step` are cut, so that a resumed run has neither gaps nor doubles.

        sinks: opens them with the lines that are kept.
        """
        self._file, self._sinks = None, None
        if leads():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("a", encoding="utf-8")
            self._sinks = None if sinks is None else sinks(kept)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; a number that is not finite becomes null, so that every line is strict JSON."""
        if self._file is None:
            return
        row = {"step": step, "time": time.time()} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._sinks is not None:
            self._sinks.write(row)

    def close(self) -> None:
        """Closes the file and the sinks."""
        if self._file is not None:
            self._file.close()
        if self._sinks is not None:
            self._sinks.close()


def read_metrics(path: Path) -> list[Row]:
    """All complete lines, none where there is no file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
