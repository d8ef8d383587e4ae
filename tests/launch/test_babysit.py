"""The babysitter: what can only be bad luck is started again, so often and no oftener; what would happen again is told at once."""

import os
import signal
import threading

import pytest

from lmeff.launch import Stopped
from lmeff.launch.babysit import restartable
from tests.launch.test_launch import gone, start, wait_for

# Process 1 of two ends each attempt in the next of the ways that its arguments name; the other waits for it.
LIVES = """
acts, told = sys.argv[2:], Path(seat["folder"], "act")
if index == 1:
    life = len(list(folder.glob("life*")))
    (folder / f"life{life}").touch()
    told.with_suffix(".part").write_text(json.dumps([life, acts[min(life, len(acts) - 1)]]))
    told.with_suffix(".part").rename(told)
while not told.exists():
    time.sleep(0.01)
life, act = json.loads(told.read_text())
if act == "done":
    below.kill()
    sys.exit(print("done", life) if index == 0 else None)
if index != 1:
    time.sleep(120)
if act == "ready":
    (folder / "now.ready").touch()
    time.sleep(120)
if act.startswith("-"):
    os.kill(os.getpid(), -int(act))
    time.sleep(120)
if act.startswith("="):
    os._exit(int(act[1:]))
tell(f"reason {act}", int(act), 1)
os._exit(int(act))
"""
PLAN = {  # the ends of a process in turn, restarts allowed, exit code, restarts made
    "killed, crashed, saved, done": (["-9", "=7", "1", "42", "-11", "done"], 9, 0, 5),
    "no budget": (["-9"], 0, 137, 0),
    "budget spent": (["1"], 2, 1, 2),
    "told before it listened": (["-15", "done"], 1, 0, 1),
    "told, no budget": (["-15"], 0, 42, 0),
    **{f"exit code {code}": (["-9", str(code)], 9, code, 1) for code in (2, 6)},
    "exit code 3 without a reason": (["=3"], 9, 3, 0),
}


def lives(folder, acts, restarts):
    """The exit code of a launch in which process 1 ends as `acts` say."""
    try:
        start(folder, LIVES, 2, restarts=restarts, arguments=acts)
    except Stopped as end:
        return end.exit_code
    return 0


@pytest.fixture(autouse=True)
def _short_rest(monkeypatch):
    monkeypatch.setattr("lmeff.launch.babysit.REST", 0.01)


@pytest.mark.parametrize(
    ("exit_code", "told", "again"),
    [
        *((code, False, False) for code in (2, 3, 4, 5, 6)),
        *((code, False, True) for code in (1, 7, 42, 134, 137, 139)),
        *((code, True, False) for code in (1, 5, 42, 130, 137)),
    ],
)
def test_policy(exit_code, told, again):
    assert restartable(exit_code, told=told) == again


@pytest.mark.parametrize(("acts", "restarts", "code", "made"), PLAN.values(), ids=PLAN)
def test_ends_and_restarts(tmp_path, capfd, acts, restarts, code, made):
    assert lives(tmp_path, acts, restarts) == code
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("lmeff: restart ")]
    assert [line.split(":")[1] for line in lines] == [f" restart {k} of {restarts}" for k in range(1, made + 1)]
    assert len(list(tmp_path.glob("life*"))) == made + 1
    assert out == (f"done {made}\n" if code == 0 else "")
    assert gone(tmp_path)


def test_what_happened_is_told(tmp_path, capfd):
    assert lives(tmp_path, ["-9", "1", "42", "done"], 3) == 0
    told = [line.split(": ", 2)[2] for line in capfd.readouterr().err.splitlines()]
    assert [text.split(";")[0] for text in told] == [
        "process 1 of 2 was killed by signal 9",
        "reason 1",
        "told to stop",
    ]


@pytest.mark.parametrize("resting", [False, True], ids=["running", "between two attempts"])
def test_a_signal_to_the_launcher_ends_the_restarts(tmp_path, resting, monkeypatch):
    monkeypatch.setattr("lmeff.launch.babysit.REST", 60.0 if resting else 0.01)
    monkeypatch.setattr("lmeff.launch.babysit.LONGEST", 60.0)

    def tell():
        wait_for(tmp_path, "1.pids" if resting else "now.ready", 1)
        if resting:
            assert gone(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    assert lives(tmp_path, ["-9"] if resting else ["-9", "ready"], 5) == 42
    teller.join()
    assert len(list(tmp_path.glob("life*"))) == (1 if resting else 2)
    assert gone(tmp_path)


COORDINATOR = """
import socket
host, port = seat["coordinator"].split(":")
below.kill()
if index == 0:
    with socket.socket() as stranger, contextlib.suppress(OSError):
        stranger.bind((host, int(port)))
        tell("the port was to be had", 3, 1)
        os._exit(3)
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC does
    server.bind((host, int(port)))
    server.listen()
    Path(seat["folder"], "listens").touch()
    if server.accept()[0].recv(1) == b"k":  # about to be killed
        time.sleep(120)
else:
    while not Path(seat["folder"], "listens").exists():
        time.sleep(0.01)
    first = not (folder / "ports").exists()
    with open(folder / "ports", "a") as file:
        print(port, file=file)
    socket.create_connection((host, int(port))).send(b"k" if first else b"x")
    if first:
        os.kill(json.loads((folder / "0.pids").read_text())[0], signal.SIGKILL)
        time.sleep(120)
"""


def test_each_attempt_holds_a_port_of_its_own(tmp_path):
    """A connection of the killed coordinator may linger on the old one, and nobody else is given the new one before the coordinator listens."""
    start(tmp_path, "import contextlib" + COORDINATOR, 2, restarts=1)
    assert len(set((tmp_path / "ports").read_text().split())) == 2
    assert gone(tmp_path)
