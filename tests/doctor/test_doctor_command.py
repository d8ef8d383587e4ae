"""`lmeff doctor` as a whole: every check is made and none can end it; several processes are compared."""

import dataclasses
import fcntl
import json
import sys
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from lmeff.cli import main
from lmeff.config import Experiment, ModelConfig, preset
from lmeff.doctor import examine as examination
from lmeff.doctor import hosts, step, table
from lmeff.doctor.check import Check
from lmeff.launch import launch

CONFIG = """
from lmeff.config import DataConfig, Experiment, MeshPlan, TrainConfig, preset
def experiment():
    return Experiment(name="one", model=preset("tiny", vocab=264), train=TrainConfig(batch=8), data=DataConfig(sequence=32, path=PATH))
"""


@pytest.fixture(scope="module")
def trial():
    """A few steps of a tiny model, which take seconds to compile: all tests read the same."""
    return step.attempt(step.small(None, "cpu")[0], Experiment(name="x").optim, "compute=bfloat16", jax.devices()[3])


@pytest.fixture
def quick(monkeypatch, trial):
    """Steps that were taken before, on a machine without accelerators."""
    monkeypatch.setattr(step, "attempt", lambda *given: trial)
    monkeypatch.setattr(table, "hardware", lambda root: {})


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("text\n")
    Path("one.py").write_text(CONFIG.replace("PATH", "('book.txt',)"))
    return "one.py"


def lmeff(capsys, *words):
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_machine_that_is_well(quick, config, capsys):
    code, out, err = lmeff(capsys, "doctor", config, "--json")
    answer = json.loads(out)
    assert code == 0, err
    assert [check["name"] for check in answer["checks"]] == [row.name for row in examination.CHECKS]
    assert all(check.keys() == {"name", "ok", "level", "found", "remedy"} for check in answer["checks"])
    assert all(bool(check["remedy"]) is not check["ok"] for check in answer["checks"]), answer
    found = {check["name"]: check["found"] for check in answer["checks"]}
    assert f"jax {jax.__version__}" in found["packages"]
    assert "8 x cpu" in found["devices"]
    assert "goes with 8 devices" in found["config"]
    assert "1 layer of the config's model" in found["train step"]
    assert sorted(path.name for path in Path().iterdir()) == ["book.txt", "one.py"]
    lines = err.splitlines()
    assert [line[5:].split(":")[0] for line in lines] == [row.name for row in examination.CHECKS]  # one line each
    assert all(line.startswith(("ok   ", "look ")) for line in lines)


def test_without_a_config_the_machine_alone(quick, config, capsys):
    code, out, _ = lmeff(capsys, "doctor", "--runs", "elsewhere/runs", "--json")
    found = {check["name"]: check["found"] for check in json.loads(out)["checks"]}
    assert (code, "elsewhere/runs" in found["folder"], Path("elsewhere").exists()) == (0, True, False)
    assert "none given" in found["config"]


@pytest.mark.parametrize(
    ("words", "failed", "told"),
    [
        (("--mesh.fsdp", "3"), ["config"], "mesh: got"),
        (("--data.path", "gone.txt"), ["config"], "gone.txt is not there"),
        (("--data.path", "gs://bucket/x.txt"), [], "not looked at: gs://bucket/x.txt"),
        (("--runs", "book.txt/runs"), ["folder"], "book.txt is a file"),
        (
            ("--model.layers", "300", "--model.width", "65536", "--model.ffn", "262144"),
            ["memory", "disk"],
            "lmeff plan",
        ),
    ],
    ids=["mesh", "data", "remote_data", "folder", "size"],
)
def test_a_run_that_cannot_be(quick, config, capsys, words, failed, told):
    code, out, err = lmeff(capsys, "doctor", config, *words, "--json")
    answer = json.loads(out)
    assert (code, answer["failed"]) == (bool(failed), failed), err
    assert told in err
    assert not failed or f"failed: {', '.join(failed)}" in answer["error"]


