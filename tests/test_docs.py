"""The documentation is true: its code runs, and the files and commands it names exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from lmeff.cli import COMMANDS, Command
from lmeff.compress.base import LeafTransform, State, per_leaf
from lmeff.compress.config import KINDS
from lmeff.config.overrides import resolve
from lmeff.config.validate import validate
from lmeff.core.numerics import materialize
from lmeff.core.specs import initialize
from lmeff.core.tree import flatten
from lmeff.models.config import PRESETS
from lmeff.models.transformer import param_specs
from lmeff.plan.command import check, choose, target
from lmeff.recipe.transfer import import_model
from tests.recipe.pretrained_model import CFG, write_huggingface

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "tpu_scripts/README.md",
    *(f"docs/{name}.md" for name in ("architecture", "extend", "meshes", "models", "plan", "tpu")),
)


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.fixture
def extension():
    """Everything that the page on extending defines; its row of the table is taken away afterwards."""
    kinds, namespace = dict(KINDS), {}
    for code in blocks("docs/extend.md"):
        exec(compile(code, "docs/extend.md", "exec"), namespace)
    yield namespace
    KINDS.clear()
    KINDS.update(kinds)


def test_the_extension_holds_its_laws(extension):
    specs = param_specs(PRESETS["tiny"])
    params = initialize(jax.random.key(0), specs)
    for name, member in extension["MEMBERS"].items():
        state = jax.jit(lambda p, m=member: m.init(p, specs))(params)
        seen = jax.jit(member.apply)(params, state)
        exported = materialize(jax.jit(member.export)(params, state))
        for path, w in flatten(seen).items():
            np.testing.assert_array_equal(w, flatten(exported)[path], err_msg=f"{name}: {path}")
    rounded = np.asarray(extension["round_to_power_of_two"](params["blocks"]["mlp"]["up"]))
    assert set(np.frexp(np.abs(rounded[rounded != 0]))[0]) == {0.5}


def test_the_extension_s_experiment_is_valid(extension):
    experiment = extension["experiment"]
    assert validate(experiment, jax.device_count()).keys() == {"teacher", "rounded"}


def test_the_readme_s_config_is_valid_and_its_transform_rounds():
    config, transform = blocks("README.md")
    namespace = {}
    exec(compile(config, "README.md", "exec"), namespace)
    assert validate(namespace["experiment"](), jax.device_count()).keys() == {"teacher", "small", "packed"}
    namespace = {"jax": jax, "jnp": jax.numpy, "per_leaf": per_leaf, "LeafTransform": LeafTransform}
    exec(compile(transform, "README.md", "exec"), namespace)
    assert namespace["power_of_two"]().apply({}, State({}, {})) == {}
    np.testing.assert_array_equal(namespace["round_to_power_of_two"](np.float32([3.0, -0.6, 0.0])), [4.0, -0.5, 0.0])


def plans():
    """Every `lmeff plan configs/...` that pages and configs promise."""
    pages = [ROOT / page for page in PAGES] + sorted((ROOT / "configs").glob("*.py"))
    lines = [line for page in pages for line in re.findall(r"^lmeff plan configs/.*", page.read_text(), re.MULTILINE)]
    return sorted({line.partition("#")[0].strip() for line in lines})


@pytest.mark.parametrize("line", plans())
def test_every_plan_that_is_shown_can_be_asked_for(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, overrides = tyro.cli(Command, args=shlex.split(line)[1:], return_unknown_args=True)
    experiment, _ = resolve(command.config, overrides, prog="lmeff plan")
    check(command)
    where = target(command, experiment)
    chosen, found = choose(command, experiment, where)
    assert chosen in found
    assert chosen.devices == where.devices


def commands(page):
    """Every line of a page's blocks that begins with the command, without its comment."""
    shown = re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [
        line.partition(" # ")[0].strip() for block in shown for line in re.findall(r"^lmeff .*", block, re.MULTILINE)
    ]


@pytest.mark.parametrize("line", sorted({*commands("README.md"), *commands("docs/models.md")}))
def test_every_command_that_is_shown_is_one(line):
    words = shlex.split(line)[1:]
    command, unknown = tyro.cli(Command, args=words, return_unknown_args=True)
    assert words[0] in COMMANDS
    assert isinstance(command, COMMANDS[words[0]][0])
    assert not unknown or words[0] in ("run", "train", "eval", "plan"), unknown  # which take settings of a config


def test_the_page_on_models_has_a_config_that_loads_one(tmp_path, monkeypatch):
    (config,) = blocks("docs/models.md")
    namespace = {}
    exec(compile(config, "docs/models.md", "exec"), namespace)
    monkeypatch.chdir(tmp_path)
    write_huggingface(tmp_path / "hf", cfg=dataclasses.replace(CFG, context=512))
    import_model(tmp_path / "hf", tmp_path / "models/qwen3")
    shapes = validate(namespace["experiment"](), jax.device_count())
    assert shapes.keys() == {"teacher", "qat", "packed"}
    assert {cfg.width for cfg in shapes.values()} == {CFG.width}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
