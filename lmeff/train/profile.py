"""A trace of a few steps of training, for xprof and perfetto: what ran on every device and on the host, and for how long.

The window is counted as metrics count steps, from 1, and is traced whole or not at all. Every process traces its own devices and leaves its own file
in one folder, so that xprof shows all hosts of the window together.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax

from lmeff.core.errors import UsageError
from lmeff.parallel.processes import leads, sync

PERFETTO = "perfetto_trace.json.gz"


class Window(NamedTuple):
    """The steps to trace, both included, from 1."""

    first: int
    last: int

    def __str__(self) -> str:
        """In words."""
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"


class Profile(NamedTuple):
    """Which steps of a stage are traced, and where the trace goes: `folder` in TensorBoard's layout."""

    window: Window
    folder: Path


def parse(text: str) -> Window:
    """Reads `A:B` or `A`; raises `UsageError` for anything else, and for steps that cannot be."""
    found = re.fullmatch(r"([0-9]{1,18})(?::([0-9]{1,18}))?", text)
    if found is None:
        raise UsageError(
            f"--profile: got '{text}', expected FIRST:LAST or one step, as 10:13; metrics count steps from 1"
        )
    window = Window(int(found[1]), int(found[2] or found[1]))
    if not 1 <= window.first <= window.last:
        raise UsageError(
            f"--profile: got '{text}', expected 1 or more and the last step no earlier than the first, as 10:13"
        )
    return window


def check(window: Window, steps: Iterable[tuple[str, int]]) -> None:
    """Refuses a window that no stage reaches; `steps` are those of each stage by name. What is done already does not count, so the same command goes on."""
    trained = {name: count for name, count in steps if count}
    if not any(window.last <= count for count in trained.values()):
        told = ", ".join(f"{name} {count}" for name, count in trained.items()) or "none trains"
        raise UsageError(
            f"--profile: got {window}, expected steps that a stage takes: {told}. Choose earlier ones; the first few are slower than the rest."
        )


def skipped(window: Window, start: int, steps: int) -> str | None:
    """Why a stage that goes on after step `start` until `steps` is not traced, in words; None where it is."""
    if window.last > steps:
        return f"not profiled: {window} were asked for, and it trains for {steps}"
    if window.first <= start:
        return f"not profiled: {window} were asked for, and it goes on after step {start}; choose later ones"
    return None


class Tracer:
    """Traces the window of a profile. The loop calls `begin` before and `end` after each step; what is cut off inside the window is dropped."""

    def __init__(self, profile: Profile | None, tell: Callable[[str], None], *, start: int, steps: int) -> None:
        """start: the step after which the loop goes on; steps: the last one; tell: a line for the user."""
        reason = None if profile is None else skipped(profile.window, start, steps)
        if reason is not None:
            tell(reason)
        self._profile, self._tell = None if reason else profile, tell
        self._open = contextlib.ExitStack()
        self._tracing = False

    def begin(self, step: int) -> None:
        """Before a step is dispatched."""
        if self._profile is None or not self._profile.window.first <= step <= self._profile.window.last:
            return
        if step == self._profile.window.first:
            shutil.rmtree(_partial(self._profile.folder), ignore_errors=True)  # of a process that was killed
            if leads():
                shutil.rmtree(_place(self._profile), ignore_errors=True)  # with what xprof worked out of it
            jax.profiler.start_trace(
                _partial(self._profile.folder), create_perfetto_trace=leads(), profiler_options=_options()
            )
            self._tracing = True
        self._open.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def end(self, step: int, state: Any) -> None:
        """After it; at the window's end waits for the devices, so that all of their work is in the trace."""
        self._open.close()
        if self._profile is None or step != self._profile.window.last:
            return
        jax.block_until_ready(state)
        line = self._finish(self._profile)
        sync("profiled")  # writing takes some processes longer, and collectives wait half a minute
        self._tell(line)

    def _finish(self, profile: Profile) -> str:
        try:
            self._stop()
            _publish(profile)
        except Exception as error:  # training is worth more than its trace
            return f"not profiled: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        return told(profile)

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        if self._tracing and self._profile is not None:
            self._stop()
            shutil.rmtree(_partial(self._profile.folder), ignore_errors=True)


def told(profile: Profile) -> str:
    """Where a trace is and how it is seen."""
    return f"profiled {profile.window}: xprof --logdir {profile.folder}   or open {profile.folder / PERFETTO} at https://ui.perfetto.dev"


def _options() -> jax.profiler.ProfileOptions:
    """Without a line for every call of Python: perfetto's file keeps a million events, and those would crowd out the devices'."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


def _partial(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.{jax.process_index()}.tmp"


def _place(profile: Profile) -> Path:
    """The folder of the window, which xprof shows as one session."""
    return profile.folder / "plugins" / "profile" / f"steps_{profile.window.first}_{profile.window.last}"


def _publish(profile: Profile) -> None:
    """Moves what this process traced to the place where it is looked for."""
    folder, place, partial = profile.folder, _place(profile), _partial(profile.folder)
    place.mkdir(parents=True, exist_ok=True)
    for file in partial.glob("plugins/profile/*/*.xplane.pb"):
        file.replace(place / f"process_{jax.process_index()}.xplane.pb")
    for file in partial.glob(f"plugins/profile/*/{PERFETTO}"):
        file.replace(folder / PERFETTO)
    shutil.rmtree(partial)
