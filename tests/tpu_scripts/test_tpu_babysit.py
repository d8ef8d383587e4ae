"""babysit.sh through scripted histories: what it asked for, in which order, how often it tried again, how long it rested, and what it left behind."""

import signal
from dataclasses import dataclass, field

import pytest

from tests.tpu_scripts.cloud import ARGUMENTS, CONFIG, PLACE, TYPE, wait_until

QUOTA = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' has been exceeded"
OLDER = "python=3.11.9 jax=0.10.1 jaxlib=0.10.1 libtpu=0.0.40 lmeff=0.1.0"
CURRENT = "python=3.11.9 jax=0.10.2 jaxlib=0.10.2 libtpu=0.0.42.1 lmeff=0.1.0"
BABYSIT = ("--poll", "5", "--backoff", "100", *ARGUMENTS["babysit"])
MAKE, AGAIN, RENEW = ["create", "start"], ["stop", "start"], ["delete", "create", "start"]


@dataclass(frozen=True, kw_only=True)
class History:
    """What the cloud does, and what must come of it.

    Attributes:
        cloud: its script, as Cloud.script takes it.
        words: further flags.
        code: the exit code.
        life: what was made, started, stopped and deleted, in order.
        rests: the seconds between attempts.
        said: what must be told.
        asked_for: whether machines are left.
    """

    cloud: dict
    words: tuple[str, ...] = ()
    code: int = 0
    life: list[str]
    rests: list[int] = field(default_factory=list)
    said: tuple[str, ...] = ()
    asked_for: bool = True


