"""A cloud of folders for the launch scripts: a fake gcloud runs what is sent to a worker in that worker's own home, and replays histories.

Every call of gcloud, lmeff, uv, curl, sleep, and of lmeff on a worker, is a line of JSON. Nothing here can reach a network: what could is a fake.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tpu_scripts"
FAKES = Path(__file__).parent / "fakes"

PLACE = ("--name", "pod", "--project", "my-project", "--zone", "us-east5-b")
TYPE = ("--type", "v5litepod-16")
WHEEL = ("--wheel", "dist/lmeff-0.1.0-py3-none-any.whl")
RUNS = ("--runs", "@RUNS@")
CONFIG = "configs/mine.py"
GKE = ("--name", "job-1", "--image", "us-docker.pkg.dev/my-project/lmeff/train:0.1")
JOBSET = ("jobset", *GKE, "--topology", "v5p:2x4x4:2", "--claim", "runs", CONFIG)
XPK = ("xpk", *GKE, *PLACE[2:], "--cluster", "tpus", *TYPE, CONFIG)
ARGUMENTS = {
    "create": (*PLACE, *TYPE),
    "wait": PLACE,
    "setup": (*PLACE, *WHEEL),
    "launch": (*PLACE, *TYPE, *RUNS, CONFIG, "--", "--mesh.fsdp", "16"),
    "logs": PLACE,
    "profile": PLACE,
    "stop": PLACE,
    "fetch": (*PLACE, *RUNS, "--run", "mine"),
    "babysit": (*PLACE, *TYPE, *WHEEL, *RUNS, CONFIG, "--", "--mesh.fsdp", "16"),
    "delete": PLACE,
    "gke": JOBSET,
}
GIT = {
    **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "a"),
    **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "a@example.com"),
    **dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2026-01-01T00:00:00Z"),
    **dict.fromkeys(("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"), "/dev/null"),
}


def wait_until(true, seconds=60):
    """Waits until a function says so."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


class Cloud:
    """A temporary repository, and the cloud that its scripts are called with."""

    def __init__(self, folder: Path, repository: Path):
        self.fake, self.repository, self.runs = folder / "fake", folder / "repository", folder / "runs"
        self.fake.mkdir()
        shutil.copytree(repository, self.repository, symlinks=True)
        self.environment = {
            "PATH": f"{FAKES}:/usr/bin:/bin",
            "HOME": str(folder),
            "FAKE": str(self.fake),
            "TMPDIR": str(folder),
            **GIT,
        }
        self.script(workers="2", codes="0")

    def script(self, **files):
        """A history: `states_1="PROVISIONING ACTIVE"` is the file states.1 with a line a word, `codes_0_w_1` is codes.0-w-1; lists are lines."""
        for name, lines in files.items():
            kind, _, of = name.partition("_")
            lines = lines.split() if isinstance(lines, str) else lines
            file = f"{kind}.{of.replace('_', '-')}" if of else kind
            (self.fake / file).write_text("".join(f"{line}\n" for line in lines))

    def active(self, nodes=1):
        """Machines that are there, with lmeff on them."""
        self.script(states_0="ACTIVE", nodes=str(nodes))
        return self("setup", *PLACE, *WHEEL, *(("--slices", str(nodes)) if nodes > 1 else ()))

    def __call__(self, script, *arguments, code=0, **environment):
        return self.run(f"tpu_scripts/{script}.sh", *arguments, code=code, **environment)

    def run(self, *command, code=0, **environment):
        """What a command says on stdout and stderr, called at the top of the repository; @RUNS@ is a folder that all workers see."""
        with self.begun(*command, **environment) as begun:
            stdout, stderr = begun.communicate(timeout=180)
        assert begun.returncode == code, f"{command}: exit code {begun.returncode}\n{stdout}\n{stderr}"
        return stdout, stderr

    def begun(self, *command, **environment):
        """As run, but goes on beside the test."""
        return subprocess.Popen(
            [word.replace("@RUNS@", str(self.runs)) for word in command],
            cwd=self.repository,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls(self):
        log = self.fake / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def verbs(self):
        """What was asked of the cloud, in order, without describe: create, scp, and what was sent by ssh."""
        found = []
        for call in self.calls():
            if call[0] == "gcloud" and call[4] != "describe":
                sent = next(
                    (re.search(r"remote\.sh (\w+)", word) for word in call if word.startswith("--command")), None
                )
                found.append(sent[1] if sent else call[4])
        return found

    def life(self):
        """As verbs, of those alone that make, end, start and stop."""
        return [verb for verb in self.verbs() if verb in ("create", "delete", "start", "stop", "stop_all")]

    def asked_for(self):
        """Whether a queued resource is there, in whatever state: what would be billed, or would become so."""
        life = self.fake / "life"
        return life.exists() and life.read_text() != "gone\n"

    def launches(self):
        """lmeff's command lines on workers: (worker, words)."""
        return [(call[0], call[3:]) for call in self.calls() if re.fullmatch(r"\d-w-\d", call[0])]

    def sleeps(self):
        return [int(call[1]) for call in self.calls() if call[0] == "sleep"]

    def running(self):
        """Processes of jobs that are alive."""
        pids = [int(file.read_text()) for file in self.fake.glob("w/*/lmeff-tpu/jobs/*/pid")]
        return [
            pid
            for pid in pids
            if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
        ]

    def ended(self):
        """Waits until every job has ended by itself."""
        wait_until(lambda: not self.running())

    def job(self, worker, name="a"):
        """The folder of a job on a worker, such as 0-w-1."""
        return self.fake / f"w/{worker}/lmeff-tpu/jobs/{name}"


def make_repository(made: Path) -> Path:
    """A repository in a folder that is there: a config that is committed, a wheel, and the scripts."""
    (made / "configs").mkdir()
    (made / "dist").mkdir()
    (made / WHEEL[1]).write_text("a wheel")
    (made / CONFIG).write_text("def experiment(): ...\n")
    (made / ".gitignore").write_text(".lmeff-tpu/\ndist/\n")
    (made / "tpu_scripts").symlink_to(SCRIPTS)
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=made, env={"PATH": "/usr/bin:/bin", **GIT}, check=True)
    return made


@contextmanager
def cloud_in(folder: Path, repository: Path) -> Iterator[Cloud]:
    """A cloud in an empty folder, called from a copy of a repository; no process outlives it."""
    made = Cloud(folder, repository)
    try:
        yield made
    finally:
        for pid in made.running():
            os.killpg(pid, 9)