def test_a_run_that_goes_on_is_named(quick, config, capsys):
    Path("runs/one").mkdir(parents=True)
    with Path("runs/one/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = lmeff(capsys, "doctor", config)
    assert (code, "run lock" in err.splitlines()[-1]) == (1, True)


def test_text_that_a_run_has_read_before_may_be_gone(quick, config, capsys):
    Path("runs/one/data").mkdir(parents=True)
    code, _, err = lmeff(capsys, "doctor", config, "--data.path", "gone.txt")
    assert code == 0, err
    assert Path("runs/one/data").exists()


def test_unknown_words_are_refused(config, capsys):
    code, _, err = lmeff(capsys, "doctor", "--fix")
    assert (code, "unknown arguments ['--fix']" in err) == (2, True)
    assert lmeff(capsys, "doctor", config, config)[0] == 2
    assert lmeff(capsys, "doctor", config, "--model.widht", "3")[0] == 2
    assert lmeff(capsys, "doctor", "absent.py")[0] == 3


@pytest.mark.parametrize("row", examination.CHECKS, ids=lambda row: row.name.replace(" ", "_"))
def test_no_check_can_end_the_doctor(row, tmp_path, monkeypatch):
    """Whatever a check raises is its finding, and the others are made."""

    def broken(case):
        raise ZeroDivisionError("of no use\nsecond line")

    fine = tuple(
        examination.Row(r.name, lambda case, r=r: Check(r.name, "ok", "fine"), r.devices) for r in examination.CHECKS
    )
    rows = tuple(r._replace(check=broken) if r.name == row.name else r for r in fine)
    monkeypatch.setattr(examination, "CHECKS", rows)
    with pytest.raises(examination.Unwell) as caught:
        examination.examine(examination.Case(tmp_path, tmp_path), Console(quiet=True))
    answer = caught.value.answer
    assert (caught.value.exit_code, answer["failed"], len(answer["checks"])) == (1, [row.name], len(rows))
    (bad,) = [check for check in answer["checks"] if not check["ok"]]
    assert bad["found"] == "ZeroDivisionError: of no use"


def test_without_devices_what_needs_them_is_passed_over(tmp_path, monkeypatch):
    def none(*given):
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(examination.Unwell) as caught:
        examination.examine(examination.Case(tmp_path, tmp_path), Console(quiet=True))
    found = {check["name"]: check for check in caught.value.answer["checks"]}
    assert caught.value.answer["failed"] == ["devices"]
    assert "Unable to initialize backend 'tpu'" in found["devices"]["found"]
    assert {name for name, check in found.items() if "no devices" in check["found"]} == {
        row.name for row in examination.CHECKS if row.devices
    }


def test_a_process_that_does_not_come_is_a_finding(tmp_path, monkeypatch):
    def late(name):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(examination, "joined", lambda: True)
    monkeypatch.setattr(hosts, "wait", late)
    monkeypatch.setattr(examination, "CHECKS", examination.CHECKS[:2])
    with pytest.raises(examination.Unwell) as caught:
        examination.examine(examination.Case(tmp_path, tmp_path), Console(quiet=True))
    checks = caught.value.answer["checks"]
    assert [check["name"] for check in checks] == ["hosts", "hosts", "python", "packages"]
    assert "Barrier timed out" in checks[0]["found"]


def test_it_is_said_what_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "LONG", 0.01)
    row = examination.Row("devices", lambda case: time.sleep(0.3) or Check("devices", "ok", "late"))
    console = Console(record=True, quiet=False, file=(tmp_path / "out").open("w"), width=200)
    assert examination.attempt(row, examination.Case(tmp_path, tmp_path), console).ok
    assert "devices: still waiting; on a pod start the same command on every host" in console.export_text()


