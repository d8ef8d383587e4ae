"""Wrong input: each case one clear paragraph, the right exit code, nothing written."""

import dataclasses
import json

import pytest

from lmeff.config.files import load_experiment
from lmeff.config.validate import validate
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.schedule_csv import to_csv
from lmeff.parallel.schedules import build
from tests.runs import lmeff, lmeff_json, write_config, write_text

# What each case changes of the command `lmeff run CONFIG`: options to add; the exit code; words that the message must have.
OPTIONS = {
    "mesh product": (["--mesh.data", "3"], 3, ["mesh", "3", "8 devices"]),
    "degree below one": (["--mesh.fsdp", "0"], 3, ["mesh.fsdp", "got 0", "at least 1"]),
    "heads do not divide": (["--mesh.tensor", "8"], 3, ["over tensor = 8", "evenly"]),
    "form of context parallelism": (["--mesh.sequence", "rings"], 3, ["mesh.sequence", "'rings'", "ring", "ulysses"]),
    "ring in a pipeline": (["--mesh.context", "2", "--mesh.pipe", "2"], 3, ["mesh.sequence", "'ring'", "'gather'"]),
    "sequence over context": (
        ["--mesh.context", "8", "--data.sequence", "40"],
        3,
        ["data.sequence", "40 tokens", "2 x mesh.context = 16", "32 or 48"],
    ),
    "heads over context": (
        ["--mesh.context", "8", "--mesh.sequence", "ulysses"],
        3,
        ["4 query heads", "mesh.tensor x mesh.context = 1 x 8", "'gather'"],
    ),
    "batch does not divide": (["--train.batch", "12"], 3, ["train.batch", "got 12", "multiple"]),
    "batch over all axes of rows": (
        ["--mesh.dcn", "2", "--mesh.expert", "2", "--train.batch", "12", "--train.accumulate", "2"],
        3,
        ["train.batch", "mesh.dcn x mesh.data x mesh.expert x train.accumulate = 2 x 2 x 2 x 2"],
    ),
    "evaluation batch over all axes of rows": (
        ["--mesh.expert", "4", "--evaluate.batch", "12"],
        3,
        ["evaluate.batch", "mesh.data x mesh.expert = 2 x 4"],
    ),
    "pipeline schedule": (["--mesh.schedule", "1f2b"], 3, ["mesh.schedule", "'1f2b'", "1f1b", ".csv"]),
    "microbatches of a schedule": (
        ["--mesh.pipe", "2", "--mesh.schedule", "interleaved"],
        3,
        ["mesh.schedule", "microbatches = 1", "multiple of stages = 2", "train.accumulate"],
    ),
    "chunks of a schedule": (
        ["--mesh.pipe", "2", "--mesh.chunks", "3"],
        3,
        ["mesh.schedule", "chunks = 3", "expected 1"],
    ),
    "chunks without a pipeline": (["--mesh.chunks", "2"], 3, ["mesh.chunks", "got 2", "mesh.pipe"]),
    "stash": (["--mesh.pipe", "2", "--mesh.stash", "inputs"], 3, ["mesh.stash", "'inputs'", "residuals"]),
    "table that is not there": (
        ["--mesh.pipe", "2", "--mesh.schedule", "/no/table.csv"],
        3,
        ["mesh.schedule", "cannot read", "/no/table.csv"],
    ),
    "fewer layers than slices": (
        ["--mesh.pipe", "2"],
        3,
        ["'student'", "1 layers", "mesh.pipe x chunks = 2 x 1", "2 slices"],
    ),
    "accumulation does not divide": (["--train.accumulate", "3"], 3, ["train.batch", "accumulate"]),
    "evaluation batch": (["--evaluate.batch", "3"], 3, ["evaluate.batch", "got 3"]),
    "vocabulary too small": (["--model.vocab", "100"], 3, ["vocabulary of 100", "264", "model.vocab"]),
    "heads and kv heads": (["--model.kv-heads", "3"], 3, ["model.kv_heads", "got 3", "divisor"]),
    "unknown activation": (["--model.activation", "relu"], 3, ["model.activation", "'relu'", "swiglu"]),
    "unknown optimizer": (["--optim.name", "adamv"], 3, ["optim.name", "'adamv'", "adamw"]),
    "unknown schedule": (["--optim.schedule", "cosin"], 3, ["optim.schedule", "'cosin'", "cosine"]),
    "learning rate": (["--optim.learning-rate", "-1"], 3, ["optim.learning_rate", "positive"]),
    "precision": (["--precision", "compute=bfloat61"], 3, ["precision.compute", "bfloat61", "bfloat16"]),
    "remat": (["--train.remat", "fulll"], 3, ["train.remat", "'fulll'", "full"]),
    "name that is no folder": (["--name", "a/b"], 3, ["name", "'a/b'", "folder"]),
    "sparsity": (["--recipe.composed.compress.0.sparsity", "1.5"], 3, ["sparsity", "1.5", "[0, 1)"]),
    "pattern": (["--recipe.composed.compress.0.pattern", "2-4"], 3, ["pattern", "'2-4'", "N:M"]),
    "schedule beyond the stage": (["--recipe.composed.compress.0.end", "50"], 3, ["end", "50", "3 steps"]),
    "quantization method": (["--recipe.composed.compress.1.method", "lqs"], 3, ["method", "'lqs'", "lsq"]),
    "rule that matches nothing": (
        ["--recipe.composed.compress.1.rules", "blocks/mpl/.*", "int8", ".*", "None"],
        3,
        ["blocks/mpl/.*", "matches nothing", "blocks/mlp"],
    ),
    "unknown format": (["--recipe.composed.compress.1.rules", ".*", "int9"], 3, ["int9", "int8"]),
    "rules that leave a path": (["--recipe.composed.compress.1.rules", "embed/table", "int8"], 3, ["no rule matches"]),
    "unknown site": (
        ["--recipe.composed.activations.rules", "mlp.dwon", "int8", ".*", "None"],
        3,
        ["mlp.dwon", "mlp.down"],
    ),
    "shrinks to more": (["--recipe.shrunk.shrink.ffn", "500"], 3, ["shrink.ffn", "500", "64"]),
    "distillation mix": (["--recipe.student.distill.mix", "2"], 3, ["distill.mix", "got 2", "0"]),
    "teacher that comes later": (["--recipe.student.distill.teacher", "packed"], 3, ["'packed'", "earlier stage"]),
    "negative steps": (["--recipe.student.steps", "-1"], 3, ["student", "-1", "0"]),
    "sequence": (["--data.sequence", "1"], 3, ["data.sequence", "got 1"]),
    "unknown source": (["--data.source", "texts"], 3, ["source", "'texts'", "text"]),
    "path that is not there": (["--data.path", "/nowhere/at/all.txt"], 4, ["/nowhere/at/all.txt"]),
    "too little text": (["--data.max-bytes", "500"], 4, ["too little text", "max_bytes"]),
    "a tokenizer that is none": (["--data.tokenizer", "words"], 3, ["data.tokenizer", "'words'", "bpe"]),
    "a tokenizer that is not there": (
        ["--data.tokenizer", "/no/tokenizer.json"],
        3,
        ["data.tokenizer", "/no/tok", "does not exist"],
    ),
    "start and load": (["--recipe.packed.load", "/no/model"], 3, ["'packed'", "both start and load"]),
    "a model that is not there": (
        ["--recipe.teacher.load", "/no/model"],
        3,
        ["'teacher'.load", "/no/model", "holds no model"],
    ),
    "unknown option": (["--mesh.tensr", "2"], 2, ["--mesh.tensor"]),
    "not a number": (["--train.steps", "many"], 2, ["--train.steps", "many"]),
}

