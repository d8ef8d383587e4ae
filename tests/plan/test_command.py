"""`lmeff plan` as a command: the promised keys, exit codes, and one clear line for every wrong option."""

import json
from pathlib import Path

import pytest

from lmeff.core.errors import DoesNotFit, UsageError
from lmeff.plan.command import count, size
from tests.runs import lmeff, lmeff_json, write_config

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.py"
PROMISED = {
    "parameters", "flops_per_step", "bytes_per_device", "collective_bytes", "step_seconds", "energy_kwh", "fits",
}  # fmt: skip

# What each case adds to `lmeff plan configs/quickstart.py`; the exit code; words that the message must have.
WRONG = {
    "unknown chip": (["--chip", "v5"], 3, ["chip", "'v5'", "v5e", "v5p"]),
    "chip with a capital": (["--chip", "V5P"], 3, ["'V5P'", "did you mean", "v5p"]),
    "impossible mesh": (["--chip", "v5p", "--devices", "6", "--mesh.fsdp", "4"], 3, ["mesh", "fsdp 4", "6 devices"]),
    "shards that are none": (
        ["--chip", "v5p", "--devices", "8", "--mesh.tensor", "8"],
        3,
        ["H = 4 over tensor = 8", "evenly"],
    ),
    "rows that do not divide": (["--chip", "v5p", "--devices", "3", "--mesh.fsdp", "3"], 3, ["train.batch", "16 rows"]),
    "no devices": (["--chip", "v5p", "--devices", "0"], 2, ["--devices", "got 0", "at least 1"]),
    "devices that are no number": (["--devices", "many"], 2, ["--devices", "many"]),
    "unknown stage": (["--stage", "teecher"], 3, ["'teecher'", "teacher"]),
    "stage that does not train": (["--stage", "int8"], 3, ["'int8'", "does not train", "teacher"]),
    "topology of no family": (["--topology", "v9p:4x4x4"], 3, ["'v9p:4x4x4'", "v5p"]),
    "topology with a dim too few": (["--topology", "v5p:4x4"], 3, ["'v5p:4x4'", "v5p:4x4x4"]),
    "topology and chip": (["--topology", "v5p:4x4x4", "--chip", "v5p"], 2, ["--topology", "--chip", "alone"]),
    "topology with a side of none": (["--topology", "v5p:4x4x0"], 3, ["'v5p:4x4x0'", "v5p:4x4x4"]),
    "topology with a side too long": (["--topology", "v5e:32x8", "--no-compile"], 3, ["'v5e:32x8'", "sides up to 16"]),
    "topology larger than a pod": (["--topology", "v5p:16x16x28", "--no-compile"], 3, ["'v5p:16x16x28'", "6,144"]),
    "chip without a name": (["--chip", ""], 3, ["chip", "''", "v5e"]),
    "compile and not": (["--compile", "--no-compile"], 2, ["--compile", "--no-compile"]),
    "budget without a unit": (["--budget-bytes", "4"], 2, ["--budget-bytes", "'4'", "unit", "4GiB"]),
    "budget of another unit": (["--budget-bytes", "4parsec"], 2, ["'4parsec'", "GiB"]),
    "budget of no time": (["--budget-ms", "0"], 2, ["--budget-ms", "0", "above 0"]),
    "budget of all time": (["--budget-ms", "inf"], 2, ["--budget-ms", "inf", "above 0"]),
    "tokens without end": (["--tokens", "1e400"], 2, ["--tokens", "'1e400'"]),
    "tokens of no unit": (["--tokens", "15 trillion"], 2, ["--tokens", "'15 trillion'", "15T"]),
    "no layers": (["--layers", "0"], 2, ["--layers", "got 0", "at least 1"]),
    "tokens below one": (["--tokens", "0"], 2, ["--tokens", "'0'"]),
    "unknown option": (["--serv"], 2, ["--serv"]),
    "unknown setting": (["--mesh.tensr", "2"], 2, ["--mesh.tensor"]),
    "page that cannot be written": (["--stage", "student", "--html", "/proc/none/a.html"], 1, ["--html", "/proc/none/a.html"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_clear_line(name):
    options, code, words = WRONG[name]
    got, _, err = lmeff("plan", QUICKSTART, *options)
    assert got == code, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("lmeff: ")]
    assert len(lines) == 1 or code == 2, err
    message = lines[0] if lines else err
    assert all(word in message for word in words), message


def test_a_config_that_is_not_there():
    code, _, err = lmeff("plan", "nowhere.py")
    assert code == 3
    assert "nowhere.py" in err


@pytest.mark.parametrize(("text", "n"), [("15T", 15e12), ("300B", 3e11), ("2e12", 2e12), ("1.5M", 1_500_000), ("7", 7)])
def test_counts(text, n):
    assert count("--tokens", text) == n


@pytest.mark.parametrize(("text", "n"), [("4GiB", 4 * 2**30), ("1.5 MB", 1_500_000), ("64KiB", 65_536)])
def test_sizes(text, n):
    assert size("--budget-bytes", text) == n
    with pytest.raises(UsageError, match="unit"):
        size("--budget-bytes", text.rstrip("iBKGM "))


def test_a_size_that_no_number_holds():
    with pytest.raises(UsageError, match="unit"):
        size("--budget-bytes", "9" * 400 + "GiB")


def test_every_training_stage_and_the_promised_keys_on_top():
    answer = lmeff_json("plan", QUICKSTART, "--chip", "v5e", "--devices", "2")
    assert set(answer) >= PROMISED
    names = [stage["stage"] for stage in answer["stages"]]
    assert names == ["teacher", "pruned", "shrunk-recovered", "student", "student-control", "qat-int4", "all-three"]
    for stage in answer["stages"]:
        assert set(stage) >= PROMISED
        assert stage["devices"] == 2
    first = answer["stages"][0]
    assert {key: answer[key] for key in PROMISED} == {key: first[key] for key in PROMISED}
    assert first["bytes_per_device"]["total"] == sum(n for k, n in first["bytes_per_device"].items() if k != "total")
    assert first["fits"]
    assert 0 < first["step_seconds"]["low"] <= first["step_seconds"]["middle"] <= first["step_seconds"]["high"]
    student = next(stage for stage in answer["stages"] if stage["stage"] == "student")
    assert student["flops_per_step"]["teacher"] > 0


def test_one_stage_alone_for_other_tokens():
    whole = lmeff_json("plan", QUICKSTART, "--chip", "v5e", "--stage", "student")
    assert "stages" not in whole
    assert whole["job"]["steps"] == 250
    longer = lmeff_json("plan", QUICKSTART, "--chip", "v5e", "--stage", "student", "--tokens", "1M")
    assert longer["job"]["steps"] == -(-1_000_000 // (16 * 128))
    assert longer["energy_kwh"] / whole["energy_kwh"] == pytest.approx(longer["job"]["steps"] / 250)


def test_every_model_of_a_recipe_is_cut_to_its_first_layers():
    whole = lmeff_json("plan", QUICKSTART, "--chip", "v5e")["stages"]
    short = lmeff_json("plan", QUICKSTART, "--chip", "v5e", "--layers", 1)["stages"]
    for before, after in zip(whole, short, strict=True):
        assert {leaf["shape"][0] for leaf in after["leaves"] if leaf["letters"].startswith("L")} == {1}
        assert after["bytes_per_device"]["total"] < before["bytes_per_device"]["total"]
    teacher, student = ({stage["stage"]: stage for stage in stages}["student"] for stages in (whole, short))
    assert student["flops_per_step"]["teacher"] < 0.5 * teacher["flops_per_step"]["teacher"]


def test_what_does_not_fit_has_its_exit_code_and_its_numbers():
    options = ("--chip", "v5e", "--devices", "8", "--mesh.fsdp", "8", "--train.batch", "64")
    code, out, err = lmeff("plan", CONFIGS / "llama3_8b.py", *options, "--evaluate.batch", "8", "--json")
    assert code == 6
    answer = json.loads(out)
    assert answer["exit_code"] == 6
    assert not answer["fits"]
    assert answer["bytes_per_device"]["total"] > answer["capacity"]
    category = max((k for k in answer["bytes_per_device"] if k != "total"), key=answer["bytes_per_device"].get)
    assert f"{category} take" in answer["error"]
    assert "train.remat" in answer["error"]  # the remedy
    assert "--chip" not in answer["error"]
    assert "Does not fit" in err


def test_a_large_config_without_a_chip_is_told_of_the_option():
    code, _, err = lmeff("plan", CONFIGS / "llama3_8b.py")
    assert code == 6
    assert "this machine's CPU; name another chip with --chip or --topology" in err


@pytest.mark.parametrize(
    ("name", "devices", "parameters"), [("llama3_8b", 32, 8_030_261_248), ("llama3_70b", 512, 70_553_706_496)]
)
def test_the_large_configs_fit_their_slices(name, devices, parameters):
    answer = lmeff_json("plan", CONFIGS / f"{name}.py", "--chip", "v5p", "--devices", devices)
    assert answer["parameters"] == parameters
    assert answer["fits"]
    six_nd = 6 * parameters * answer["tokens_per_step"]
    assert answer["flops_per_step"]["model_causal"] == pytest.approx(six_nd, rel=0.25)
    assert answer["flops"]["six_nd"] == pytest.approx(six_nd)
    assert answer["bytes_per_device"]["parameters"] == pytest.approx(4 * parameters / devices, rel=0.01)
    assert 0.2 < answer["utilization"]["mfu_full"] < 0.75


@pytest.fixture
def config(tmp_path):
    """A small model with two stages and a student."""
    (tmp_path / "text").mkdir()
    return write_config(tmp_path, tmp_path / "text")


def test_compiled_for_simulated_devices_it_shows_both_numbers(config, monkeypatch):
    monkeypatch.setattr("lmeff.plan.command.simulate_devices", lambda count: None)  # this process has its eight already
    options = ("--devices", "8", "--mesh.fsdp", "8", "--stage", "teacher", "--compile")
    answer = lmeff_json("plan", config, *options)
    compiled = answer["compiled"]
    assert {"argument_bytes", "temp_bytes", "total_bytes", "collective_bytes"} <= set(compiled)
    memory = answer["memory"][0]
    assert compiled["argument_bytes"] == sum(memory["state"].values())
    assert compiled["fits"]
    assert answer["fits"]
    predicted = answer["collective_bytes"]["all-gather"]["fsdp"]
    assert compiled["collective_bytes"]["all-gather"]["fsdp"] == pytest.approx(predicted, rel=0.02)


def test_what_the_compiler_refuses_is_told_with_its_reason(config, monkeypatch):
    def refuse(job, where, predicted):
        raise DoesNotFit("v5e:2x2: the step needs 17.1G of a device's 15.75G")

    monkeypatch.setattr("lmeff.plan.command.verify", refuse)
    code, out, err = lmeff("plan", config, "--stage", "teacher", "--topology", "v5e:2x2", "--json")
    answer = json.loads(out)
    assert code == answer["exit_code"] == 6
    assert answer["compiled"]["refusal"] == "v5e:2x2: the step needs 17.1G of a device's 15.75G"
    assert answer["error"] == f"stage 'teacher': {answer['compiled']['refusal']}"
    assert not answer["fits"]
    assert "Does not fit, says the compiler: refused; predicted" in err
    code, out, _ = lmeff("plan", config, "--stage", "teacher", "--topology", "v5e:2x2", "--no-compile", "--json")
    assert code == 0
    assert "compiled" not in json.loads(out)


@pytest.mark.tpu_aot
@pytest.mark.slow
def test_compiled_for_a_topology(config):
    answer = lmeff_json("plan", config, "--stage", "teacher", "--topology", "v5e:2x2", "--mesh.fsdp", "4")
    compiled, memory = answer["compiled"], answer["memory"][0]
    assert compiled["where"] == "v5e:2x2"
    assert compiled["fits"]
    assert compiled["argument_bytes"] == pytest.approx(sum(memory["state"].values()), rel=0.005)


@pytest.mark.parametrize(
    ("devices", "options", "begins"),
    [(32, (), "fsdp 16 x context 2"), (16, ("--mesh.fsdp", "3"), "fsdp 16")],
    ids=["more-devices-than-rows", "another-number"],
)
def test_a_search_begins_from_a_mesh_that_can_train(devices, options, begins):
    where = ("--chip", "v5e", "--devices", devices, "--stage", "teacher", *options)
    alone, _, _ = lmeff("plan", QUICKSTART, *where, "--json")
    assert alone == 3, "without a search the config's own mesh is what counts"
    code, out, err = lmeff("plan", QUICKSTART, *where, "--search", "--json")
    assert code == 0, err
    assert f"the search begins from {begins} (" in err
    found = json.loads(out)["search"]
    assert "the config's own plan cannot train on these devices" in found["reasons"]
    assert not any("the config's" in plan["names"] for plan in found["plans"])


def test_a_search_on_devices_that_no_simple_mesh_suits_says_why():
    code, _, err = lmeff("plan", QUICKSTART, "--chip", "v5e", "--devices", "17", "--search")
    assert code == 3
    assert "train.batch: got 16 rows, expected a multiple of mesh.data = 17" in err


def test_search_room_budget_and_serving_are_told_in_all_three_forms(config, tmp_path):
    page = tmp_path / "plan.html"
    options = ("--stage", "teacher", "--chip", "v5e", "--devices", "8", "--search", "--fit", "--serve", "--html", page)
    code, out, err = lmeff("plan", config, *options, "--budget-bytes", "30KiB", "--budget-ms", "1", "--json")
    assert code == 0, err
    answer = json.loads(out)
    best, *_ = answer["search"]["plans"]
    assert best["fits"]
    assert best["step_seconds"]["middle"] <= answer["step_seconds"]["middle"]
    assert answer["room"]["rows"] % answer["room"]["row_step"] == 0
    assert answer["room"]["rows_bytes"] <= answer["capacity"] < answer["room"]["more_rows_bytes"]
    assert {row["batch"] for row in answer["serving"]["rows"]} == {1, 32}
    assert all(option["stored_bytes"] <= 30 * 1024 for option in answer["budget"]["options"])
    text = page.read_text()
    for word in ("Search", "Serving", "room for", "Compressions within a budget", best["words"]):
        assert word in text
    assert best["words"].split(",")[0] in err
    assert "Compressions".lower() in err


def test_a_budget_that_nothing_meets_has_its_exit_code(config):
    code, _, err = lmeff("plan", config, "--stage", "teacher", "--chip", "v5e", "--budget-bytes", "1KiB")
    assert code == 6
    assert "no compression that is known here meets 1.00 KiB" in err


def test_the_page_is_written(tmp_path):
    page = tmp_path / "plan.html"
    lmeff_json("plan", QUICKSTART, "--chip", "v5e", "--stage", "student", "--html", page)
    assert "quickstart: student" in page.read_text()
