"""What the scripts print: golden transcripts of dry runs, manifests for GKE, help; and that shellcheck finds nothing.

After a change that is meant, `UPDATE_GOLDEN=1 python -m pytest tests/tpu_scripts/test_tpu_dry_runs.py` writes the transcripts anew; git shows what
became of them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import ARGUMENTS, CONFIG, FAKES, GKE, JOBSET, PLACE, ROOT, SCRIPTS, XPK

GOLDEN = Path(__file__).parent / "golden"
LIBRARY = {"lib", "settings", "cloud", "remote"}
BILLED = {"create", "wait", "launch", "stop", "babysit", "gke"}  # after these machines may be there that cost

EVERY = {name: [arguments] for name, arguments in ARGUMENTS.items()}
EVERY["create"] = [
    ARGUMENTS["create"],
    (*PLACE, "--type", "v5p-64", "--slices", "4", "--reserved", "--internal-ips"),
    (*PLACE, "--type", "v6e-16", "--spot", "--valid-for", "6h", "--startup-script", "mount.sh"),
    (*PLACE, "--type", "v6e-16", "--slices", "2", "--spot", "--runtime", "v2-alpha-tpuv6e"),
]
EVERY["setup"] = [ARGUMENTS["setup"], (*ARGUMENTS["setup"], "--slices", "2", "--python", "3.12", "--extras", "tpu")]
EVERY["launch"] = [
    ARGUMENTS["launch"],
    ("--slices", "2", "--dirty", "--no-plan", "--env-file", "secrets", "--profile", "10:13", *ARGUMENTS["launch"]),
]
EVERY["logs"] = [PLACE, (*PLACE, "--all"), (*PLACE, "--follow", "--worker", "3", "--internal-ips")]
EVERY["fetch"] = [ARGUMENTS["fetch"], (*ARGUMENTS["fetch"], "--checkpoints")]
EVERY["babysit"] = [("--delete", "--spot", *ARGUMENTS["babysit"])]
SPOT = (*JOBSET[:-1], "--spot", "--secret", "tokens", "--restarts", "3", CONFIG, "--", "--mesh.fsdp", "32")
EVERY["gke"] = [
    JOBSET,
    SPOT,
    XPK,
    (*XPK[:-1], "--slices", "2", "--spot", "--runs", "/runs", "--env-file", ".env", CONFIG, "--", "--mesh.fsdp", "16"),
]


@pytest.mark.parametrize("script", sorted(EVERY))
def test_dry_runs_print_the_commands_and_run_nothing(cloud, script):
    (cloud.repository / "mount.sh").write_text("mount\n")
    (cloud.repository / "secrets").write_text("TOKEN=x\n")
    (cloud.repository / "secrets").chmod(0o600)
    text = ""
    for arguments in EVERY[script]:
        arguments = tuple("/mnt/runs" if word == "@RUNS@" else word for word in arguments)
        dry = ("--job", "job") if script == "launch" else ()
        first = arguments[:1] if script == "gke" else ()
        words = (*first, "--dry-run", *dry, *arguments[len(first) :])
        text += f"$ {script}.sh {' '.join(words)}\n" + cloud(script, *words)[0].replace(f"{cloud.repository}/", "")
    text = re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)  # of an archive: its compression may differ
    text = re.sub(r"\b([0-9a-f]{40}|[0-9a-f]{12})\b", "COMMIT", text)
    assert cloud.calls() == []
    assert not (cloud.repository / ".lmeff-tpu").exists()
    golden = GOLDEN / f"{script}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("script", ["create", "wait", "logs", "stop", "fetch", "delete"])
def test_what_a_dry_run_prints_is_what_is_run(cloud, script):
    """The lines, given to a shell, make the calls of the script in its order; a look at the state in between is not announced."""
    cloud.active()
    cloud("launch", "--job", "a", *ARGUMENTS["launch"])
    cloud.ended()
    (cloud.runs / "mine").mkdir()
    arguments = EVERY[script][0]
    told, _ = cloud(script, "--dry-run", *arguments)
    (cloud.fake / "log.jsonl").unlink()
    cloud(script, *arguments)
    made = [
        [re.sub(r"^/.*/lmeff-tpu\.\w+/", "", word) for word in call] for call in cloud.calls() if call[0] == "gcloud"
    ]
    (cloud.fake / "log.jsonl").unlink()
    for line in told.splitlines():
        if line.startswith("gcloud"):
            subprocess.run(["bash", "-c", line], cwd=cloud.repository, env=cloud.environment, capture_output=True)
    printed = cloud.calls()
    assert printed
    assert [call for call in made if call in printed] == printed


def test_a_printed_line_is_read_back_as_the_same_words(cloud):
    words = [
        "a",
        "",
        "a b",
        "it's",
        "$(x)",
        "--command=bash 'x' \"y\"",
        "--format=value(a,b)",
        "--x=",
        "*",
        "~",
        "a\nb",
        "\\",
    ]
    told, _ = cloud.run("bash", "-c", 'source tpu_scripts/lib.sh; show "$@"', "x", *words)
    again, _ = cloud.run("bash", "-c", f"printf '%s\\0' {told}")
    assert again.split("\0")[:-1] == words


def test_the_manifest_is_yaml_that_says_what_was_asked_for(cloud):
    yaml = pytest.importorskip("yaml")
    told, _ = cloud("gke", *SPOT)
    manifest = yaml.safe_load(told)
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (8, 8, 0)  # 32 chips a slice, 4 a host
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3, 4, 5, 6]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x4x4"
    assert container["args"] == ["run", CONFIG, "--distributed", "--runs", "/runs", "--mesh.fsdp", "32"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    one, _ = cloud("gke", "jobset", *GKE, "--topology", "v6e:1x1", "--claim", "runs", CONFIG)
    assert yaml.safe_load(one)["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 1


def test_tpu7x_is_had_through_gke_alone(cloud):
    assert "--tpu-type=tpu7x-16" in cloud("gke", *XPK[:-1], "--type", "tpu7x-16", CONFIG)[0]
    assert 'gke-tpu-accelerator: "tpu7x"' in cloud("gke", *JOBSET[:-1], "--topology", "tpu7x:2x2x2", CONFIG)[0]
    assert "gke.sh" in cloud("create", *PLACE, "--type", "tpu7x-16", code=2)[1]


def test_a_manifest_is_applied_as_the_help_says(cloud):
    (command,) = re.findall(r"gke.sh jobset ... (\| kubectl apply -f -)", cloud("gke", "--help")[0])
    cloud.run("bash", "-c", f"tpu_scripts/gke.sh {' '.join(JOBSET)} {command}")
    assert cloud.calls() == [["kubectl", "apply", "-f", "-"]]
    assert (cloud.fake / "applied").read_text() == cloud("gke", *JOBSET)[0]


# --- the scripts themselves


def test_every_script_is_strict_and_told_of():
    found = {file.stem for file in SCRIPTS.glob("*.sh")} - LIBRARY
    assert found == set(ARGUMENTS) == set(EVERY)
    for script in sorted(found):
        text = (SCRIPTS / f"{script}.sh").read_text()
        assert text.splitlines()[3] == 'source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"'
        assert os.access(SCRIPTS / f"{script}.sh", os.X_OK)
        assert f"`{script}.sh" in (SCRIPTS / "README.md").read_text()
    for file in SCRIPTS.glob("*.sh"):
        assert not re.search(r"^\s*(eval|\.) ", file.read_text(), flags=re.MULTILINE)
        assert "bash -c" not in file.read_text().replace("""bash -c 'echo $$ >""", "")
        assert len(file.read_text().splitlines()) < 300
    assert "set -euo pipefail" in (SCRIPTS / "lib.sh").read_text()
    assert "set -euo pipefail" in (SCRIPTS / "remote.sh").read_text()


