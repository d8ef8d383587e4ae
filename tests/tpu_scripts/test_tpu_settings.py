"""Settings: where they come from, and that no hostile one reaches a command."""

import re
import subprocess
from itertools import cycle, islice
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import ARGUMENTS, CONFIG, JOBSET, PLACE, TYPE, XPK

HOSTILE = (
    *("$(touch pwned)", "`touch pwned`", "${IFS}touch", "$HOME", "a;touch pwned", "a|touch pwned", "a&&touch pwned", "a>pwned"),
    *("a\ntouch pwned", "\n", "a b", " a", "a'b", 'a"b', "a\\b", "a*", "[a]", "~root", "{a,b}", "!a", "#a"),
    *("-x", "--force", "--settings=x", "..", "../../etc", "a/../b", "a//b\t", "ä", "𝒶", "a\u202eb", "\x1b[31m", "a" * 300, ""),
)  # fmt: skip
assert len(HOSTILE) >= 20

CALLS = {**{name: words for name, words in ARGUMENTS.items() if name != "gke"}, "gke jobset": JOBSET, "gke xpk": XPK}
LISTED = """
script=$1
shift
source "${script%/*}/lib.sh"
source() { :; } # lib.sh is here, with a parser that tells what it is told
parse() { printf '%s\\n' $1 -- $2; exit 0; }
builtin source "$script"
"""


def options_of(script, words):
    """The settings and the switches of a script, as it tells its parser."""
    path = Path("tpu_scripts", f"{script}.sh").resolve()
    found = subprocess.run(["bash", "-c", LISTED, script, path, *words[:1]], capture_output=True, text=True, check=True)
    settings, _, switches = found.stdout.partition("--\n")
    return settings.split(), switches.split()


def cases(settings, switches, every):
    """(way, setting, value): as a flag each value, of --name at least; else each setting and way takes its turn through the values."""
    turn = cycle(HOSTILE)
    for name in (*settings, "settings"):
        yield from (("flag", name, value) for value in (HOSTILE if every or name == "name" else islice(turn, 5)))
        yield "joined", name, next(turn)
        if name != "settings":
            yield "file", name, next(turn)
        yield "environment", name, next(turn) or "-x"  # an empty variable is none
    for name in switches:
        yield "environment", name, next(turn) or "-x"
        yield "file", name, next(turn)
        yield "joined", name, next(turn)


def without(words, name):
    """Words without a flag and its value."""
    if f"--{name}" not in words:
        return words
    at = words.index(f"--{name}")
    return (*words[:at], *words[at + 2 :])


def files(folder):
    """Every file and folder below."""
    return {str(path) for path in folder.rglob("*")}


