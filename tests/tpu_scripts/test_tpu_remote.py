"""What goes on on a worker: who hears a signal or a notice, what is left behind, and traces of a job that runs."""

import os
import signal
import subprocess
import sys

import pytest

from tests.tpu_scripts.cloud import ARGUMENTS, PLACE, SCRIPTS, wait_until

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance"


@pytest.fixture
def launched(cloud):
    """A job on two workers whose lmeff ends with 42 where it is told to stop."""
    cloud.active()
    cloud.script(codes="42/term")
    return cloud


def launch(cloud):
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    wait_until(lambda: all((cloud.fake / f"due.0-w-{worker}").exists() for worker in "01"))


def code_of(cloud, worker):
    """A job's exit code, once it is there."""
    file = cloud.job(worker) / "exit_code"
    wait_until(file.exists)
    return file.read_text()


def in_session(pid):
    """The processes of a job's session that are alive."""
    found = subprocess.run(["ps", "-o", "stat=", "-s", str(pid)], capture_output=True, text=True).stdout
    return [state for state in found.split() if not state.startswith("Z")]


def test_a_job_is_told_to_stop_and_has_the_time_to_save(launched):
    launch(launched)
    sessions = [int((launched.job(worker) / "pid").read_text()) for worker in ("0-w-0", "0-w-1")]
    assert len(in_session(sessions[0])) > 3  # lmeff, the shell that holds it, and what listens for notices
    assert "nothing runs on its 2 workers" in launched("stop", *PLACE)[1]
    assert [code_of(launched, worker) for worker in ("0-w-0", "0-w-1")] == ["42\n"] * 2
    wait_until(lambda: not any(map(in_session, sessions)))


def test_a_job_that_does_not_stop_is_killed_after_its_grace(launched):
    launched.script(codes="hang")
    launch(launched)
    for worker in ("0-w-0", "0-w-1"):
        os.kill(int((launched.job(worker) / "lmeff.pid").read_text()), signal.SIGSTOP)  # it will not hear SIGTERM
    launched("stop", *PLACE, "--grace", "7")
    assert launched.sleeps() == [1] * 14
    assert launched.running() == []


def test_a_shutdown_that_signals_every_process_lets_lmeff_save(launched):
    launch(launched)
    os.killpg(int((launched.job("0-w-0") / "pid").read_text()), signal.SIGTERM)
    assert code_of(launched, "0-w-0") == "42\n"
    wait_until(lambda: len(launched.running()) == 1)


@pytest.mark.parametrize(
    "notice", ["preempted TRUE", "maintenance-event TERMINATE_ON_HOST_MAINTENANCE"], ids=lambda text: text.split()[0]
)
def test_a_notice_tells_lmeff_to_stop(launched, notice):
    launch(launched)
    key, value = notice.split()
    wait_until(
        lambda: all((launched.fake / f"told.0-w-0.{name}").exists() for name in ("preempted", "maintenance-event"))
    )
    launched.script(notices=[f"{notice} 0-w-0 0"])
    assert code_of(launched, "0-w-0") == "42\n"
    assert f"notice: {key} is {value}: lmeff is told to stop" in launched("logs", *PLACE)[0]
    asked = [call[2:] for call in launched.calls() if call[:2] == ["curl", "0-w-0"] and key in call[-1]]
    assert asked == [
        ["-sf", "--max-time", "900", "-H", "Metadata-Flavor: Google", f"{METADATA}/{key}{query}"]
        for query in ("", "?wait_for_change=true&timeout_sec=600")
    ]
    wait_until(
        lambda: len(launched.running()) == 1
    )  # the other worker has no notice; lmeff agrees with its peers by itself


def test_a_notice_that_was_there_before_is_heard(launched):
    """As early as it may come: before lmeff is up, which then has nothing to save."""
    launched.script(notices=["preempted TRUE 0-w-1 0"])
    launched("launch", "--job", "a", *ARGUMENTS["launch"])
    assert code_of(launched, "0-w-1") == "42\n"