@pytest.mark.parametrize("script", sorted(ARGUMENTS))
def test_help_costs_nothing_and_says_what_forgetting_costs(cloud, script):
    told, errors = cloud(script, "--help")
    assert told.startswith(f"{script}.sh ")
    assert errors == ""
    for words in (("-h",), (*ARGUMENTS[script][: 1 if script == "gke" else 0], "--name", "$x", "--help")):
        assert cloud(script, *words)[0] == told
    assert all(len(line) <= 160 for line in told.splitlines())
    assert "--dry-run" in told
    if script in BILLED:
        assert "bill" in told
        assert ("delete.sh" in told) or script == "gke"
    assert not re.search(r"\$ ?\d", told)  # no price, which would be wrong tomorrow
    assert cloud.calls() == []


def test_help_of_create_says_how_to_count_and_how_to_look(cloud):
    told, _ = cloud("create", "--help")
    for words in ("chips x hours", "v5p-64 is 32 chips", "queued-resources list", "delete.sh --name", "tpu/pricing"):
        assert words in told


@pytest.mark.slow  # `make lint` does the same
def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install 'lmeff[lint]'")
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "/shellcheck " in line]
    assert len(lines) == 1
    checked = [file for word in lines[0].split()[2:] for file in sorted(map(str, ROOT.glob(word)))]
    assert {str(file) for folder in (SCRIPTS, FAKES.parent) for file in folder.glob("*.sh")} <= set(checked)
    assert {str(file) for file in FAKES.iterdir()} <= set(checked)
    found = subprocess.run([shellcheck, "-x", *checked], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