def refusals(cloud, script, words, tried, end=None):
    """What refusals.sh prints for these cases, each put before the config or at `end`."""
    if end is None:
        end = words.index(CONFIG) if CONFIG in words else len(words)
    words = tuple("/mnt/runs" if word == "@RUNS@" else word for word in words)
    found = subprocess.run(
        [
            "bash",
            str(Path(__file__).parent / "refusals.sh"),
            f"tpu_scripts/{script}.sh",
            *words[:end],
            "::",
            *words[end:],
        ],
        cwd=cloud.repository,
        env=cloud.environment,
        input="".join(f"{field}\0" for case in tried for field in case),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stderr == ""
    return found.stdout


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("call", CALLS)
def test_no_hostile_value_reaches_a_command(cloud, call, every):
    script, words = call.split()[0], CALLS[call]
    settings, switches = options_of(script, words)
    assert len(settings) >= 3
    tried = list(cases(settings, switches, every))
    before = files(cloud.repository)
    told = ""
    for name in {name for _, name, _ in tried}:
        told += refusals(cloud, script, without(words, name), [case for case in tried if case[1] == name])
    assert told == ""
    assert cloud.calls() == []
    assert files(cloud.repository) == before
    assert not list(cloud.fake.parent.glob("lmeff-tpu.*"))


@pytest.mark.parametrize("call", [name for name in CALLS if CONFIG in CALLS[name]])
def test_no_hostile_config_or_word_for_lmeff_reaches_a_command(cloud, call):
    words = tuple(word for word in CALLS[call] if word not in ("--", "--mesh.fsdp", "16"))
    script, words = call.split()[0], words[: words.index(CONFIG)]
    configs = (*HOSTILE, "/x.py", "a.sh", "configs/../x.py", "configs//x.py", "-x.py")
    told = refusals(cloud, script, words, [("word", "", value) for value in configs if value != "--settings=x"])
    alone = (
        "..",
        "-x",
        "--force",
        "--settings=x",
        "../../etc",
        "a/../b",
    )  # a shell leaves them alone; lmeff judges them
    behind = [("word", "", value) for value in HOSTILE if value not in alone]
    told += refusals(cloud, script, (*words, CONFIG, "--"), behind, end=len(words) + 2)
    assert told == ""
    assert cloud.calls() == []


@pytest.mark.parametrize("call", CALLS)
def test_an_option_that_is_none_is_refused(cloud, call):
    script, words = call.split()[0], CALLS[call]
    for option in ("--nmae", "--nmae=x", "-n", "--a]$(touch pwned)", "--a]$(touch pwned)=x", "--dry-run=1", "--name"):
        _, told = cloud(script, *(words[:1] if script == "gke" else ()), option, code=2)
        assert len(told.splitlines()) == 1, told
    _, told = cloud(script, *words[: words.index(CONFIG) if CONFIG in words else None], "stray;word", code=2)
    assert "stray" in told
    assert cloud.calls() == []


@pytest.mark.parametrize("call", CALLS)
def test_what_is_missing_is_named(cloud, call):
    script, words = call.split()[0], CALLS[call]
    settings, _ = options_of(script, words)
    needed = [
        name for name in settings if f"--{name}" in words and not (script == "launch" and name in ("type", "runs"))
    ]
    for name in needed:
        _, told = cloud(script, *without(words, name), code=2)
        assert f"--{name}: is missing" in told
        assert f"LMEFF_TPU_{name.upper().replace('-', '_')}" in told
    assert cloud.calls() == []


def test_flags_over_environment_over_file(cloud):
    (cloud.repository / "tpu.settings").write_text(
        "# mine\nname=from-file\nproject=file-project\nzone=us-east5-b\n\ntype=v6e-8\nspot=1\nfollow=1\nimage=a/b:c"
    )
    told, _ = cloud(
        *("create", "--settings", "tpu.settings", "--name", "from-flag", "--dry-run"),
        LMEFF_TPU_NAME="from-env",
        LMEFF_TPU_PROJECT="env-project",
        LMEFF_TPU_ZONE="",
    )
    assert "create from-flag --project=env-project --zone=us-east5-b --accelerator-type=v6e-8" in told
    assert "--spot" in told
    again, _ = cloud("create", "--name", "from-flag", LMEFF_TPU_SETTINGS="tpu.settings", LMEFF_TPU_DRY_RUN="1")
    assert again == told.replace("env-project", "file-project")


@pytest.mark.parametrize(
    "line", ["nmae=x", "name", "eval `touch pwned`", "[$(touch pwned)]=x", "spot=yes", "=x", "-v=1"]
)
def test_a_line_of_a_settings_file_that_is_no_setting_is_refused(cloud, line):
    (cloud.repository / "tpu.settings").write_text(f"zone=us-east5-b\n{line}\n")
    _, told = cloud("create", "--settings", "tpu.settings", *PLACE, *TYPE, code=2)
    assert "tpu.settings" in told
    assert not list(cloud.repository.rglob("pwned"))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("create", ("--spot", "--reserved")),
        ("create", ("--startup-script", "missing.sh")),
        ("create", ("--settings", "missing")),
        ("create", ("--type", "v3-8")),
        ("logs", ("--all", "--follow")),
        ("setup", ("--wheel", "missing.whl")),
        ("launch", ("--env-file", "missing")),
        ("launch", ("--topology", "v5p:4x4")),
        ("launch", ("--topology", "v5e:4x4x4")),
        ("launch", ("--type", "v5litepod-12")),
        ("launch", ("--profile", "10")),
    ],
    ids=lambda value: re.sub(r"\W+", "_", " ".join(value)) if isinstance(value, tuple) else value,
)
def test_settings_that_do_not_go_together_are_refused(cloud, script, words):
    arguments = ARGUMENTS[script]
    end = arguments.index(CONFIG) if CONFIG in arguments else len(arguments)
    cloud(script, *arguments[:end], *words, *arguments[end:], code=2)
    assert [call for call in cloud.calls() if call[0] != "sleep"] == []