def test_on_a_terminal_lines_are_folded_and_nothing_is_lost(tmp_path):
    console = Console(force_terminal=True, width=80, record=True, file=(tmp_path / "out").open("w"))
    check = Check("TPU lock", "FAIL", "word " * 40 + "[tpu]", "pip install 'jax[tpu]==0.10.2'")
    examination.show(check, console)
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.startswith("FAIL TPU lock      word")
    assert text.split().count("word") == 40
    assert "-> pip install 'jax[tpu]==0.10.2'" in text


def test_the_real_train_step_trains(trial):
    check = step.verdict(trial, "a tiny model")
    assert check.ok, check
    assert trial.losses[0] > trial.losses[1] > trial.losses[2]  # always the same batch
    assert (trial.traces, trial.donated, len(trial.losses)) == (1, True, step.STEPS)


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"losses": (5.5, float("nan"), 5.4)}, "FAIL", "losses 5.50 nan 5.40"),
        ({"losses": (0.0, 0.0, 0.0)}, "FAIL", "first loss 0.00: expected about 5.55"),
        ({"traces": 3}, "look", "traced 3 times"),
        ({"donated": False}, "look", "not donated"),
    ],
)
def test_steps_that_go_wrong_are_told(trial, changes, level, words):
    check = step.verdict(trial._replace(**changes), "a model")
    assert (check.level, words in check.found) == (level, True), check


@pytest.mark.parametrize(
    ("cfg", "own"),
    [
        (preset("tiny"), True),
        (ModelConfig(width=32, layers=6, heads=2, ffn=64, window=8, full_layers=(5,)), True),
        (preset("llama3_8b"), False),
    ],
)
def test_the_model_of_the_step_is_the_configs_at_one_layer_where_that_takes_seconds(cfg, own):
    made, _ = step.small(cfg, "cpu")
    assert (made.layers, made.vocab) == (1, step.VOCABULARY)
    assert (made.width == cfg.width) is own
    assert step.small(preset("llama3_8b"), "tpu")[0].width == 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "optim"),
    [
        (preset("moe_tiny"), "muon"),
        (preset("tiny", positions="learned", context=16, norm="layer", bias="all"), "adafactor"),
    ],
    ids=["experts", "learned_positions"],
)
def test_other_models_and_optimizers_train_too(cfg, optim):
    chosen = dataclasses.replace(Experiment(name="x").optim, name=optim, ema=0.9)
    check = step.train_step(cfg, Experiment(name="x", optim=chosen, precision="compute=float16"), jax.devices()[0])
    assert check.ok, check


def reports(count=4, **changes):
    """Reports of hosts that are alike; `changes[field] = {process: value}`."""
    made = [hosts.Report(n, f"host{n}", {"jax": "0.10.2", "python": "3.11.7"}, (), 100.0) for n in range(count)]
    return [r._replace(**{field: v[r.process] for field, v in changes.items() if r.process in v}) for r in made]


def test_hosts_that_are_alike():
    assert hosts.alike(reports()).ok
    assert hosts.one_folder(reports(), Path("runs")).ok
    assert hosts.one_time(reports()).ok
    assert hosts.from_text(reports()[2].to_text()) == reports()[2]


@pytest.mark.parametrize("odd", [0, 3])
def test_the_host_that_differs_is_named_also_where_it_leads(odd):
    check = hosts.alike(reports(versions={odd: {"jax": "0.10.1", "python": "3.11.7", "libtpu": "0.0.42"}}))
    assert check.level == "FAIL"
    assert f"jax 0.10.1 on process {odd} (host{odd}), 0.10.2 on the others" in check.found
    assert f"libtpu 0.0.42 on process {odd} (host{odd}), none on the others" in check.found


def test_hosts_that_see_another_folder_or_another_time():
    check = hosts.one_folder(reports(sees={1: False, 2: False}), Path("runs"))
    assert (check.level, "process 1 (host1), process 2 (host2)" in check.found) == ("FAIL", True)
    check = hosts.one_time(reports(time={3: 160.0}))
    assert (check.level, "process 3 (host3)" in check.found) == ("look", True)


