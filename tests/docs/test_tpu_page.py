"""The page for newcomers, command by command and in its order: lmeff's own run here, the launch scripts against a cloud of folders."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import tyro

from lmeff.cli import COMMANDS, Command
from lmeff.config.overrides import resolve
from tests.docs.page import BLOCK, ROOT, Shown, prose, refute, shown
from tests.runs import lmeff
from tests.tpu_scripts.cloud import GIT, SCRIPTS, cloud_in

PAGE = "docs/tpu.md"
# What is neither lmeff's nor a script's, and cannot be run here. A new line is looked at by a person, and added by hand.
LOOKED_AT = {
    "git clone https://github.com/OWNER/lmeff lmeff",
    "cd lmeff",
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "python -m pip install -e '.[tpu,report,text]'",
    "python -m pip wheel . --no-deps -w dist",
    "gcloud auth login",
    "gcloud config set project my-project",
    "gcloud services enable tpu.googleapis.com",
    "gcloud compute config-ssh",
    "ssh-add ~/.ssh/google_compute_engine",
    "gcloud compute tpus queued-resources list --zone us-east5-a",
    "gcloud compute tpus tpu-vm list --zone us-east5-a",
}
QUEUED = "gcloud compute tpus queued-resources"
PLACE = "llama --project=my-project --zone=us-east5-a"
# The first line of each dry run.
FIRST = {
    "create.sh": f"{QUEUED} create {PLACE} --accelerator-type=v5p-64 ",
    "wait.sh": f"{QUEUED} describe {PLACE} ",
    "setup.sh": f"gcloud compute tpus tpu-vm describe {PLACE} ",
    "launch.sh": "lmeff plan configs/llama3_8b.py --topology v5p:2x4x4 --data.path /mnt/share/corpus",
    "logs.sh": f"{QUEUED} ssh {PLACE} --node=0 --worker=0 ",
    "profile.sh": f"{QUEUED} ssh {PLACE} --node=0 --worker=0 ",
    "babysit.sh": f"{QUEUED} create {PLACE} --accelerator-type=v5p-64 ",
    "fetch.sh": f"{QUEUED} ssh {PLACE} --node=0 --worker=0 ",
    "delete.sh": f"{QUEUED} delete {PLACE} ",
    "gke.sh jobset": "apiVersion: jobset.x-k8s.io/v1alpha2",
    "gke.sh xpk": "xpk workload create --project=my-project --zone=us-east5-a --cluster=tpus --workload=llama --tpu-type=v5p-64 ",
}
SHARE = "/mnt/share"


def files():
    """Files of the page, by the last name in backquotes of the line above their block."""
    text, found = (ROOT / PAGE).read_text(), {}
    for block in BLOCK.finditer(text):
        if block[1] in ("ini", "bash"):
            above = text[: block.start()].rstrip().splitlines()[-1]
            found[re.findall(r"`([\w.]+)`", above)[-1]] = block[2]
    return found


@pytest.fixture
def cloud(tmp_path):
    """A copy of the repository's configs and scripts in which the page is followed, and the cloud that they speak to."""
    made = tmp_path / "made"
    shutil.copytree(ROOT / "configs", made / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    (made / "tpu_scripts").symlink_to(SCRIPTS)
    (made / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=made, env={"PATH": "/usr/bin:/bin", **GIT}, check=True)
    place = tmp_path / "cloud"
    place.mkdir()
    with cloud_in(place, made) as found:
        found.runs.mkdir()
        for name, text in files().items():
            (found.repository / name).write_text(text)
        yield found


def wheel(cloud):
    """What `pip wheel` leaves; building one needs the internet."""
    (cloud.repository / "dist").mkdir()
    (cloud.repository / "dist/lmeff-0.1.0-py3-none-any.whl").write_text("a wheel")


def exported(each):
    """The variables that a line exports."""
    return dict(word.split("=", 1) for word in each.words[1:]) if each.words[0] == "export" else {}


def is_script(each):
    return each.words[0].startswith("tpu_scripts/")


def parsed(each):
    """As the command line parses it, its settings checked where it takes a config."""
    command, overrides = tyro.cli(Command, args=each.words[1:], return_unknown_args=True)
    assert isinstance(command, COMMANDS[each.words[1]][0])
    if each.words[1] in ("train", "run", "data", "plan"):
        resolve(command.config, overrides, prog=f"lmeff {each.words[1]}")
    else:
        assert not overrides
    return command


def planned(each):
    """Plans here, and compares what is shown."""
    code, out, err = lmeff(*each.words[1:])
    assert code == 0, err
    wrong = refute(each.lines, out + err)
    assert not wrong, wrong


def alone(each):
    """Runs in a process of its own, which can simulate as many devices as it likes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "lmeff.cli", *each.words[1:]]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr


def follow(each):
    """A line with lmeff; what takes long, or wants what a run has left, is parsed."""
    if "--no-compile" in each.words:
        planned(each)
    elif each.words[1] == "config":
        alone(each)
    else:
        parsed(each)


def rehearse(each, cloud, environment):
    """A dry run of a line with a script; gives its name, with its verb where it has one."""
    at = 2 if each.words[0].endswith("gke.sh") else 1
    name = " ".join(each.words[:at]).removeprefix("tpu_scripts/")
    out, _ = cloud.run(*each.words[:at], "--dry-run", *each.words[at:], **environment)
    assert out.startswith(FIRST[name]), out
    return name


def test_the_page_from_top_to_bottom(cloud, monkeypatch):
    monkeypatch.chdir(cloud.repository)
    monkeypatch.setenv("COLUMNS", "80")
    environment, rehearsed, looked_at = {}, set(), set()
    for each in shown(PAGE):
        environment |= exported(each)
        if is_script(each):
            rehearsed.add(rehearse(each, cloud, environment))
        elif each.words[0] == "lmeff":
            follow(each)
        elif each.words[0] != "export":
            assert each.command in LOOKED_AT, f"{each.command}: look at it, then add it to LOOKED_AT"
            looked_at.add(each.command)
        if "wheel" in each.words:
            wheel(cloud)
    assert rehearsed == set(FIRST)
    assert looked_at == LOOKED_AT
    assert not cloud.calls()  # a dry run asks the cloud nothing


def script(name):
    """The words of the page's only line with a script."""
    (words,) = [each.words for each in shown(PAGE) if each.words[0] == f"tpu_scripts/{name}.sh"]
    return words


def ready(cloud):
    """What the page has made before its first script that asks the cloud; runs lie in a folder of this machine. Gives the exported variables."""
    wheel(cloud)
    settings = cloud.repository / "tpu.settings"
    settings.write_text(settings.read_text().replace(f"{SHARE}/runs", str(cloud.runs)))
    return {name: value for each in shown(PAGE) for name, value in exported(each).items()}


def test_the_scripts_of_the_page_bring_a_run_to_its_end(cloud):
    """The same lines without --dry-run: the cloud needs three polls, the run ends, and nothing is left."""
    environment = ready(cloud)
    cloud.script(states_1="WAITING_FOR_RESOURCES PROVISIONING ACTIVE", workers="2", codes="0")
    for name in ("create", "wait", "setup", "launch", "logs"):
        out, _ = cloud.run(*script(name), **environment)
    assert "lmeff says" in out
    cloud.ended()
    asked = ["run", "configs/llama3_8b.py", "--distributed", "--runs", str(cloud.runs)]
    assert [words[: len(asked)] for _, words in cloud.launches()] == [asked, asked]
    run = cloud.runs / "llama3-8b"
    run.mkdir()
    (run / "report.json").write_text("{}")
    cloud.run(*script("fetch"), **environment)
    assert (cloud.repository / "fetched/llama3-8b/report.json").read_text() == "{}"
    assert cloud.asked_for()
    cloud.run(*script("delete"), **environment)
    assert not cloud.asked_for()


def test_the_babysitter_of_the_page_goes_on_where_a_notice_came(cloud):
    """Exit code 42 on every worker and machines that are taken away, then an end: the same command twice, and with --delete nothing is left."""
    environment = ready(cloud)
    cloud.script(states_1=["ACTIVE"] * 4 + ["SUSPENDED"], states_2="ACTIVE", workers="2", codes="42 0")
    _, told = cloud.run(*script("babysit"), **environment)
    assert "done after" in told
    first, *others = {tuple(words) for _, words in cloud.launches()}
    assert not others, (first, others)
    assert not cloud.asked_for()
    assert not cloud.running()


def test_files_of_the_page():
    assert files().keys() == {"tpu.settings", "mount.sh"}
    subprocess.run(["bash", "-n"], input=files()["mount.sh"], text=True, check=True)
    assert f"{SHARE}/runs" in files()["tpu.settings"]
    assert SHARE in files()["mount.sh"]


def test_exit_codes_of_the_page_are_told_by_somebody():
    known = {0, 2, 3, 4, 5, 6, 42}
    scripts = (SCRIPTS / "README.md").read_text()
    for code in {int(code) for code in re.findall(r"[Ee]xit codes? (\d+)", prose(PAGE))} - known:
        assert re.search(rf"\b{code} [a-zA-Z]", scripts[scripts.index("## Exit codes") :]), code


def test_the_forgotten_weekend_is_counted_right():
    chips, hours, total = re.search(
        r"(\d+) chips for a forgotten weekend of (\d+) hours are ([\d,]+) chip-hours", prose(PAGE)
    ).groups()
    assert int(chips) * int(hours) == int(total.replace(",", ""))


@pytest.mark.slow
def test_the_doctor_of_the_page_looks_at_this_machine(cloud, monkeypatch):
    monkeypatch.chdir(cloud.repository)
    code, out, err = lmeff("doctor")
    told = [line for line in (out + err).splitlines() if re.match(r"(ok|look|FAIL) ", line)]
    assert len(told) > 10, out + err
    assert code == int(any(line.startswith("FAIL") for line in told))


INLINE = re.findall(r"`([^`\n]+)`", prose(PAGE))


@pytest.mark.parametrize("line", sorted({line for line in INLINE if re.match(r"lmeff \w+", line)}))
def test_what_the_text_names_can_be_asked_for(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed(Shown(line, []))


@pytest.mark.parametrize("line", sorted({line for line in INLINE if re.match(r"\w+\.sh .*--\w", line)}))
def test_options_that_the_text_names_are_in_the_help(line):
    name, *options = line.split()
    told = subprocess.run(["bash", SCRIPTS / name, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"{option}(?![\w-])", told) for option in options if option.startswith("--")), told
