"""SIGTERM is heard wherever a process is; outside of unsaved work it ends at once, inside at a safe point, the same in all processes."""

import os
import subprocess
import sys
import threading
import time

import pytest

from lmeff.core.errors import Preempted
from lmeff.launch import Stopped, launch
from lmeff.parallel import preemption

SCRIPT = """
import hashlib, os, signal, sys, threading, time
from lmeff.core.errors import Preempted
from lmeff.parallel import preemption

def tell(seconds=0.0):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()

def end(message):
    print("ended:", message, flush=True)
    os._exit(42)

preemption.GRACE = 0.3
preemption.listen(lambda: None, end)
"""


def python(script, timeout=60):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script], capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_work_that_is_saved_is_interrupted_and_cleans_up():
    script = """
try:
    try:
        tell()
        time.sleep(60)
    finally:
        tell()  # a second signal does not cut off the cleaning
        time.sleep(0.1)
        print("cleaned", flush=True)
except KeyboardInterrupt:
    print("interrupted", preemption.told(), flush=True)
    os._exit(42)
"""
    assert python(script) == (42, ["cleaned", "interrupted True"], "")


def test_a_call_into_c_is_not_waited_for():
    """As compilation is one: the interpreter does not get to run its own handler before the call returns."""
    began = time.monotonic()
    code, out, err = python("tell(0.5); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")
    assert (code, len(out), err) == (42, 1, "")
    assert out[0].startswith("ended: told to stop")
    assert time.monotonic() - began < 55  # it would take ten minutes


def test_unsaved_work_stops_at_a_safe_point_and_not_before():
    script = """
try:
    with preemption.unsaved():
        preemption.safe_point()
        tell(); tell(0.2)
        time.sleep(0.5)
        print("whole", flush=True)
        if preemption.agreed():
            tell(); tell(0.1)
            time.sleep(0.8)  # longer than the grace
            print("saved", flush=True)
            raise Preempted("at step 7")
except Preempted as error:
    print(error, error.exit_code, flush=True)
"""
    code, out, err = python(script)
    assert (out, err) == (["whole", "saved", "at step 7 42"], "")
    assert code == 0  # what the script says after it has told


def test_a_signal_after_the_last_safe_point_is_not_lost():
    script = """
try:
    with preemption.unsaved():
        print("safe point", preemption.agreed(), flush=True)
        tell()
        time.sleep(0.2)
except Preempted as error:
    print(error.exit_code, flush=True)
"""
    assert python(script)[1] == ["safe point False", "42"]


def test_a_signal_before_unsaved_work_keeps_it_from_beginning(monkeypatch):
    for name in ("_told", "_ending"):
        monkeypatch.setattr(preemption, name, threading.Event())
    preemption.safe_point()
    preemption._told.set()
    preemption.safe_point()  # nothing is unsaved: a told process ends by itself
    with pytest.raises(Preempted, match="the same command goes on"), preemption.unsaved():
        pytest.fail("it began")


def test_workers_that_are_ended_are_no_news():
    """A pool ends its forked workers by SIGTERM."""
    script = """
child = os.fork()
if child == 0:
    time.sleep(60)
os.kill(child, signal.SIGTERM)
print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGTERM, flush=True)
time.sleep(0.3)
print(preemption.told(), flush=True)
"""
    assert python(script)[1] == ["True", "False"]


PEER = """
import os, signal, sys, time
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from lmeff.core.errors import Preempted
from lmeff.parallel import preemption, processes
folder, told = Path(sys.argv[1]), int(sys.argv[2])
preemption.listen(lambda: processes.join(cluster=False), lambda message: os._exit(9))
index = processes.launched().index
try:
    with preemption.unsaved():
        for step in range(1, 3000):
            time.sleep(0.01 + 0.005 * index)  # nobody waits for anybody
            if step == 20 and index == told:
                os.kill(os.getpid(), signal.SIGTERM)
            if preemption.agreed():
                (folder / f"{index}.step").write_text(str(step))
                processes.sync("saved")
                raise Preempted(f"step {step}")
except Preempted as error:
    processes.leave(str(error), error.exit_code)
"""


@pytest.mark.parametrize(
    ("count", "told"), [(2, 1), pytest.param(4, 0, marks=pytest.mark.slow), pytest.param(4, 3, marks=pytest.mark.slow)]
)
def test_all_processes_stop_at_the_same_safe_point(tmp_path, count, told):
    with pytest.raises(Stopped, match=r"^step ") as caught:
        launch([sys.executable, "-c", PEER, str(tmp_path), str(told)], count)
    assert caught.value.exit_code == 42
    steps = {(tmp_path / f"{index}.step").read_text() for index in range(count)}
    assert steps == {str(caught.value).split()[1]}


def test_the_command_line_ends_with_42(tmp_path):
    """Before there is anything to save."""
    config = tmp_path / "slow.py"
    config.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n")
    words = [sys.executable, "-m", "lmeff.cli", "train", str(config), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 42, done.stderr
    assert done.stderr.startswith("lmeff: told to stop")
    assert '"exit_code": 42' in done.stdout


def test_what_a_told_command_ended_by_is_told():
    """It may be a library's word for the interruption, or a mistake that the next start meets again."""
    block = """
import sys
from lmeff import cli
from lmeff.parallel import preemption

def broken(words, as_json):
    preemption._told.set()
    raise ValueError("no such shape\\nand more")

cli._main = broken
sys.exit(cli.main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 42
    assert done.stderr.splitlines()[-1] == f"lmeff: {preemption.STOPPED} (ended by ValueError: no such shape)"


@pytest.mark.parametrize(("number", "code", "told"), [("SIGTERM", 42, "told to stop"), ("SIGINT", 130, "interrupted")])
def test_a_compilation_in_the_background_does_not_spoil_the_end(tmp_path, number, code, told):
    """The main thread waits for XLA's and leaves it behind; an interpreter that ended in order would crash under it."""
    config = tmp_path / "compiling.py"
    config.write_text(
        """
import os, signal, threading
import jax, jax.numpy as jnp

def slow(x):
    for i in range(400):
        x = jnp.sin(x + i) @ jnp.cos(x * i)
    return x

lowered = jax.jit(slow).lower(jnp.ones((8, 8)))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
threading.Timer(0.5, os.kill, (os.getpid(), signal.NUMBER)).start()
lowered.compile()
print("compiled")
""".replace("NUMBER", number)
    )
    words = [sys.executable, "-m", "lmeff.cli", "train", str(config)]
    slow = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(words, env=slow, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith(f"lmeff: {told}")
