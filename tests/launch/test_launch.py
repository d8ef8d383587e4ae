"""The launcher: the first failure is told, everything else is stopped, and nothing is left running."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from lmeff.core.errors import UsageError
from lmeff.launch import Machine, Stopped, launch
from lmeff.parallel import processes
from lmeff.parallel.processes import VARIABLE

SEAT = f"""
import json, os, signal, subprocess, sys, time
from pathlib import Path
seat = json.loads(os.environ[{VARIABLE!r}])
index = seat["index"]
folder = Path(sys.argv[1])
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
(folder / f"{{index}}.part").write_text(json.dumps([os.getpid(), below.pid]))
(folder / f"{{index}}.part").rename(folder / f"{{index}}.pids")
while len(list(folder.glob("*.pids"))) < seat["count"]:
    time.sleep(0.01)

def tell(message, code, at):
    part = folder / f"{{index}}.part"
    part.write_text(json.dumps({{"message": message, "exit_code": code, "at": at}}))
    part.rename(Path(seat["folder"], str(index)))
"""


def start(folder, script, count=3):
    launch([sys.executable, "-c", SEAT + script, str(folder)], count)


def gone(folder):
    """Whether all processes of a launch and those below them have ended; a moment later at most, when their parent is not this one."""
    pids = [pid for file in folder.glob("*.pids") for pid in json.loads(file.read_text())]
    assert pids
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_runs(pid) for pid in pids):
        time.sleep(0.02)
    return not any(_runs(pid) for pid in pids)


def _runs(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_all_succeed_and_the_first_has_the_terminal(tmp_path, capfd):
    start(tmp_path, "below.kill(); print('out', index); print('err', index, file=sys.stderr)")
    out, err = capfd.readouterr()
    assert (out, err) == ("out 0\n", "err 0\n")


def test_a_killed_process_ends_all(tmp_path):
    with pytest.raises(
        Stopped, match=r"^process 2 of 3 was killed by signal 9; the others were stopped; the same"
    ) as caught:
        start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if index == 2 else time.sleep(120)")
    assert caught.value.exit_code == 137
    assert gone(tmp_path)


def test_the_reason_that_came_first_is_told_whoever_ended_first(tmp_path):
    """Process 1 has told its reason and lives on when process 2 ends, as when it is slow to let go of its devices."""
    script = """
if index == 1:
    tell("the cause", 4, 1)
if index == 2:
    while not Path(seat["folder"], "1").exists():
        time.sleep(0.01)
    tell("a consequence", 5, 2)
    os._exit(5)
time.sleep(120)
"""
    with pytest.raises(Stopped, match=r"^the cause$") as caught:
        start(tmp_path, script)
    assert caught.value.exit_code == 4
    assert gone(tmp_path)


def test_without_a_reason_the_end_of_stderr_is_told(tmp_path):
    script = "time.sleep(120) if index != 1 else (print('segment\\nfault', file=sys.stderr, flush=True), os._exit(7))"
    with pytest.raises(Stopped, match=r"^process 1 of 3 ended with exit code 7; .*\n  segment\n  fault$") as caught:
        start(tmp_path, script)
    assert caught.value.exit_code == 7
    assert gone(tmp_path)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "interrupted")])
def test_signals_are_passed_on(tmp_path, number, word):
    """The processes end as they like; those that take no notice are killed by a second signal."""
    script = f"""
if index == 1:
    signal.signal({int(number)}, signal.SIG_IGN)
(folder / f"{{index}}.ready").touch()
time.sleep(120)
"""

    def interrupt():
        while len(list(tmp_path.glob("*.ready"))) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), number)
        while sum(_runs(json.loads((tmp_path / f"{i}.pids").read_text())[0]) for i in range(3)) > 1:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"^{word}; the same command goes on") as caught:
        start(tmp_path, script)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert gone(tmp_path)


def test_processes_end_with_their_launcher(tmp_path):
    """Killed by SIGKILL it can stop nobody: its end of a pipe does."""
    child = SEAT + "from lmeff.parallel import processes; processes.jax.distributed.initialize = lambda *a, **k: None\n"
    child += "processes.join(cluster=False); (folder / f'{index}.ready').touch(); time.sleep(120)"
    script = (
        f"import sys; from lmeff.launch import launch; launch([sys.executable, '-c', {child!r}, {str(tmp_path)!r}], 2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script])
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        (Machine(processes=0, devices=8), "--processes: got 0, expected at least 1"),
        (Machine(processes=3, devices=8), "got 3 processes for --devices 8, expected a divisor"),
        (Machine(processes=2), "got 2 without --devices"),
        (Machine(processes=2, devices=8, distributed=True), "got it with --distributed"),
    ],
)
def test_bad_numbers_are_refused(machine, told):
    with pytest.raises(UsageError, match=told):
        _ = machine.copies


def test_a_host_of_a_pod_that_was_not_told_is_refused(monkeypatch):
    processes.refuse_unjoined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UsageError, match=r"one of 4 of a pod, .* expected it on every host with --distributed"):
        processes.refuse_unjoined()
