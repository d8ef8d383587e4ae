"""Told to stop: SIGTERM, by which clusters announce a preemption, ends the command with exit code 42 and nothing lost.

Two kinds of places. Most work is either saved or not begun: there a told process ends at once, in seconds also from inside XLA's compiler.
Inside `unsaved()` there is work that is not on the disk yet, so nothing is interrupted: the loop asks at safe points whether to save and stop.
Several processes stop at the same safe point, whichever of them was told.

Python's own handlers run only once the main thread is back in the interpreter. So `faulthandler`'s does the hearing: it runs in C, writes to a
pipe at once, and calls the handler that was there before it, Python's, or in one of several processes that of JAX's preemption service.
"""

import _thread
import contextlib
import faulthandler
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import numpy as np
from jax.experimental import multihost_utils

from lmeff.core.errors import Preempted
from lmeff.parallel.processes import joined

STOPPED = "told to stop (SIGTERM); nothing is half-written, and the same command goes on"
GRACE = 5.0  # seconds that the main thread has to clean up before the process ends under it

_listening = threading.Event()
_told = threading.Event()
_ending = threading.Event()  # the main thread knows, and is on its way out
_saved = threading.Event()  # no `unsaved` block is open
_saved.set()
_points = itertools.count(1)


def listen(join: Callable[[], None], end: Callable[[str], None]) -> None:
    """Joins the other processes and hears SIGTERM from now on, to the end of the process; the main thread calls it, once.

    join: `processes.join`. A service of its own takes the signal then, and has to be asked before it does and after.
    end:  tells why and ends the process, from any thread; called where the main thread does not end by itself.
    """
    if _listening.is_set():
        join()
        return
    _listening.set()
    signal.signal(signal.SIGTERM, _interrupt)
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
    join()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    faulthandler.register(signal.SIGTERM, file=writer, all_threads=False, chain=True)
    threading.Thread(target=_watch, args=(reader, end), name="preemption", daemon=True).start()


def told() -> bool:
    """Whether this process was told to stop."""
    return _told.is_set()


def agreed() -> bool:
    """Whether all processes stop here. A safe point, which all pass in the same order: of one signal it is true at one of them, the same everywhere.

    Costs no message: whoever hears the signal tells the others in the background.
    """
    if not joined():
        return told()
    return multihost_utils.reached_preemption_sync_point(next(_points))


def safe_point() -> None:
    """Raises `Preempted` where all stop here; outside of `unsaved` it does nothing, since a told process ends by itself."""
    if not _saved.is_set() and agreed():
        raise Preempted(STOPPED)


@contextlib.contextmanager
def unsaved() -> Iterator[None]:
    """While it is open there is work that would be lost: whoever opened it asks `agreed` often, saves, and raises `Preempted`.

    All processes open and close it alike. Raises `Preempted` itself where one was told before it opens, or after the last safe point.
    """
    assert _saved.is_set(), "blocks of unsaved work do not nest"
    _stop(told())
    _saved.clear()
    late = False
    try:
        yield
        late = _any_told()
    except Preempted:
        _ending.set()
        raise
    finally:
        _saved.set()
    _stop(late or told())


def _stop(now: bool) -> None:
    if now:
        _ending.set()
        raise Preempted(STOPPED)


def _any_told() -> bool:
    """Whether any process was; all must ask."""
    return bool(multihost_utils.process_allgather(np.array(told())).any()) if joined() else told()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """In the main thread. `KeyboardInterrupt` is what libraries let through; the command line knows what it means."""
    _told.set()
    if _saved.is_set() and not _ending.is_set():
        _ending.set()
        raise KeyboardInterrupt


def _watch(reader: int, end: Callable[[str], None]) -> None:
    """In a thread of its own: waits for the signal, then sees to it that the process ends once all is saved."""
    os.read(reader, 4096)
    _told.set()
    while True:
        _saved.wait()
        _thread.interrupt_main(signal.SIGTERM)  # runs `_interrupt`, which JAX's service keeps from the signal itself
        threading.Event().wait(GRACE)
        if _saved.is_set():
            end(STOPPED)


def _hold() -> None:
    """Around a fork no signal is taken: until `_forget` has run, one to the child would be told to the parent by the pipe that both have."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget() -> None:
    """In the child SIGTERM does again what it does anywhere: pools end their workers by it."""
    faulthandler.unregister(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release()