def test_many_hosts_take_one_line_where_they_are_well_and_one_for_each_finding_else():
    well, bad, worse = (
        Check("disk", "ok", "fine"),
        Check("disk", "look", "little", "more"),
        Check("disk", "FAIL", "none", "x"),
    )
    checks = dict.fromkeys(range(8), (well,)) | {2: (bad,), 5: (worse,), 6: (bad,)}
    assert hosts.merged(reports(8, checks=dict.fromkeys(range(8), (well,)))) == [well]
    assert hosts.merged(reports(8, checks=checks)) == [
        worse._replace(found="process 5 (host5): none"),
        bad._replace(found="process 2 (host2), process 6 (host6): little"),
    ]
    everywhere = hosts.merged(reports(8, checks=dict.fromkeys(range(8), (bad,))))
    assert everywhere == [bad]


def test_a_digest_of_the_sources_changes_with_them(tmp_path, monkeypatch):
    before = hosts.sources()
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(hosts.lmeff, "__file__", str(tmp_path / "__init__.py"))
    first = hosts.sources()
    (tmp_path / "loss.py").write_text("x = 1\n")
    assert len({before, first, hosts.sources()}) == 3


POD = """
import json, sys
from pathlib import Path
from rich.console import Console
from lmeff.doctor import examine, hosts, packages
from lmeff.doctor.check import Check
from lmeff.launch import Machine
from lmeff.parallel import processes
from lmeff.parallel.processes import launched

folder, case = Path(sys.argv[1]), sys.argv[2]
Machine(devices=2, processes=2).prepare()
odd = launched().index == 1
real = packages.read_installed
if odd and case == "versions":
    packages.read_installed = lambda: real() | {"jaxlib": packages.Package("0.0.1")}

def raises(_):
    if odd and case == "crash":
        raise OSError(5, "Input/output error")
    return Check("python", "ok", "fine")

examine.CHECKS = (examine.Row("python", raises), *(row for row in examine.CHECKS if row.name in ("folder", "devices", "clock")))
directory = folder / ("other" if odd and case == "folder" else "runs")
try:
    answer = examine.examine(examine.Case(directory, directory, chosen=True), Console(quiet=True))
except examine.Unwell as unwell:
    answer = unwell.answer
if not odd:
    (folder / "answer.json").write_text(json.dumps(answer))
processes.sync("end")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "failed", "told"),
    [
        ("well", [], "alike on 2 processes"),
        ("versions", ["versions"], "jaxlib 0.0.1 on process 1"),
        ("folder", ["folder", "shared folder"], "does not see what process 0 writes"),
        ("crash", ["python"], "OSError: [Errno 5] Input/output error"),
    ],
)
def test_two_processes_are_compared(tmp_path, case, failed, told):
    launch([sys.executable, "-c", POD, str(tmp_path), case], 2)
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["failed"] == failed
    assert told in " ".join(check["found"] for check in answer["checks"])
    assert [report["process"] for report in answer["processes"]] == [0, 1]
    assert all(len(report["checks"]) == 4 for report in answer["processes"])
    assert answer["processes"][0]["versions"]["lmeff"] == answer["processes"][1]["versions"]["lmeff"]
    assert [path.name for path in tmp_path.iterdir()] == ["answer.json"]


@pytest.mark.slow
def test_the_command_with_two_processes(tmp_path, capfd):
    (tmp_path / "one.py").write_text(CONFIG.replace("PATH", repr((str(tmp_path / "one.py"),))))
    words = ["doctor", str(tmp_path / "one.py"), "--devices", "4", "--processes", "2", "--runs", str(tmp_path / "runs")]
    code = main([*words, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert {"versions", "shared folder", "clocks"} <= {check["name"] for check in json.loads(out)["checks"]}
    assert "4 x cpu (cpu) on 2 processes" in err
    assert main([*words, "--mesh.fsdp", "3"]) == 1
    out, err = capfd.readouterr()
    assert "FAIL config: mesh: got" in out
    assert "doctor: a check failed: config" in err
    assert [path.name for path in tmp_path.iterdir()] == ["one.py"]
