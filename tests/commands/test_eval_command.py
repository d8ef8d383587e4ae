"""lmeff eval on any model: what the rooms below give, told as JSON and in lines; bad input in one paragraph."""

import json

import numpy as np
import pytest

from lmeff.evals.perplexity import perplexity
from lmeff.evals.score import make_scorer
from lmeff.evals.tasks import read_items, run_task
from lmeff.recipe.open import open_model
from tests.recipe.pretrained_model import write_huggingface
from tests.runs import lmeff, lmeff_json

TEXT = "the loss of a small model falls when it reads more text than before\n" * 6
ITEMS = [
    {"query": "the small", "choices": ["model", "loss of text"], "gold": 0},
    {"query": "when it reads", "choices": ["before", "more"], "gold": 1},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_huggingface(folder / "hf", scale=0.2)
    write_huggingface(folder / "other", scale=0.2, seed=1)
    (folder / "text.txt").write_text(TEXT)
    (folder / "tasks.jsonl").write_text("\n".join(json.dumps(item) for item in ITEMS))
    return folder


def test_it_tells_what_the_rooms_below_give(place):
    found = lmeff_json(
        "eval", place / "hf", "--tasks", place / "tasks.jsonl", "--perplexity", place / "text.txt", "--window", 32, "--stride", 8,
        "--baseline", place / "other",
    )  # fmt: skip
    (one,) = found["models"]
    scorers = {name: make_scorer(open_model(place / name).served) for name in ("hf", "other")}
    tokenizer = open_model(place / "hf").tokenizer
    texts = {name: perplexity(scorer, tokenizer, [TEXT], window=32, stride=8) for name, scorer in scorers.items()}
    told = one["perplexity"][str(place / "text.txt")]
    assert told["nats_per_token"] == pytest.approx(texts["hf"].nats_per_token, abs=1e-5)
    assert (told["window"], told["stride"]) == (32, 8)
    gap = texts["hf"].nats_per_token - texts["other"].nats_per_token
    assert told["against_baseline"][0] == pytest.approx(gap, abs=1e-5)
    tasks = run_task(scorers["hf"], tokenizer, read_items(place / "tasks.jsonl")).summary()
    assert one["tasks"][str(place / "tasks.jsonl")]["acc"] == tasks["acc"]
    assert "acc_norm" in one["tasks"][str(place / "tasks.jsonl")]["against_baseline"]
    base = found["baseline"]["perplexity"][str(place / "text.txt")]["nats_per_token"]
    assert base == pytest.approx(texts["other"].nats_per_token, abs=1e-5)


def test_lines_and_meshes_and_formats(place):
    options = ("--perplexity", place / "text.txt", "--window", 32, "--weights", "int4/g16", "--mesh.tensor", 2)
    code, out, err = lmeff("eval", place / "hf", *options)
    assert code == 0, err
    assert "weights int4/g16" in out
    assert "nats/token" in out
    assert np.isfinite(float(out.split("text.txt: ")[1].split(" ")[0]))


BAD = {
    "nothing to measure": (["hf"], 2, ["no held-out text", "--tasks", "--perplexity"]),
    "a window alone": (["hf", "--window", "8"], 2, ["--window", "without"]),
    "a baseline alone": (["hf", "--baseline", "x"], 2, ["--baseline", "without"]),
    "no window": (["hf", "--perplexity", "text.txt", "--window", "0"], 2, ["--window", "got 0"]),
    "a window beyond the model": (["hf", "--perplexity", "text.txt", "--window", "65"], 3, ["window", "65", "64"]),
    "a stride beyond the window": (
        ["hf", "--perplexity", "text.txt", "--window", "8", "--stride", "9"],
        3,
        ["stride", "9", "8"],
    ),
    "a stride of tasks": (["hf", "--tasks", "tasks.jsonl", "--stride", "9"], 2, ["--stride", "--perplexity"]),
    "text besides": (["hf", "--tasks", "tasks.jsonl", "--text", "text.txt"], 2, ["--text"]),
    "tasks that are not there": (["hf", "--tasks", "none.jsonl"], 4, ["none.jsonl"]),
    "tasks that are none": (["hf", "--tasks", "text.txt"], 4, ["line 1", "JSON"]),
    "text that is not there": (["hf", "--perplexity", "none.txt"], 4, ["none.txt"]),
    "no model": ([".", "--perplexity", "text.txt"], 5, ["holds no model"]),
    "no baseline": (["hf", "--perplexity", "text.txt", "--baseline", "none"], 5, ["none", "holds no model"]),
    "unknown option": (["hf", "--tasks", "tasks.jsonl", "--windw", "9"], 2, ["--windw"]),
    "a setting of no run": (["hf", "--tasks", "tasks.jsonl", "--train.batch", "9"], 2, ["--train.batch"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, place, monkeypatch):
    monkeypatch.chdir(place)
    options, code, words = BAD[name]
    got, out, err = lmeff("eval", *options)
    assert got == code, err
    assert all(word in err for word in words), err
    assert out == ""
    assert "Traceback" not in err
