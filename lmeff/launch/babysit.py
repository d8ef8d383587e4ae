"""The babysitter of processes on this machine: what can only be bad luck is started again, what would happen again is told.

The policy of `tpu_scripts/babysit.sh` for machines in the cloud. A run goes on from its last checkpoint, so a restart is no different from a start.
"""

import sys
import time
from collections.abc import Sequence

from lmeff.launch.local import NEEDS_MENDING, POLL, SAVED, Stopped, attempt, signals

REST = 0.5  # seconds before the first restart, so much more before each further one
LONGEST = 10.0


def launch(command: Sequence[str], processes: int, *, restarts: int = 0) -> None:
    """Runs so many copies of `command` until all have succeeded; raises `Stopped` with the first failure that is not, or no longer, followed by a restart."""
    with signals() as received:
        done = 0
        while True:
            try:
                return attempt(command, processes, received)
            except Stopped as end:
                if done == restarts or not restartable(end.exit_code, told=end.told is not None):
                    raise
                done += 1
                _tell_restart(end, done, restarts)
                _rest(min(done * REST, LONGEST), received)


def restartable(exit_code: int, *, told: bool) -> bool:
    """Whether the same command may go better again. told: the launcher itself was told to stop."""
    return not told and exit_code not in NEEDS_MENDING


def _tell_restart(end: Stopped, number: int, restarts: int) -> None:
    happened = str(end).splitlines()[0] if end.exit_code != SAVED else "told to stop"
    print(f"lmeff: restart {number} of {restarts}: {happened}", file=sys.stderr, flush=True)


def _rest(seconds: float, received: list[int]) -> None:
    """Waits before a restart, until a signal at most."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not received:
        time.sleep(POLL)
