"""The launch scripts against a cloud of folders."""

import hashlib
import shutil

import pytest

from tests.tpu_scripts.cloud import ARGUMENTS, CONFIG, PLACE, SCRIPTS, TYPE, WHEEL

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
    assert "try 1 of 3: started on 1 of 2 workers" in told
    assert cloud.verbs().count("start") == 2
    assert len(cloud.running()) == 2


def test_a_worker_that_stays_out_of_reach_stops_the_others(cloud):
    cloud.active()
    cloud.script(drops=["start 1"] * 3, codes="hang")
    assert (
        "started on 1 of 2 workers only, and stopped on 2; nothing of it runs"
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
    """With a worker 1 that does not find the mark."""
    cloud.active()
    patched = (SCRIPTS / "remote.sh").read_text().replace("if [[ -e $1/.lmeff-tpu-$2 ]]", "if [[ $HOST != *w-1 ]]")
    shutil.copytree(SCRIPTS, cloud.repository / "scripts")
    (cloud.repository / "scripts/remote.sh").write_text(patched)
    _, told = cloud.run("scripts/launch.sh", *ARGUMENTS["launch"], code=25)
    assert "worker t1v-n-0-w-1 does not see what worker 0 wrote" in told
    assert cloud.verbs().count("mark") == cloud.verbs().count("unmark") == 3
    assert "start" not in cloud.verbs()


def test_runs_that_is_mounted_late_is_waited_for(cloud):
    cloud.active()
    cloud.script(drops=["seen 1"])
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    assert cloud.sleeps() == [20]
    cloud.ended()


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
    for file in (
        "report.json",
        "config.json",
        "teacher/metrics.jsonl",
        "profile/teacher/x.pb",
        "teacher/checkpoints/9/weights",
    ):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text(file)
    assert "lmeff says: launch 0 ends with 0" in cloud("logs", *PLACE)[0]
    assert cloud("logs", *PLACE, "--all")[0].count("lmeff says") == 2
    cloud("fetch", *ARGUMENTS["fetch"])
    fetched = cloud.repository / "fetched/mine"
    names = {str(file.relative_to(fetched)) for file in fetched.rglob("*") if file.is_file()}
    assert names == {"report.json", "config.json", "teacher/metrics.jsonl", "profile/teacher/x.pb"}
    cloud("fetch", *ARGUMENTS["fetch"], "--checkpoints")
    assert (fetched / "teacher/checkpoints/9/weights").read_text() == "teacher/checkpoints/9/weights"
    assert "there is no run" in cloud("fetch", *ARGUMENTS["fetch"][:-1], "other", code=25)[1]
