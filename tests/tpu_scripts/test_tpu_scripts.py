"""The launch scripts against a cloud of folders."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import ARGUMENTS, CONFIG, GKE, JOBSET, PLACE, ROOT, SCRIPTS, TYPE, WHEEL, XPK

GOLDEN = Path(__file__).parent / "golden"

# --- single scripts


def test_create_asks_once_with_what_was_said(cloud):
    cloud.script(states_1="CREATING")
    _, told = cloud("create", *PLACE, *TYPE, "--spot", "--valid-for", "6h")
    (call,) = cloud.calls()
    assert call == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "pod"),
        *(
            "--project=my-project",
            "--zone=us-east5-b",
            "--accelerator-type=v5litepod-16",
            "--runtime-version=v2-alpha-tpuv5-lite",
        ),
        *("--node-id=pod", "--spot", "--valid-until-duration=6h", "--quiet"),
    ]
    assert "delete.sh" in told


def test_several_slices_are_one_request_with_a_prefix(cloud):
    cloud("create", *PLACE, "--type", "v5p-128", "--slices", "2", "--reserved")
    (call,) = cloud.calls()
    assert call[8:] == [
        "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-count=2",
        "--node-prefix=pod",
        "--reserved",
        "--quiet",
    ]


def test_a_refused_quota_is_told_and_leaves_nothing(cloud):
    cloud.script(creates=["RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' has been exceeded"])
    _, told = cloud("create", *PLACE, *TYPE, code=20)
    assert "Quota limit 'TPUV5sLitepod' has been exceeded; nothing was left behind" in told
    assert cloud.verbs() == ["create"]


def test_what_is_there_already_is_not_asked_for_again(cloud):
    cloud.script(creates=["ALREADY_EXISTS: Resource exists"])
    assert "is there already" in cloud("create", *PLACE, *TYPE, code=20)[1]


def test_help_says_what_it_costs_to_forget(cloud):
    told, _ = cloud("create", "--help")
    assert "billed" in told
    assert "queued-resources list" in told
    assert "$" not in told.replace("$0", "")  # no invented prices


def test_wait_until_ready_after_three_polls(cloud):
    cloud.script(states_0="WAITING_FOR_RESOURCES PROVISIONING PROVISIONING ACTIVE")
    _, told = cloud("wait", *PLACE, "--poll", "7")
    assert cloud.sleeps() == [7, 7, 7]
    assert [line.split(": ")[2] for line in told.splitlines()] == [
        "WAITING_FOR_RESOURCES after 0 s",
        "PROVISIONING after 7 s",
        "ACTIVE after 21 s",
    ]


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        ("FAILED|SERVICE|no capacity was found in us-east5-b", 20, "FAILED: no capacity was found in us-east5-b"),
        ("FAILED||", 20, "the cloud gives no reason"),
        ("SUSPENDED|SERVICE|", 21, "SUSPENDED by SERVICE"),
        ("SUSPENDING|USER|", 21, "SUSPENDING by USER"),
        ("GONE", 23, "create.sh makes one"),
    ],
)
def test_wait_tells_the_cloud_s_own_reason(cloud, state, code, words):
    cloud.script(states_0=["PROVISIONING", state])
    assert words in cloud("wait", *PLACE, code=code)[1]
    assert cloud.sleeps() == [30]


def test_wait_is_bounded(cloud):
    cloud.script(states_0="WAITING_FOR_RESOURCES")
    assert (
        "may become ACTIVE, and billed, later" in cloud("wait", *PLACE, "--poll", "10", "--timeout", "35", code=22)[1]
    )
    assert cloud.sleeps() == [10, 10, 10]


def test_an_unknown_state_is_told_and_waited_on(cloud):
    cloud.script(states_0="DAYDREAMING ACTIVE")
    assert "DAYDREAMING after 0 s\nwait.sh: pod: a state that these scripts do not know" in cloud("wait", *PLACE)[1]


def test_setup_installs_the_same_on_every_worker(cloud):
    _, told = cloud.active()
    assert "2 workers, all with python=3.11.9 jax=0.10.2 jaxlib=0.10.2 libtpu=0.0.42.1" in told
    installs = [call[1:] for call in cloud.calls() if call[:1] == ["uv"] and call[2] == "pip"]
    expected = [
        "pip",
        "install",
        "--quiet",
        "--python",
        "venv/bin/python",
        "--constraint",
        "constraints.txt",
        "./lmeff-0.1.0-py3-none-any.whl[tpu,report,text]",
    ]
    assert installs == [["0-w-0", *expected], ["0-w-1", *expected]]


def test_setup_names_the_worker_that_is_behind(cloud):
    cloud.script(
        states_0="ACTIVE",
        workers="4",
        versions_0_w_2=["python=3.11.9 jax=0.10.1 jaxlib=0.10.1 libtpu=0.0.40 lmeff=0.1.0"],
    )
    (cloud.fake / "versions.0.w.2").rename(cloud.fake / "versions.0-w-2")
    _, told = cloud("setup", *PLACE, *WHEEL, code=24)
    assert "worker t1v-n-0-w-2 has python=3.11.9 jax=0.10.1" in told
    assert "w-1" not in told


def test_setup_holds_the_workers_to_the_constraints(cloud):
    (cloud.repository / "older.txt").write_text("jax==0.10.1\njaxlib==0.10.1\nlibtpu==0.0.40\n")
    assert "expected jax=0.10.1" in cloud("setup", *PLACE, *WHEEL, "--constraints", "older.txt", code=24)[1]
    (cloud.repository / "loose.txt").write_text("jax>=0.10\n")
    assert "pins no jax" in cloud("setup", *PLACE, *WHEEL, "--constraints", "loose.txt", code=2)[1]


def test_delete_ends_it_and_says_what_is_left(cloud):
    cloud.script(states_0="ACTIVE", list=["other ACTIVE"])
    assert "still there in us-east5-b: other ACTIVE" in cloud("delete", *PLACE)[1]
    assert cloud.calls()[0][5:] == ["pod", "--project=my-project", "--zone=us-east5-b", "--force", "--quiet"]


def test_delete_of_what_is_gone_is_no_error(cloud):
    assert "pod: is gone" in cloud("delete", *PLACE)[1]


# --- launch


def test_launch_runs_the_same_command_on_every_worker(cloud):
    cloud.active()
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    cloud.ended()
    words = ["run", CONFIG, "--distributed", "--runs", str(cloud.runs), "--mesh.fsdp", "16"]
    assert sorted(cloud.launches()) == [("0-w-0", words), ("0-w-1", words)]
    assert ["lmeff", "plan", CONFIG, "--topology", "v5e:4x4", "--mesh.fsdp", "16"] in cloud.calls()
    record = dict(line.split("=", 1) for line in (cloud.repository / ".lmeff-tpu/pod/a").read_text().splitlines())
    assert len(record["commit"]) == 40
    assert record["config_sha256"] == hashlib.sha256(b"def experiment(): ...\n").hexdigest()
    assert record["command"] == f"lmeff {' '.join(words)}"
    for worker in "01":
        assert (cloud.fake / f"w/0-w-{worker}/lmeff-tpu/jobs/a/exit_code").read_text() == "0\n"
    assert not list(cloud.runs.iterdir())  # the mark is gone


def test_the_committed_tree_is_sent_unless_dirty(cloud):
    cloud.active()
    (cloud.repository / CONFIG).write_text("changed\n")
    (cloud.repository / "new.txt").write_text("new\n")
    _, told = cloud("launch", "--job", "clean", *ARGUMENTS["launch"])
    assert "are not sent" in told
    cloud.ended()
    cloud("launch", "--job", "dirty", "--dirty", *ARGUMENTS["launch"])
    cloud.ended()
    trees = {tree.name.partition("-")[2]: tree for tree in (cloud.fake / "w/0-w-1/lmeff-tpu/trees").iterdir()}
    assert (trees[""] / CONFIG).read_text() == "def experiment(): ...\n"
    assert (trees["dirty"] / CONFIG).read_text() == "changed\n"
    assert (trees["dirty"] / "new.txt").exists()
    assert not (trees["dirty"] / "dist").exists()


@pytest.mark.parametrize(
    ("plan", "words"), [(6, "does not fit v5e:4x4; nothing was started"), (3, "exit code 3; nothing was started")]
)
def test_what_the_plan_refuses_is_not_started(cloud, plan, words):
    cloud.script(plan=str(plan))
    assert words in cloud("launch", *ARGUMENTS["launch"], code=plan)[1]
    assert [call[0] for call in cloud.calls()] == ["lmeff"]


def test_ssh_lost_in_mid_launch_is_repeated_and_nothing_starts_twice(cloud):
    cloud.active()
    cloud.script(drops=["start 1"], codes="hang")
    _, told = cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    assert "try 1: started on 1 of 2 workers" in told
    assert cloud.verbs().count("start") == 2
    assert len(cloud.running()) == 2


def test_a_worker_that_stays_out_of_reach_stops_the_others(cloud):
    cloud.active()
    cloud.script(drops=["start 1"] * 3, codes="hang")
    assert (
        "started on 1 of 2 workers only, and stopped on 2; nothing runs"
        in cloud("launch", "--job", "a", *ARGUMENTS["launch"], code=25)[1]
    )
    assert cloud.verbs().count("start") == 3
    cloud.ended()


def test_a_second_job_is_refused_while_one_runs(cloud):
    cloud.active()
    cloud.script(codes="hang")
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    assert "job a runs here; stop.sh ends it" in cloud("launch", "--job", "b", *ARGUMENTS["launch"], code=25)[1]
    assert "launched before" in cloud("launch", "--job", "a", *ARGUMENTS["launch"], code=2)[1]
    assert len(cloud.running()) == 2
    assert "nothing runs on its 2 workers" in cloud("stop", *PLACE)[1]
    cloud.ended()


def test_runs_must_be_one_folder_for_all(cloud):
    cloud.active()
    patched = (SCRIPTS / "remote.sh").read_text().replace("if [[ -e $1/.lmeff-tpu-$2 ]]", "if [[ $HOST != *w-1 ]]")
    shutil.copytree(SCRIPTS, cloud.repository / "scripts")
    (cloud.repository / "scripts/remote.sh").write_text(patched)
    found = subprocess.run(
        ["/bin/bash", "scripts/launch.sh", *(word.replace("@RUNS@", str(cloud.runs)) for word in ARGUMENTS["launch"])],
        cwd=cloud.repository, env=cloud.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 25
    assert "worker t1v-n-0-w-1 does not see what worker 0 wrote" in found.stderr
    assert "start" not in cloud.verbs()


def test_several_workers_need_runs(cloud):
    cloud.active()
    assert "--runs: is missing" in cloud("launch", *PLACE, *TYPE, CONFIG, code=2)[1]
    assert cloud.launches() == []


def test_secrets_travel_in_a_file(cloud):
    cloud.active()
    secrets = cloud.repository / "secrets"
    secrets.write_text("TOKEN=hunter2 $(touch pwned)\n")
    secrets.chmod(0o644)
    assert "chmod 600" in cloud("launch", "--env-file", "secrets", *ARGUMENTS["launch"], code=2)[1]
    secrets.chmod(0o600)
    cloud("launch", "--env-file", "secrets", *ARGUMENTS["launch"])
    cloud.ended()
    assert all(call[2] == "TOKEN=hunter2 $(touch pwned)" for call in cloud.calls() if call[0].startswith("0-w"))
    assert not any("hunter2" in word for call in cloud.calls() if call[0] in ("gcloud", "lmeff") for word in call)
    assert (cloud.fake / "w/0-w-0/lmeff-tpu/environment").stat().st_mode & 0o777 == 0o600
    assert not list(cloud.fake.rglob("pwned"))


def test_several_slices_are_launched_as_one(cloud):
    cloud.active(nodes=2)
    cloud("launch", "--slices", "2", *ARGUMENTS["launch"])
    cloud.ended()
    assert sorted(worker for worker, _ in cloud.launches()) == ["0-w-0", "0-w-1", "1-w-0", "1-w-1"]
    assert any("v5e:4x4:2" in call for call in cloud.calls() if call[0] == "lmeff")
    assert [call[5] for call in cloud.calls() if call[:5:4] == ["gcloud", "describe"] and call[3] == "tpu-vm"][-2:] == [
        "pod-0",
        "pod-1",
    ]


def test_logs_and_fetch(cloud):
    cloud.active()
    cloud("launch", *ARGUMENTS["launch"])
    cloud.ended()
    run = cloud.runs / "mine"
    for file in ("report.json", "config.json", "teacher/metrics.jsonl", "teacher/checkpoints/9/weights"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text(file)
    assert "lmeff says: launch 0 ends with 0" in cloud("logs", *PLACE)[0]
    assert cloud("logs", *PLACE, "--all")[0].count("lmeff says") == 2
    cloud("fetch", *ARGUMENTS["fetch"])
    fetched = cloud.repository / "fetched/mine"
    names = {str(file.relative_to(fetched)) for file in fetched.rglob("*") if file.is_file()}
    assert names == {"report.json", "config.json", "teacher/metrics.jsonl"}
    cloud("fetch", *ARGUMENTS["fetch"], "--checkpoints")
    assert (fetched / "teacher/checkpoints/9/weights").read_text() == "teacher/checkpoints/9/weights"
    assert "there is no run" in cloud("fetch", *ARGUMENTS["fetch"][:-1], "other", code=25)[1]


def test_a_profile_is_asked_for_by_a_file_and_brought_here(cloud):
    cloud.active()
    assert "does not run" in cloud("profile", *PLACE, code=25)[1]
    cloud.script(codes="hang")
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    job = cloud.fake / "w/0-w-0/lmeff-tpu/jobs/a"
    (job / "profile").mkdir()  # as profiled.py leaves it, of an earlier time
    asking = subprocess.Popen(
        ["/bin/bash", str(SCRIPTS / "profile.sh"), *PLACE],
        cwd=cloud.repository,
        env=cloud.environment,
        stderr=subprocess.PIPE,
    )
    while not (job / "profile.ask").exists():
        time.sleep(0.01)
    (job / "profile").mkdir()
    (job / "profile/x.xplane.pb").write_text("trace")
    (job / "profile.done").touch()
    assert asking.wait(10) == 0, asking.stderr
    assert (cloud.repository / "profile/profile/x.xplane.pb").read_text() == "trace"


def test_profiled_listens_while_lmeff_runs(tmp_path):
    """With a stand-in for jax and for lmeff, whose command runs until the trace is there."""
    (tmp_path / "lmeff").mkdir()
    (tmp_path / "lmeff/cli.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\njob = Path(os.environ['LMEFF_TPU_JOB'])\n"
        "def main(words):\n    assert 'jax' not in sys.modules\n    (job / 'profile.ask').write_text('0.1')\n"
        "    while not (job / 'profile.done').exists():\n        time.sleep(0.01)\n    return 7 if words == ['run', 'x.py'] else 1\n"
    )
    (tmp_path / "jax.py").write_text(
        "class profiler:\n    def start_trace(folder): open(folder + '.begun', 'w')\n    def stop_trace(): pass\n"
    )
    found = subprocess.run(
        ["/usr/bin/env", "python3", str(SCRIPTS / "profiled.py"), "run", "x.py"],
        cwd=tmp_path, env={**os.environ, "LMEFF_TPU_JOB": str(tmp_path)}, capture_output=True, timeout=30,
    )  # fmt: skip
    assert found.returncode == 7, found.stderr
    assert (tmp_path / "profile.begun").exists()


# --- babysit

BABYSIT = ("--poll", "5", *ARGUMENTS["babysit"])


def test_babysit_from_nothing_to_done(cloud):
    cloud.script(states_1="PROVISIONING ACTIVE")
    assert "done after 1 attempts" in cloud("babysit", "--delete", *BABYSIT)[1]
    verbs = cloud.verbs()
    assert [verb for verb in verbs if verb in ("create", "install", "versions", "start", "delete")] == [
        "create",
        "install",
        "versions",
        "start",
        "delete",
    ]
    assert (cloud.fake / "life").read_text() == "gone\n"


def test_babysit_preempted_twice_then_done(cloud):
    cloud.script(
        states_1=["PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"],
        states_2=["ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDED"],
        states_3=["ACTIVE"],
        codes="hang hang 0",
    )
    _, told = cloud("babysit", *BABYSIT)
    assert "done after 3 attempts (2 times again, 0 failures)" in told
    assert "is still ACTIVE and billed" in told
    life = [verb for verb in cloud.verbs() if verb in ("create", "delete", "start")]
    assert life == ["create", "start", "delete", "create", "start", "delete", "create", "start"]
    commands = {tuple(words) for _, words in cloud.launches()}
    assert commands == {("run", CONFIG, "--distributed", "--runs", str(cloud.runs), "--mesh.fsdp", "16")}


def test_babysit_goes_on_after_42_on_the_same_machines(cloud):
    cloud.script(states_1="ACTIVE", codes="42 0")
    assert "done after 2 attempts (1 times again, 0 failures)" in cloud("babysit", *BABYSIT)[1]
    assert [verb for verb in cloud.verbs() if verb in ("create", "delete", "start")] == ["create", "start", "start"]


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6])
def test_babysit_stops_at_once_where_the_same_would_happen_again(cloud, code):
    cloud.script(states_1="ACTIVE", codes=str(code))
    _, told = cloud("babysit", *BABYSIT, code=code)
    assert f"lmeff ended with exit code {code}: lmeff says: launch 0 ends with {code}" in told
    assert cloud.verbs().count("start") == 1
    assert "is still ACTIVE and billed" in told


def test_babysit_believes_a_plan_that_does_not_fit(cloud):
    cloud.script(states_1="ACTIVE", plan="6")
    cloud("babysit", "--delete", *BABYSIT, code=6)
    assert "start" not in cloud.verbs()
    assert (cloud.fake / "life").read_text() == "gone\n"


def test_babysit_tries_other_failures_a_bounded_number_of_times(cloud):
    cloud.script(states_1="ACTIVE", codes="1")
    assert "given up after 3 failures" in cloud("babysit", "--failures", "2", "--backoff", "100", *BABYSIT, code=1)[1]
    assert cloud.verbs().count("start") == 3
    assert [rest for rest in cloud.sleeps() if rest >= 100] == [100, 200]


def test_babysit_gives_up_where_it_is_taken_away_too_often(cloud):
    cloud.script(**{f"states_{life}": "ACTIVE ACTIVE SUSPENDED" for life in (1, 2, 3)}, codes="hang")
    assert "taken away more than 1 times" in cloud("babysit", "--preemptions", "1", *BABYSIT, code=21)[1]
    assert cloud.verbs().count("create") == 2
    assert (cloud.fake / "life").read_text() == "gone\n"


def test_babysit_takes_back_a_request_that_only_waits(cloud):
    cloud.script(states_1="WAITING_FOR_RESOURCES")
    cloud("babysit", "--timeout", "20", *BABYSIT, code=22)
    assert cloud.verbs()[-2:] == ["delete", "list"]


def test_babysit_bounds_refusals_by_the_cloud(cloud):
    cloud.script(creates=["RESOURCE_EXHAUSTED: quota"])
    assert "given up after 2 failures" in cloud("babysit", "--failures", "1", *BABYSIT, code=20)[1]
    assert cloud.verbs() == ["create", "create"]


def test_babysit_stops_the_others_where_one_worker_failed(cloud):
    cloud.script(states_1="ACTIVE", codes="hang")
    (cloud.fake / "codes.0-w-1").write_text("4\n")
    cloud("babysit", *BABYSIT, code=4)
    cloud.ended()


def test_babysit_outlives_a_cloud_that_does_not_answer_for_a_while(cloud):
    cloud.script(states_1=["ACTIVE", "ACTIVE", *["BROKEN"] * 6, "ACTIVE"], codes="0")
    _, told = cloud("babysit", *BABYSIT)
    assert "the cloud does not answer (2 of 20 times): ERROR: Unable to find the server" in told
    assert "done after 1 attempts" in told
    assert cloud.verbs().count("start") == 1


def test_babysit_makes_machines_anew_that_do_not_answer(cloud):
    cloud.script(states_1="ACTIVE", states_2="ACTIVE", codes="hang 0", drops=["status 1"] * 5)
    _, told = cloud("babysit", *BABYSIT)
    assert "1 of 2 workers answer (5 of 5 times)" in told
    assert [verb for verb in cloud.verbs() if verb in ("create", "delete", "start")] == [
        "create",
        "start",
        "delete",
        "create",
        "start",
    ]


def test_babysit_watches_a_job_that_runs(cloud):
    cloud.active()
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    assert "done after 1 attempts" in cloud("babysit", "--job", "a", *BABYSIT)[1]
    assert cloud.verbs().count("start") == 1


# --- settings


def test_flags_over_environment_over_file(cloud):
    (cloud.repository / "tpu.settings").write_text(
        "# mine\nname=from-file\nproject=file-project\nzone=us-east5-b\ntype=v6e-8\nspot=1\n"
    )
    told, _ = cloud(
        "create",
        "--settings",
        "tpu.settings",
        "--name",
        "from-flag",
        "--dry-run",
        LMEFF_TPU_NAME="from-env",
        LMEFF_TPU_PROJECT="env-project",
    )
    assert "create from-flag --project=env-project --zone=us-east5-b --accelerator-type=v6e-8" in told
    assert "--spot" in told


@pytest.mark.parametrize("line", ["nmae=x", "name", "name=$(touch pwned)", "eval `touch pwned`", "[$(touch pwned)]=x"])
def test_a_settings_file_is_read_and_not_run(cloud, line):
    (cloud.repository / "tpu.settings").write_text(f"{line}\n")
    cloud("create", "--settings", "tpu.settings", *PLACE[2:], *TYPE, code=2)
    assert not list(cloud.repository.rglob("pwned"))


HOSTILE = (
    "$(touch pwned)", "`touch pwned`", "a;touch pwned", "a|touch pwned", "a&&touch pwned", "a\ntouch pwned", "--force", "-x", "../../etc",
    "a b", "a'b", 'a"b', "a\\b", "a*", "~root", "A-Name", "a/b", "ä", "", "a" * 80,
)  # fmt: skip


@pytest.mark.parametrize("script", sorted(ARGUMENTS))
def test_hostile_names_reach_no_command(cloud, script):
    arguments = ARGUMENTS[script]
    at = arguments.index("--name") + 1
    for name in HOSTILE:
        _, told = cloud(script, *arguments[:at], name, *arguments[at + 1 :], code=2)
        assert "--name" in told or "is missing" in told, (name, told)
    cloud(
        script,
        *[word for i, word in enumerate(arguments) if i not in (at - 1, at)],
        code=2,
        LMEFF_TPU_NAME="$(touch pwned)",
    )
    assert cloud.calls() == []
    assert not list(cloud.repository.rglob("pwned"))


HOSTILE_VALUES = [
    ("create", "--zone", "us-east5-b;x"),
    ("create", "--type", "v5litepod-16 --spot"),
    ("create", "--runtime", "$(x)"),
    ("create", "--slices", "0"),
    ("create", "--slices", "1e3"),
    ("create", "--valid-for", "6h;x"),
    ("create", "--project", "p"),
    ("setup", "--wheel", "dist/../x.whl"),
    ("setup", "--extras", "tpu]x"),
    ("setup", "--python", "3.11;x"),
    ("launch", "--runs", "/mnt/../etc"),
    ("launch", "--runs", "relative"),
    ("launch", "--topology", "v5e:4x4;x"),
    ("launch", "--verb", "doctor"),
    ("launch", "--job", "../x"),
    ("logs", "--job", "a/b"),
    ("logs", "--lines", "1;x"),
    ("fetch", "--run", ".."),
    ("fetch", "--out", "-x"),
    ("gke", "--image", 'x"y:1'),
    ("gke", "--claim", "a b"),
    ("gke", "--secret", "$x"),
    ("create", "--a]$(touch pwned)", "x"),
    ("create", "--a]$(touch pwned)=x", "x"),
]


@pytest.mark.parametrize(("script", "flag", "value"), HOSTILE_VALUES, ids=lambda value: re.sub(r"\W+", "_", value))
def test_hostile_values_reach_no_command(cloud, script, flag, value):
    arguments = ARGUMENTS[script]
    end = arguments.index(CONFIG) if CONFIG in arguments else len(arguments)
    cloud(script, *arguments[:end], flag, value, *arguments[end:], code=2)  # the last of two flags counts
    assert cloud.calls() == []
    assert not list(cloud.repository.rglob("pwned"))


@pytest.mark.parametrize("script", ["launch", "babysit", "gke"])
def test_hostile_configs_and_settings_reach_no_command(cloud, script):
    arguments = [word for word in ARGUMENTS[script] if word not in (CONFIG, "--", "--mesh.fsdp", "16")]
    for config in ("../x.py", "/x.py", "-x.py", "a b.py", "$(x).py", "configs/x.sh", "configs/../x.py"):
        cloud(script, *arguments, config, code=2)
    for word in ("$(touch pwned)", "a b", "a;b", "a'b", 'a"b', "a\nb", ""):
        cloud(script, *arguments, CONFIG, "--", word, code=2)
    assert cloud.calls() == []


# --- dry runs

EVERY = {name: [arguments] for name, arguments in ARGUMENTS.items()}
EVERY["create"] = [
    ARGUMENTS["create"],
    (*PLACE, "--type", "v5p-256", "--slices", "4", "--reserved"),
    (*PLACE, "--type", "v6e-8", "--spot", "--valid-for", "6h"),
]
EVERY["launch"] = [
    ARGUMENTS["launch"],
    ("--slices", "2", "--dirty", "--no-plan", "--env-file", "secrets", *ARGUMENTS["launch"]),
]
EVERY["logs"] = [PLACE, (*PLACE, "--all"), (*PLACE, "--follow", "--worker", "3")]
EVERY["gke"] = [JOBSET, (*JOBSET[:-1], "--spot", "--secret", "tokens", CONFIG, "--", "--mesh.fsdp", "64"), XPK]


@pytest.mark.parametrize("script", sorted(EVERY))
def test_dry_runs_print_the_commands_and_run_nothing(cloud, script):
    """Golden transcripts; UPDATE_GOLDEN=1 writes them anew."""
    (cloud.repository / "secrets").write_text("TOKEN=x\n")
    (cloud.repository / "secrets").chmod(0o600)
    text = ""
    for arguments in EVERY[script]:
        arguments = tuple("/mnt/runs" if word == "@RUNS@" else word for word in arguments)
        dry = ("--job", "job") if script == "launch" else ()
        first = arguments[:1] if script == "gke" else ()
        words = (*first, "--dry-run", *dry, *arguments[len(first) :])
        text += f"$ {script}.sh {' '.join(words)}\n" + cloud(script, *words)[0].replace(str(SCRIPTS), "tpu_scripts")
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)  # of an archive: its compression may differ
    text = re.sub(r"\b([0-9a-f]{40}|[0-9a-f]{12})\b", "COMMIT", text)
    assert cloud.calls() == []
    golden = GOLDEN / f"{script}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    if script != "gke":
        commands = "\n".join(line for line in text.splitlines() if not line.startswith("$ "))
        assert subprocess.run(["/bin/bash", "-n"], input=commands, text=True).returncode == 0


def test_the_manifest_is_yaml_that_says_what_was_asked_for(cloud):
    yaml = pytest.importorskip("yaml")
    told, _ = cloud("gke", *JOBSET[:-1], "--spot", "--secret", "tokens", CONFIG, "--", "--mesh.fsdp", "64")
    manifest = yaml.safe_load(told)
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (16, 16, 0)  # 64 chips a slice, 4 a host
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4, 5, 6]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert container["args"] == ["run", CONFIG, "--distributed", "--runs", "/runs", "--mesh.fsdp", "64"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    one, _ = cloud("gke", "jobset", *GKE, "--topology", "v6e:1x1", "--claim", "runs", CONFIG)
    assert yaml.safe_load(one)["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 1


# --- the scripts themselves


def test_every_script_is_here_with_help_and_strict(cloud):
    found = {file.stem for file in SCRIPTS.glob("*.sh")} - {"lib", "remote"}
    assert found == set(ARGUMENTS) == set(EVERY)
    for script in sorted(found):
        assert f"{script}.sh" in cloud(script, "--help")[0]
        text = (SCRIPTS / f"{script}.sh").read_text()
        assert "lib.sh" in text
        assert not re.search(r"^\s*(eval|source \$|\. )", text, flags=re.MULTILINE)
        assert os.access(SCRIPTS / f"{script}.sh", os.X_OK)
        assert f"`{script}.sh" in (SCRIPTS / "README.md").read_text()
    assert "set -euo pipefail" in (SCRIPTS / "lib.sh").read_text()
    assert "set -euo pipefail" in (SCRIPTS / "remote.sh").read_text()


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install 'lmeff[lint]'")
    found = subprocess.run(
        [shellcheck, "-x", *map(str, sorted(SCRIPTS.glob("*.sh")))], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
