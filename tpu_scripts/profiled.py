"""lmeff's command line, with an ear for profile.sh: where a file asks for it, a trace of so many seconds is written beside the log.

The thread calls JAX only when it is asked, which is long after lmeff has joined the other processes and found its devices.
"""

import os
import sys
import threading
import time
from pathlib import Path

POLL = 1.0  # seconds


def listen(job: Path) -> None:
    """Waits for `job/profile.ask`, which holds a number of seconds; writes `job/profile/`, then `job/profile.done`: empty, or why there is no trace."""
    while True:
        time.sleep(POLL)
        asked = job / "profile.ask"
        if asked.exists():
            seconds = float(asked.read_text())
            asked.unlink()
            (job / "profile.done").write_text(trace(job / "profile", seconds))


def trace(folder: Path, seconds: float) -> str:
    """Writes a trace of this process, or says why not: JAX makes one at a time, and lmeff may be making one for --profile."""
    import jax

    try:
        jax.profiler.start_trace(str(folder))
        time.sleep(seconds)
        jax.profiler.stop_trace()
    except Exception as error:  # whatever it is, who waits must be told, and lmeff must go on
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def main() -> int:
    """Runs lmeff from the current folder, if that has it, else as it is installed."""
    job = os.environ.get("LMEFF_JOB")
    if job:
        threading.Thread(target=listen, args=(Path(job),), daemon=True).start()
    sys.path.insert(0, os.getcwd())
    from lmeff.cli import main as lmeff

    return lmeff(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
