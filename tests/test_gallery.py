"""The gallery of configs: every command that its docstrings show can be asked for, every plan fits, and the numbers below it are the plan's own."""

import dataclasses
import re
import shlex
import time

import jax
import pytest
import tyro

from lmeff.cli import COMMANDS, Command
from lmeff.config import Stage
from lmeff.config.files import load_experiment
from lmeff.config.loads import absent
from lmeff.config.overrides import resolve
from lmeff.interop.config_json import config_of
from lmeff.interop.families import FAMILIES
from lmeff.models.config import PRESETS
from lmeff.plan.phases import TEACHING
from lmeff.plan.predict import predict
from lmeff.plan.sizing import BESIROGLU
from lmeff.plan.state import state_bytes
from lmeff.plan.verify import verify
from tests.gallery import FILES, ROOT, asked, commands, docstring, plans
from tests.runs import lmeff_json
from tests.tpu.programs import needs_libtpu

SHOWN = [plan for file in FILES for plan in plans(file)]
SLICES = {"v5litepod-4": "v5e:2x2", "v5litepod-16": "v5e:4x4", "v6e-1": "v6e:1x1", "v6e-16": "v6e:4x4", "v5p-64": "v5p:2x4x4"}  # fmt: skip
NAMED = {**SLICES, "v5p-128": "v5p:4x4x4", "v5p-1024": "v5p:8x8x8"}  # of several shapes: --topology says which
LLAMA = {"llama3_8b", "llama3_8b_continued", "llama3_8b_qat", "llama3_8b_to_4b", "llama3_8b_from_70b"}
ERROR = 0.15  # of what the planner says of a TPU's memory (experiments/planner_vs_compiler)
MARGIN = 1 - ERROR
MISSES = {("llama_1b", "v5p:2x4x4"): 0.16}  # too much: its ffn never holds all arrays of the table at once
SECONDS = 5