HISTORIES = {
    "ready after 3 polls": History(
        cloud={"states_1": "WAITING_FOR_RESOURCES PROVISIONING PROVISIONING ACTIVE", "codes": "0@2"},
        life=MAKE,
        said=("ACTIVE after 15 s", "done after 1 attempts (0 times again, 0 failures)", "is still ACTIVE and billed"),
    ),
    "done, and deleted as asked": History(
        cloud={"states_1": "ACTIVE"}, words=("--delete",), life=[*MAKE, "delete"], asked_for=False
    ),
    "failed": History(
        cloud={"states_1": ["PROVISIONING", "FAILED|SERVICE|no capacity was found"], "states_2": "ACTIVE"},
        life=["create", *RENEW],
        rests=[100],
        said=("FAILED: no capacity was found", "done after 2 attempts (0 times again, 1 failures)"),
    ),
    "preempted twice": History(
        cloud={
            "states_1": ["PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"],
            "states_2": ["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED"],
            "states_3": "ACTIVE",
            "codes": "hang hang 0@2",
        },
        life=[*MAKE, *RENEW, *RENEW],
        rests=[100, 100],
        said=("the machines are SUSPENDING", "done after 3 attempts (2 times again, 0 failures)"),
    ),
    "preempted before it ran": History(
        cloud={"states_1": ["PROVISIONING", "SUSPENDED"], "states_2": "ACTIVE"}, life=["create", *RENEW], rests=[100]
    ),
    "preempted while it was installed": History(
        cloud={"states_1": ["ACTIVE", "SUSPENDED"], "states_2": "ACTIVE", "drops": ["install 1"]},
        life=["create", *RENEW],
        rests=[100],
        said=("setup.sh: the machines were taken away", "(1 times again, 0 failures)"),
    ),
    "deleted by someone": History(
        cloud={"states_1": ["ACTIVE", "ACTIVE", "GONE"], "states_2": "ACTIVE", "codes": "hang 0"},
        life=[*MAKE, *MAKE],
        rests=[100],
    ),
    "taken away too often": History(
        cloud={**{f"states_{life}": "ACTIVE ACTIVE SUSPENDED" for life in (1, 2, 3)}, "codes": "hang"},
        words=("--preemptions", "1"),
        code=21,
        life=[*MAKE, *RENEW, "delete"],
        rests=[100],
        said=("given up: taken away more than 1 times",),
        asked_for=False,
    ),
    "one worker behind in version": History(
        cloud={"states_1": "ACTIVE", "versions_0_w_1": [OLDER, CURRENT]},
        life=MAKE,
        rests=[100],
        said=("worker t1v-n-0-w-1 has python=3.11.9 jax=0.10.1", "done after 2 attempts (0 times again, 1 failures)"),
    ),
    "one worker behind for good": History(
        cloud={"states_1": "ACTIVE", "versions_0_w_1": [OLDER]},
        words=("--failures", "2", "--delete"),
        code=24,
        life=["create", "delete"],
        rests=[100, 200],
        said=("given up after 3 failures",),
        asked_for=False,
    ),
    "quota refused": History(
        cloud={"creates": [QUOTA, "ok"], "states_1": "ACTIVE"},
        life=["create", *MAKE],
        rests=[100],
        said=("Quota limit 'TPUV5sLitepod' has been exceeded; nothing was left behind",),
    ),
    "quota refused for good": History(
        cloud={"creates": [QUOTA]}, code=20, life=["create"] * 4, rests=[100, 200, 400], asked_for=False
    ),
    "ssh lost in mid-launch": History(
        cloud={"states_1": "ACTIVE", "drops": ["start 1"], "codes": "0@1"},
        life=["create", "start", "start"],
        said=("try 1 of 3: started on 1 of 2 workers", "done after 1 attempts"),
    ),
    "ssh lost for all of a launch": History(
        cloud={"states_1": "ACTIVE", "drops": ["start 1"] * 3, "codes_0_w_0": "hang 0@1", "codes_0_w_1": "0@1"},
        life=["create", "start", "start", "start", "stop", *AGAIN],
        rests=[100],
        said=("started on 1 of 2 workers only, and stopped on 2; nothing of it runs", "1 failures"),
    ),
    "exit 3": History(
        cloud={"states_1": "ACTIVE", "codes": "3@2"},
        code=3,
        life=[*MAKE, "stop"],
        said=("lmeff ended with exit code 3: lmeff says: launch 0 ends with 3", "is still ACTIVE and billed"),
    ),
    "exit 42": History(
        cloud={"states_1": "ACTIVE", "codes": "42@2 0@1"},
        life=[*MAKE, *AGAIN],
        rests=[100],
        said=("told to stop, and saved", "done after 2 attempts (1 times again, 0 failures)"),
    ),
    "exit 42 of one worker, whose peers died": History(
        cloud={
            **{"states_1": "ACTIVE", "workers": "3"},
            **{"codes_0_w_0": "134@2 0@1", "codes_0_w_1": "42@2 0@1", "codes_0_w_2": "137@3 0@1"},
        },
        life=[*MAKE, *AGAIN],
        rests=[100],
        said=("told to stop, and saved", "(1 times again, 0 failures)"),
    ),
    "exit 42 for ever": History(
        cloud={"states_1": "ACTIVE", "codes": "42"},
        words=("--preemptions", "2"),
        code=42,
        life=[*MAKE, *AGAIN, *AGAIN, "stop"],
        rests=[100, 100],
    ),
    "a notice, then preempted": History(
        cloud={
            **{"states_1": ["ACTIVE"] * 3 + ["SUSPENDED"], "states_2": "ACTIVE"},
            **{"notices": ["preempted TRUE 0-w-1 2"], "codes_0_w_1": "42/term 0@1", "codes_0_w_0": "134@2 0@1"},
        },
        life=[*MAKE, *RENEW],
        rests=[100],
        said=("told to stop, and saved", "(1 times again, 0 failures)"),
    ),
    "crashed twice": History(
        cloud={"states_1": "ACTIVE", "codes": "1@2 139@1 0@1"},
        life=[*MAKE, *AGAIN, *AGAIN],
        rests=[100, 200],
        said=("lmeff ended with exit code 139", "done after 3 attempts (0 times again, 2 failures)"),
    ),
    "crashed for good": History(
        cloud={"states_1": "ACTIVE", "codes": "1"},
        code=1,
        life=[*MAKE, *AGAIN, *AGAIN, *AGAIN, "stop"],
        rests=[100, 200, 400],
        said=("given up after 4 failures",),
    ),
    "crashed since the machine went": History(
        cloud={"states_1": ["ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"], "states_2": "ACTIVE", "codes": "137 0"},
        life=[*MAKE, *RENEW],
        rests=[100],
        said=("the machines are SUSPENDING", "(1 times again, 0 failures)"),
    ),
    "one worker failed, the others wait for it": History(
        cloud={"states_1": "ACTIVE", "codes": "hang", "codes_0_w_1": "4@2"}, code=4, life=[*MAKE, "stop"]
    ),
    "does not fit": History(
        cloud={"states_1": "ACTIVE", "plan": "6"},
        words=("--delete",),
        code=6,
        life=["create", "stop", "delete"],
        asked_for=False,
    ),
    "no chips in time": History(
        cloud={"states_1": "WAITING_FOR_RESOURCES"},
        words=("--timeout", "20"),
        code=22,
        life=["create", "delete"],
        said=("still WAITING_FOR_RESOURCES after 20 s",),
        asked_for=False,
    ),
    "workers that fall silent": History(
        cloud={"states_1": "ACTIVE", "states_2": "ACTIVE", "codes": "hang 0", "drops": ["status 1"] * 5},
        life=[*MAKE, *RENEW],
        rests=[100],
        said=("1 of 2 workers answer (5 of 5 times)",),
    ),
    "a cloud that does not answer for a while": History(
        cloud={"states_1": ["ACTIVE", "ACTIVE", *["BROKEN"] * 6, "ACTIVE"], "codes": "0@2"},
        life=MAKE,
        said=("the cloud does not answer (2 of 20 times): ERROR: Unable to find the server", "done after 1 attempts"),
    ),
    "a cloud that does not answer at the end": History(
        cloud={"states_1": ["ACTIVE", "ACTIVE", "BROKEN"], "codes": "0@1"},
        life=MAKE,
        said=("cannot be looked up, may be ACTIVE and billed",),
    ),
}