def test_a_machine_that_only_moves_is_no_reason_to_stop(launched):
    launched.script(notices=["maintenance-event MIGRATE_ON_HOST_MAINTENANCE 0-w-0 0"])
    launch(launched)
    asked = f"{METADATA}/maintenance-event?wait_for_change=true&timeout_sec=600"
    wait_until(lambda: any(call[1] == "0-w-0" and call[-1] == asked for call in launched.calls()))
    assert (launched.fake / "told.0-w-0.maintenance-event").read_text() == "MIGRATE_ON_HOST_MAINTENANCE\n"
    assert len(launched.running()) == 2


def test_a_machine_without_a_metadata_server_is_asked_again_later(launched):
    missing = launched.fake / "bin"
    missing.mkdir()
    (missing / "curl").write_text("#!/bin/sh\nexit 6\n")
    (missing / "curl").chmod(0o755)
    launched.environment["PATH"] = f"{missing}:{launched.environment['PATH']}"
    launch(launched)
    wait_until(lambda: 60 in launched.sleeps())
    assert len(launched.running()) == 2


def test_a_number_that_is_another_process_s_is_no_job(cloud):
    """As after a restart of the machine: the job's file is there, and its number is someone else's."""
    cloud.active()
    cloud.script(codes="hang")
    launch(cloud)
    for worker in ("0-w-0", "0-w-1"):
        os.killpg(int((cloud.job(worker) / "pid").read_text()), signal.SIGKILL)
        (cloud.job(worker) / "pid").write_text(f"{os.getpid()}\n")
    cloud("launch", "--job", "b", *ARGUMENTS["launch"])  # nothing runs there that would refuse it
    cloud("stop", *PLACE)
    (cloud.job("0-w-0") / "pid").unlink()
    (cloud.job("0-w-1") / "pid").unlink()


def test_a_profile_is_asked_for_by_a_file_and_brought_here(cloud):
    cloud.active()
    assert "does not run" in cloud("profile", *PLACE, code=25)[1]
    cloud.script(codes="hang")
    launch(cloud)
    job = cloud.job("0-w-0")
    (job / "profile").mkdir()  # as profiled.py leaves it, of an earlier time
    with cloud.begun("tpu_scripts/profile.sh", *PLACE, "--seconds", "3") as asking:
        wait_until((job / "profile.ask").exists)
        assert (job / "profile.ask").read_text() == "3\n"
        (job / "profile").mkdir()
        (job / "profile/x.xplane.pb").write_text("trace")
        (job / "profile.done").touch()
        assert asking.wait(20) == 0
    assert (cloud.repository / "profile/profile/x.xplane.pb").read_text() == "trace"


def test_a_profile_that_fails_says_why(cloud):
    cloud.active()
    cloud.script(codes="hang")
    launch(cloud)
    with cloud.begun("tpu_scripts/profile.sh", *PLACE) as asking:
        wait_until((cloud.job("0-w-0") / "profile.ask").exists)
        (cloud.job("0-w-0") / "profile.done").write_text("Only one profile may be run at a time.")
        assert "failed Only one profile" in asking.communicate(timeout=20)[1]
    assert asking.returncode == 25


@pytest.mark.parametrize(("error", "said"), [("", ""), ("raise RuntimeError('one at\\n a time')", "one at a time")])
def test_profiled_listens_while_lmeff_runs(tmp_path, error, said):
    """With a stand-in for jax and for lmeff, whose command runs until the trace is there."""
    (tmp_path / "lmeff").mkdir()
    (tmp_path / "lmeff/cli.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\njob = Path(os.environ['LMEFF_JOB'])\n"
        "def main(words):\n    assert 'jax' not in sys.modules\n    (job / 'profile.ask').write_text('0.1')\n"
        "    while not (job / 'profile.done').exists():\n        time.sleep(0.01)\n    return 7 if words == ['run', 'x.py'] else 1\n"
    )
    (tmp_path / "jax.py").write_text(
        f"class profiler:\n    def start_trace(folder): open(folder + '.begun', 'w')\n    def stop_trace():\n        {error or 'return'}\n"
    )
    found = subprocess.run(
        [sys.executable, str(SCRIPTS / "profiled.py"), "run", "x.py"],
        cwd=tmp_path, env={**os.environ, "LMEFF_JOB": str(tmp_path)}, capture_output=True, timeout=30,
    )  # fmt: skip
    assert found.returncode == 7, found.stderr
    assert (tmp_path / "profile.begun").exists()
    assert (tmp_path / "profile.done").read_text() == said
