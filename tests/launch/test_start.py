"""Which processes a command line starts, and what it refuses before any is started."""

import json

import pytest

from tests.runs import lmeff, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return write_config(folder, folder / "text", recipe='Stage(name="model"),', claims="")


@pytest.fixture
def started(monkeypatch):
    """What would have been started."""
    calls = []
    monkeypatch.setattr(
        "lmeff.cli.launch", lambda command, processes, restarts: calls.append((command[3:], processes, restarts))
    )
    return calls


@pytest.mark.parametrize(
    ("words", "options", "restarts"),
    [
        (("--processes", "4"), ("--devices", "4"), 0),
        (("--processes", "4", "--restarts", "3", "--mesh.fsdp", "2", "--mesh.tensor", "2"), ("--devices", "4"), 3),
        (("--processes", "4", "--mesh.data", "4", "--mesh.tensor", "2"), ("--devices", "8"), 0),
        (("--processes", "4", "--devices", "8"), (), 0),
    ],
    ids=["no mesh", "the mesh", "data of the mesh", "devices"],
)
def test_train_shares_the_devices_of_its_mesh(config, started, words, options, restarts):
    code, _, err = lmeff("train", config, *words)
    assert code == 0, err
    assert started == [(["train", *options, str(config), *words], 4, restarts)]


def test_a_command_without_a_config_has_a_device_a_process(tmp_path, started):
    assert lmeff("eval", tmp_path, "--processes", "3")[0] == 0
    assert started == [(["eval", "--devices", "3", str(tmp_path), "--processes", "3"], 3, 0)]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (
            ("--processes", "4", "--mesh.data", "2"),
            2,
            "--processes: got 4 processes for a mesh of 2 devices, expected a divisor",
        ),
        (("--processes", "4", "--mesh.tensor", "3"), 3, "over tensor = 3"),
        (("--restarts", "4"), 2, "--restarts: got 4 without --processes"),
        (("--processes", "2", "--distributed"), 2, "--processes: got it with --distributed"),
    ],
    ids=["indivisible", "config", "restarts alone", "cluster"],
)
def test_what_is_known_to_be_wrong_is_told_before(config, started, words, code, told):
    got, out, err = lmeff("train", config, *words, "--json")
    assert (got, json.loads(out)["exit_code"]) == (code, code)
    assert err.startswith("lmeff: ")
    assert err.count("\n") == 1
    assert told in err
    assert not started