# Recipes that are wrong as a whole.
RECIPES = {
    "no such start": ('Stage(name="a", start="b"),', ["'b'", "earlier stage"]),
    "a name twice": ('Stage(name="a"), Stage(name="a"),', ["'a'", "twice"]),
    "a model of which the shape alone is there": (
        'Stage(name="a", load="/no/model", model=MODEL),',
        ["'a'.load", "/no/model", "holds no model"],
    ),
    "shape of a start": ('Stage(name="a"), Stage(name="b", start="a", model=MODEL),', ["both start and model"]),
    "training integers": (
        'Stage(name="a", compress=(Quantize(),), export=True), Stage(name="b", start="a", steps=2),',
        ["packed integers", "'a'"],
    ),
    "vocabularies differ": (
        'Stage(name="a"), Stage(name="b", model=ModelConfig(vocab=272, width=32, layers=1, heads=2, kv_heads=2, ffn=32), distill=Distill(teacher="a")),',
        ["vocabulary of 264", "272"],
    ),
    "distilling without steps": (
        'Stage(name="a"), Stage(name="b", start="a", distill=Distill(teacher="a"), steps=0),',
        ["0 steps"],
    ),
    "quantization first": ('Stage(name="a", compress=(Quantize(), Prune(sparsity=0.5))),', ["last"]),
    "pattern that does not fit": (
        'Stage(name="a", compress=(Prune(pattern="3:7"),)),',
        ["3:7", "multiple of 7"],
    ),
    "ranges of random weights": (
        'Stage(name="a", activations=Activations(rules=(("attn.o", "int8/tensor"), (".*", None)))),',
        ["attn.o", "random weights"],
    ),
    "a norm in a rule": ('Stage(name="a", compress=(Quantize(rules=((".*", "int8"),)),)),', ["norm"]),
}

