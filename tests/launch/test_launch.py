"""The launcher: the first failure is told, everything else is stopped, and nothing is left running."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from lmeff.core.accelerators import hardware
from lmeff.core.errors import UsageError
from lmeff.launch import Machine, Stopped, launch
from lmeff.parallel import processes
from lmeff.parallel.mesh import MeshPlan
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


def start(folder, script, count=3, *, arguments=(), **options):
    launch([sys.executable, "-c", SEAT + script, str(folder), *arguments], count, **options)


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


TOLD = {
    signal.SIGTERM: ("stopped by SIGTERM", 42),
    signal.SIGINT: ("interrupted", 130),
    signal.SIGHUP: ("stopped by SIGHUP", 129),
}


def deaf_peer_is_killed(folder, number):
    """Sends a signal to this process, and again once all but process 1 have ended."""
    wait_for(folder, "*.ready", 3)
    os.kill(os.getpid(), number)
    while sum(_runs(json.loads((folder / f"{i}.pids").read_text())[0]) for i in range(3)) > 1:
        time.sleep(0.02)
    os.kill(os.getpid(), number)


def wait_for(folder, pattern, count):
    while len(list(folder.glob(pattern))) < count:
        time.sleep(0.02)


@pytest.mark.parametrize("number", TOLD, ids=[number.name for number in TOLD])
def test_signals_are_passed_on(tmp_path, number):
    """The processes end as they like; those that take no notice are killed by a second signal. No babysitter starts them again."""
    script = f"""
if index == 1:
    signal.signal({int(number)}, signal.SIG_IGN)
(folder / f"{{index}}.ready").touch()
time.sleep(120)
"""
    word, code = TOLD[number]
    threading.Thread(target=deaf_peer_is_killed, args=(tmp_path, number)).start()
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"^{word}, and 1 that did not end in time killed; the same command") as caught:
        start(tmp_path, script, restarts=3)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == before
    assert gone(tmp_path)


SAVES = """
def save(number, frame):
    for other in range(seat["count"]):  # as the service of JAX does, which tells all processes of a signal to one
        if not (folder / f"{other}.told").exists() and (folder / f"{other}.told").touch() is None and other != index:
            os.kill(json.loads((folder / f"{other}.pids").read_text())[0], signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.2 * index)
    (folder / f"{index}.saved").touch()
    tell("told to stop; saved", 42, time.monotonic_ns())
    os._exit(42)

signal.signal(signal.SIGTERM, save)
(folder / f"{index}.ready").touch()
"""


@pytest.mark.parametrize("alone", [False, True], ids=["the launcher", "one process"])
def test_who_is_told_to_stop_has_time_to_save(tmp_path, alone):
    def tell():
        wait_for(tmp_path, "*.ready", 3)
        os.kill(json.loads((tmp_path / "1.pids").read_text())[0] if alone else os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell).start()
    with pytest.raises(Stopped, match=r"^told to stop; saved$") as caught:
        start(tmp_path, SAVES + "time.sleep(120)")
    assert caught.value.exit_code == 42
    assert len(list(tmp_path.glob("*.saved"))) == 3
    assert gone(tmp_path)


def test_peers_of_one_that_left_with_42_are_told_too(tmp_path):
    """It told nobody, as one that was compiling; the others would wait for it."""
    script = "tell('compiling', 42, 1) or os._exit(42) if index == 1 else time.sleep(120)"
    with pytest.raises(Stopped, match=r"^compiling$") as caught:
        start(tmp_path, script)
    assert caught.value.exit_code == 42
    assert gone(tmp_path)


def test_what_must_be_mended_is_told_although_all_were_stopped(tmp_path):
    script = """
def fail(number, frame):
    tell("the disk is full", 5, 1)
    os._exit(5)

signal.signal(signal.SIGTERM, fail if index == 2 else signal.SIG_DFL)
(folder / f"{index}.ready").touch()
time.sleep(120)
"""

    def tell():
        wait_for(tmp_path, "*.ready", 3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell).start()
    with pytest.raises(Stopped, match=r"^the disk is full$") as caught:
        start(tmp_path, script, restarts=2)
    assert caught.value.exit_code == 5


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
        (Machine(processes=2, devices=8, distributed=True), "got it with --distributed"),
        (Machine(processes=3), "got 3 processes for a mesh of 4 devices, expected a divisor"),
        (Machine(restarts=3), "--restarts: got 3 without --processes, expected it with"),
        (Machine(processes=2, restarts=-1), "--restarts: got -1, expected 0 or more"),
    ],
)
def test_bad_numbers_are_refused(machine, told):
    with pytest.raises(UsageError, match=told):
        machine.share(MeshPlan(data=2, tensor=2))


@pytest.mark.parametrize(
    ("machine", "mesh", "share"),
    [
        (Machine(), MeshPlan(tensor=2), (0, 0)),
        (Machine(devices=8, processes=1), MeshPlan(), (0, 0)),
        (Machine(processes=1, restarts=2), MeshPlan(fsdp=2), (1, 2)),
        (Machine(processes=2, devices=8), MeshPlan(fsdp=2), (2, 8)),
        (Machine(processes=2), MeshPlan(data=2, fsdp=2, tensor=2), (2, 8)),
        (Machine(processes=4), MeshPlan(fsdp=2, tensor=2), (4, 4)),
        (Machine(processes=4), MeshPlan(), (4, 4)),
        (Machine(processes=4), MeshPlan(fsdp=3), (4, 12)),
        (Machine(processes=4), None, (4, 4)),
    ],
)
def test_processes_share_the_devices_of_the_mesh(machine, mesh, share):
    """The fewest that all have equally many of, where the mesh leaves it open."""
    assert machine.share(mesh) == share


def test_chips_are_not_left_idle_unasked(tmp_path, monkeypatch):
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/vfio").touch()  # is there on any machine
    (tmp_path / "dev/vfio/7").touch()  # a group that is no TPU
    assert hardware(tmp_path) == {}
    (tmp_path / "dev/nvidiactl").touch()
    (tmp_path / "dev/nvidia0").touch()
    assert hardware(tmp_path) == {"NVIDIA": 1}
    monkeypatch.setattr("lmeff.launch.machine.hardware", lambda: hardware(tmp_path))
    platforms = SimpleNamespace(jax_platforms=None)
    monkeypatch.setattr("lmeff.launch.machine.jax", SimpleNamespace(config=platforms))
    with pytest.raises(
        UsageError, match=r"got 4 on a machine with 1 x NVIDIA, .*expected --devices too.*--distributed"
    ):
        Machine(processes=4).share(MeshPlan())
    assert Machine(processes=4, devices=4).share(MeshPlan()) == (4, 4)
    platforms.jax_platforms = "cpu"
    assert Machine(processes=4).share(MeshPlan()) == (4, 4)


def test_a_host_of_a_pod_that_was_not_told_is_refused(monkeypatch):
    processes.refuse_unjoined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UsageError, match=r"one of 4 of a pod, .* expected it on every host with --distributed"):
        processes.refuse_unjoined()