SLOW = (
    *("crashed for good", "crashed twice", "exit 42 for ever", "one worker behind for good"),
    *("ssh lost for all of a launch", "workers that fall silent"),
)
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in HISTORIES]


@pytest.mark.parametrize("name", NAMES)
def test_babysit_lives_through(cloud, name):
    history = HISTORIES[name]
    cloud.script(**history.cloud)
    _, told = cloud("babysit", *history.words, *BABYSIT, code=history.code)
    for words in history.said:
        assert words in told, told
    assert cloud.life() == history.life, told
    assert [rest for rest in cloud.sleeps() if rest >= 100] == history.rests
    assert cloud.asked_for() == history.asked_for
    assert cloud.running() == []
    command = ["run", CONFIG, "--distributed", "--runs", str(cloud.runs), "--mesh.fsdp", "16"]
    assert all(words == command for _, words in cloud.launches())


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_babysit_stops_at_once_where_the_same_would_happen_again(cloud, code):
    cloud.script(states_1="ACTIVE", codes=str(code), codes_0_w_1="42")
    _, told = cloud("babysit", *BABYSIT, code=code)
    assert f"lmeff ended with exit code {code}: lmeff says: launch 0 ends with {code}" in told
    assert cloud.life() == [*MAKE, "stop"]


def test_every_command_of_an_attempt_is_in_order(cloud):
    cloud.script(states_1="PROVISIONING ACTIVE", codes="0@2")
    cloud("babysit", "--delete", *BABYSIT)
    prepared = ["ssh", "scp"]
    assert cloud.verbs() == [
        *("create", *prepared, "scp", "install", "versions"),
        *(*prepared, "scp", "unpack", "mark", "seen", "unmark", "start", "status", "status", "delete", "list"),
    ]


def test_babysit_watches_a_job_that_runs(cloud):
    cloud.active()
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    assert "done after 1 attempts" in cloud("babysit", "--job", "a", *BABYSIT)[1]
    assert cloud.life() == ["start"]


def test_options_reach_the_scripts_that_they_are_of(cloud):
    cloud.script(states_1="ACTIVE")
    (cloud.repository / "mount.sh").write_text("mount\n")
    cloud("babysit", "--spot", "--startup-script", "mount.sh", "--profile", "10:13", "--no-plan", *BABYSIT)
    made = next(call for call in cloud.calls() if "create" in call)
    assert {"--spot", "--metadata-from-file=startup-script=mount.sh"} < set(made)
    assert {tuple(words[-4:]) for _, words in cloud.launches()} == {("--profile", "10:13", "--mesh.fsdp", "16")}
    assert not any(call[0] == "lmeff" for call in cloud.calls())


def interrupt(cloud, when, number):
    """Sends a signal to the babysitter alone, once `when` is true."""
    with cloud.begun("tpu_scripts/babysit.sh", *BABYSIT) as begun:
        wait_until(when)
        begun.send_signal(number)
        told = begun.communicate(timeout=60)[1]
    assert begun.returncode == 130, told
    return told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_wait_takes_the_request_back(cloud, number):
    cloud.script(states_1="WAITING_FOR_RESOURCES")
    interrupt(cloud, lambda: 5 in cloud.sleeps(), number)
    assert cloud.life() == ["create", "delete"]
    assert not cloud.asked_for()


def test_an_interrupted_watch_leaves_the_job_and_says_so(cloud):
    cloud.script(states_1="ACTIVE", codes="hang")
    told = interrupt(cloud, lambda: "status" in cloud.verbs(), signal.SIGINT)
    assert "the job does not: --job 2" in told
    assert "the machines stay ACTIVE and billed" in told
    assert cloud.life() == MAKE
    assert len(cloud.running()) == 2


def test_single_workers_need_no_more(cloud):
    """A slice of one host, and workers in two networks each."""
    cloud.script(states_1="ACTIVE", workers="1", networks="2", codes="0@1")
    cloud("babysit", "--poll", "5", *PLACE, *TYPE, *ARGUMENTS["babysit"][8:])
    assert len(cloud.launches()) == 1