# Config files that give no experiment.
FILES = {
    "syntax": ("def experiment(:\n", ["SyntaxError", "line 1"]),
    "no function": ("x = 1\n", ["experiment()"]),
    "another type": ("def experiment():\n    return {}\n", ["dict", "Experiment"]),
    "an error inside": ("def experiment():\n    return 1 / 0\n", ["ZeroDivisionError", "line 2"]),
    "unknown field": (
        "from lmeff.config import Experiment\ndef experiment():\n    return Experiment(name='a', lr=1)\n",
        ["lr"],
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus"))


def one_paragraph(err):
    told = [line for line in err.splitlines() if line.startswith("lmeff: ")]
    assert len(told) == 1, err
    assert "Traceback" not in err
    return told[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, text, tmp_path):
    options, code, words = OPTIONS[name]
    config = write_config(tmp_path, text)
    before = sorted(tmp_path.rglob("*"))
    got, out, err = lmeff("run", config, *options)
    assert got == code, err
    message = err if code == 2 else one_paragraph(err)
    assert all(word in message for word in words), message
    assert out == ""
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "__pycache__" not in path.parts]
    assert [path for path in left if path.is_file()] == []


def test_a_table_has_its_own_numbers(text, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(to_csv(build("1f1b", 4, 8)))
    config = write_config(tmp_path, text, recipe='Stage(name="a", model=ModelConfig(vocab=264, layers=4)),', claims="")
    mesh = ("--mesh.schedule", table, "--mesh.pipe", 4, "--train.batch", 16)
    code, _, err = lmeff("run", config, *mesh, "--train.accumulate", 4)
    assert code == 3
    assert all(word in one_paragraph(err) for word in ("microbatches = 8", "microbatches = 4", "train.accumulate")), err
    code, _, err = lmeff("run", config, *mesh, "--train.accumulate", 8, "--mesh.chunks", 2)
    assert code == 3
    assert all(word in one_paragraph(err) for word in ("chunks = 1", "chunks = 2", "mesh.chunks")), err
    assert not (tmp_path / "runs").exists()
    experiment = load_experiment(config)
    train = dataclasses.replace(experiment.train, batch=16, accumulate=8)
    fits = dataclasses.replace(experiment, mesh=MeshPlan(schedule=str(table), pipe=4), train=train)
    assert validate(fits, 8)["a"].layers == 4


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, text, tmp_path):
    recipe, words = RECIPES[name]
    code, _, err = lmeff("run", write_config(tmp_path, text, recipe=recipe, claims=""))
    assert code == 3, err
    assert all(word in one_paragraph(err) for word in words), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    content, words = FILES[name]
    file = tmp_path / "bad.py"
    file.write_text(content)
    code, _, err = lmeff("run", file)
    assert code == 3, err
    assert all(word in one_paragraph(err) for word in words), err


def test_claim_of_nothing(text, tmp_path):
    config = write_config(tmp_path, text, claims='Claim(artifact="quantized", of="teacher")')
    code, _, err = lmeff("run", config)
    assert code == 3
    assert "'quantized'" in one_paragraph(err)


def test_places_that_hold_nothing(tmp_path):
    for command, words in {"eval": "holds no run", "report": "report"}.items():
        code, _, err = lmeff(command, tmp_path)
        assert code == 5, (command, err)
        assert words in one_paragraph(err)
    code, _, err = lmeff("run", tmp_path / "absent.py")
    assert code == 3
    assert "absent.py" in one_paragraph(err)


def test_commands(text, tmp_path):
    config = write_config(tmp_path, text)
    assert lmeff("ruin", config)[0] == 2
    assert lmeff()[0] == 2
    assert lmeff("run", config, "--devices", "0")[0] == 2
    code, _, err = lmeff("train", config)
    assert code == 2
    assert "--stage" in one_paragraph(err)
    code, _, err = lmeff("train", config, "--stage", "teecher")
    assert code == 3
    assert "'teecher'" in one_paragraph(err)
    code, _, err = lmeff("doctor", "--fix")
    assert code == 2
    assert "--fix" in err


def test_damaged_lines_are_named(tmp_path):
    lines = [json.dumps({"text": "a line of text " * 20}) for _ in range(40)]
    lines[17] = '{"text": '
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    code, _, err = lmeff("run", write_config(tmp_path, file))
    assert code == 4, err
    assert "18" in one_paragraph(err)
    assert not (tmp_path / "runs").exists()


def test_errors_are_json_too(text, tmp_path):
    code, out, _ = lmeff("run", write_config(tmp_path, text), "--mesh.data", "3", "--json")
    assert code == 3
    assert json.loads(out)["exit_code"] == 3
    assert "mesh" in json.loads(out)["error"]


def test_an_absent_extra_is_named(text, tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def without(name, *rest):
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    code, _, err = lmeff("run", write_config(tmp_path, text))
    assert code == 3
    assert "pip install 'lmeff[report]'" in one_paragraph(err)
    assert not (tmp_path / "runs").exists()


def test_config_show_tells_origins(text, tmp_path):
    config = write_config(tmp_path, text)
    shown = lmeff_json("config", "show", config, "--optim.learning-rate", "0.5", "--recipe.student.steps", "1")
    origins = shown["origins"]
    assert origins["optim.learning_rate"] == "command line"
    assert origins["recipe.student.steps"] == "command line"
    assert origins["train.batch"] == str(config)
    assert origins["optim.b1"] == "default"
    assert shown["config"]["optim"]["learning_rate"] == 0.5


def test_config_show_tells_where_parameters_lie(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lmeff.commands.show.simulate_devices", lambda count: None
    )  # this process has its eight already
    config = write_config(tmp_path, text)
    shown = lmeff_json("config", "show", config, "--devices", "8", "--mesh.fsdp", "8", "--train.batch", "8")
    rows = {row["path"]: row for row in shown["leaves"]["teacher"]}
    assert rows["embed/table"]["partition"] == "-,fsdp"
    assert rows["embed/table"]["bytes"] * 8 == 4 * 264 * 32
    assert rows["embed/table"]["copies"] == 1