# What config.json of meta-llama/Meta-Llama-3-8B and -70B says on Hugging Face.
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
SIZES = {
    "llama3_8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "llama3_70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(ROOT)


def name(plan):
    return f"{plan.file.stem} {shlex.split(plan.line)[4]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_is_one(file):
    shown = commands(file)
    assert any(line.split()[1] in ("run", "train") or line.startswith("tpu_scripts/launch.sh ") for line in shown)
    for line in shown:
        if line.startswith("lmeff "):
            words = shlex.split(line)[1:]
            command, overrides = tyro.cli(Command, args=words, return_unknown_args=True)
            assert isinstance(command, COMMANDS[words[0]][0])
            assert command.config == file.relative_to(ROOT)
            resolve(command.config, overrides, prog=line)
        if line.startswith("lmeff plan ") and "--topology" not in line:
            assert lmeff_json(*shlex.split(line)[1:])["fits"]


@pytest.mark.parametrize("plan", SHOWN, ids=name)
def test_what_is_launched_is_what_is_planned(plan):
    words = shlex.split(plan.line)
    assert words[:5:2] == ["lmeff", str(plan.file.relative_to(ROOT)), words[4]]
    topology, settings = words[4], words[5:]
    launched = re.fullmatch(
        r"tpu_scripts/launch\.sh --type (?P<type>[\w-]+)(?: --topology (?P<topology>\S+))? --runs /mnt/runs (?P<config>\S+)(?: -- (?P<settings>.*))?",
        plan.launch or "",
    )
    assert launched is not None, plan.launch
    assert NAMED[launched["type"]] == topology
    assert launched["topology"] == (None if topology in ("v5e:4x4", "v6e:4x4", "v5p:2x4x4") else topology)
    assert launched["config"] == words[2]
    assert (launched["settings"] or "").split() == settings
    assert all(re.fullmatch(r"[\w.=,:/@%+^-]+", word) for word in settings), "launch.sh takes no others"


@pytest.mark.parametrize("plan", SHOWN, ids=name)
def test_it_plans_quickly_and_fits_as_it_says(plan):
    began = time.process_time()
    answer = lmeff_json(*shlex.split(plan.line)[1:], "--no-compile")
    assert time.process_time() - began < SECONDS
    stages = answer.get("stages", [answer])
    assert len(plan.numbers) == len(stages)
    for stage, says in zip(stages, plan.numbers, strict=True):
        assert stage["fits"]
        assert stage["bytes_per_device"]["total"] < MARGIN * stage["capacity"]
        assert says["stage"] == (stage["stage"] if len(stages) > 1 else None)
        check(stage, says)


def check(stage, says):
    """What is shown is what the plan says, as far as its digits go."""
    said = {key: None if value is None else float(value.replace(",", "")) for key, value in says.items() if key not in ("stage", "prefix")}  # fmt: skip
    scale, seconds, use = {"k": 1e3, "M": 1e6}[says["prefix"]], stage["step_seconds"], stage["utilization"]
    rates = {key: stage["tokens_per_step"] / seconds[time] for key, time in (("low", "high"), ("high", "low"))}
    assert stage["bytes_per_device"]["total"] / 2**30 == pytest.approx(said["needs"], rel=0.006)
    assert stage["capacity"] / 2**30 == pytest.approx(said["has"], rel=0.006)
    assert stage["tokens_per_second"] / scale == pytest.approx(said["speed"], rel=0.006)
    assert {key: rate / scale for key, rate in rates.items()} == pytest.approx(
        {key: said[key] for key in rates}, rel=0.006
    )
    assert 100 * use["mfu_causal"] == pytest.approx(said["mfu"], abs=0.51)
    assert (said["hfu"] is not None) == stage["job"]["teacher"]
    assert 100 * use["hfu"] == pytest.approx(said["hfu"] or 100 * use["hfu"], abs=0.51)
    hours = 24 * (said["days"] or 0) + (said["hours"] or 0) + (said["minutes"] or 0) / 60
    assert stage["job"]["steps"] * seconds["middle"] / 3600 == pytest.approx(hours, abs=0.51 if said["days"] else 0.01)
    assert stage["energy"]["chip_hours"] == pytest.approx(said["chip_hours"], rel=0.001, abs=0.51)


def test_llama_3_8b_is_there_in_every_recipe_on_every_slice():
    found = {(plan.file.stem, shlex.split(plan.line)[4]) for plan in SHOWN}
    assert {(recipe, topology) for recipe in LLAMA for topology in ("v5e:4x4", "v6e:4x4", "v5p:2x4x4")} <= found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_loaded_model_is_planned_from_the_shape_that_was_published(file):
    experiment = load_experiment(file)
    loaded = [stage for stage in experiment.recipe if stage.load is not None]
    assert list(absent(experiment, ROOT / "nowhere").values()) == loaded, "the gallery holds no weights"
    for stage in loaded:
        assert stage.model == published(stage)


def published(stage: Stage):
    """The shape that lmeff reads from the config.json of the model that a stage loads."""
    (preset,) = [key for key in SIZES if str(stage.load) == f"models/{key.replace('_', '-')}"]
    cfg = config_of(FAMILIES["llama"], {**PUBLISHED, **SIZES[preset]}, "config.json")
    assert dataclasses.replace(cfg, context=None) == PRESETS[preset]
    return cfg


@pytest.mark.parametrize("file", [f for f in FILES if "nats/token for so many" in docstring(f)], ids=lambda f: f.stem)
def test_the_loss_to_expect_is_the_law_s(file):
    _, (job,) = asked(plans(file)[0].line)
    says = re.search(r"gives (\d\.\d\d) nats/token", docstring(file))
    answer = lmeff_json(*shlex.split(plans(file)[0].line)[1:], "--no-compile")
    assert BESIROGLU.loss(answer["parameters"], job.rows * job.tokens * job.steps) == pytest.approx(
        float(says[1]), abs=0.006
    )


def test_the_table_has_every_plan_with_its_numbers():
    lines = [line for line in (ROOT / "configs/README.md").read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert {row[0] for row in rows} == {file.name for file in FILES}
    told = sorted((name, command, memory, time) for name, _, command, memory, time in rows if command.startswith("--"))
    assert told == sorted((plan.file.name, options(plan), memory(plan), length(plan)) for plan in SHOWN)


def options(plan):
    """What follows the file in a plan's command."""
    return plan.line.partition(".py ")[2]


def memory(plan):
    """Of the fullest stage."""
    return f"{max(float(n['needs']) for n in plan.numbers):.3g} of {plan.numbers[0]['has']} GiB"


def length(plan):
    """The time of all stages."""
    hours = sum(
        24 * float(n["days"] or 0) + float(n["hours"] or 0) + float(n["minutes"] or 0) / 60 for n in plan.numbers
    )
    return f"{hours / 24:.2g} d" if hours >= 48 else f"{hours:.2g} h"


def apart(peak):
    """Bytes that the plan adds, as XLA does at full depth. Of four layers it may run the teacher first, when the student keeps nothing yet."""
    made = peak.temporaries
    return min(made["kept activations"], made[TEACHING]) if TEACHING in made else 0


# What stands for the others, at a minute or two each: every slice of Llama-3-8B, a plain step, one with a packed teacher, and one that is pruned, taught
# and quantized at once.
ALWAYS = {
    ("llama3_8b_continued", "v5p:2x4x4", 0),
    ("llama3_8b_from_70b", "v5e:4x4", 0),
    ("llama3_8b_to_4b", "v6e:4x4", 1),
}


def compiled():
    """Every stage that trains, of every plan."""
    for plan in SHOWN:
        for position in range(len(plan.numbers)):
            case = (plan.file.stem, shlex.split(plan.line)[4], position)
            marks = () if case in ALWAYS else (pytest.mark.gallery,)
            yield pytest.param(plan, position, id=f"{name(plan)} {position}", marks=marks)


@pytest.mark.tpu_aot
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("plan", "position"), list(compiled()))
def test_it_compiles_at_four_layers_and_fits_at_full_depth(plan, position):
    where, found = asked(plan.line)
    whole, part = (predict(job, where.chip, where.topology) for job in (found[position], found[position].shallow(4)))
    with jax.default_matmul_precision("default"):  # a kernel of bfloat16 products cannot have the highest
        made = verify(part.job, where.name, part.peak)
    assert made.arguments == pytest.approx(state_bytes(part.job), rel=0.001)
    live = next(row for row in made.rows if row.name == "live at the peak")
    assert live.predicted > (1 - ERROR) * live.compiled, live
    over = MISSES.get((plan.file.stem, where.name), ERROR)
    assert live.predicted - apart(part.peak) < (1 + over) * live.compiled, live
    assert whole.peak.total + max(live.compiled - live.predicted, 0) < whole.capacity
