"""lmeff generate: text alone on stdout, what the engine writes, and bad input in one paragraph."""

import io
import json

import numpy as np
import pytest

from lmeff.data.tokenizer import continuing, prompt
from lmeff.infer.generate import generate
from lmeff.infer.sampling import GREEDY
from lmeff.models.cache import CacheFormat
from lmeff.recipe.open import open_model
from tests.recipe.pretrained_model import write_huggingface
from tests.runs import lmeff, lmeff_json

PROMPT = "the small model"
OPTIONS = ("--max-tokens", 12, "--mesh.data", 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_huggingface(tmp_path_factory.mktemp("model") / "hf", scale=0.3)


@pytest.fixture(scope="module")
def expected(model):
    """What the engine writes, called directly."""
    opened = open_model(model)
    (done,) = generate(
        opened.served,
        [prompt(opened.tokenizer, PROMPT)],
        max_tokens=12,
        sampling=GREEDY,
        cache=CacheFormat(numbers="float32"),
        stop_ids=opened.tokenizer.stops,
        decoder=continuing(opened.tokenizer),
    )
    return done


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_text_is_alone_on_stdout(model, expected, stream):
    code, out, err = lmeff("generate", model, "--prompt", PROMPT, stream, *OPTIONS)
    assert code == 0, err
    assert out == expected.text + "\n"
    assert "hf" in err
    assert f"{len(expected.ids)} tokens" in err


def test_json_has_everything(model, expected):
    found = lmeff_json("generate", model, "--prompt", PROMPT, "--logprobs", *OPTIONS)
    (one,) = found["completions"]
    assert one["prompt"] == PROMPT
    assert (one["text"], one["ids"], one["reason"]) == (expected.text, expected.ids.tolist(), expected.reason)
    np.testing.assert_allclose(one["logprobs"], expected.logprobs, atol=1e-5)


def test_prompts_of_a_file_and_of_stdin(model, expected, tmp_path, monkeypatch):
    lines = f"{PROMPT}\n\na loss\n{PROMPT}\n"
    (tmp_path / "prompts.txt").write_text(lines)
    found = lmeff_json("generate", model, "--prompts", tmp_path / "prompts.txt", *OPTIONS)["completions"]
    assert [one["prompt"] for one in found] == [PROMPT, "a loss", PROMPT]
    assert found[0]["ids"] == found[2]["ids"] == expected.ids.tolist()
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, _ = lmeff("generate", model, *OPTIONS)
    assert code == 0
    assert out == "".join(one["text"] + "\n" for one in found)


def test_text_ends_before_a_stop(model, expected):
    letter = expected.text.strip()[3]
    found = lmeff_json("generate", model, "--prompt", PROMPT, "--stop", "zzzz", "--stop", letter, *OPTIONS)
    (one,) = found["completions"]
    assert one["text"] == expected.text[: expected.text.index(letter)]
    assert one["reason"] == "stop_text"


def test_a_draft_changes_nothing_but_how_often_it_is_asked(model, expected):
    found = lmeff_json("generate", model, "--prompt", PROMPT, "--draft", model, "--guesses", 2, *OPTIONS)
    assert found["completions"][0]["ids"] == expected.ids.tolist()
    assert found["draft"]["rate"] == 1.0
    assert found["draft"]["offered"] > 0


def test_formats_of_weights_and_cache(model):
    found = lmeff_json(
        "generate", model, "--prompt", PROMPT, "--weights", "int8", "--cache", "int8", "--keys", "channel", *OPTIONS
    )
    assert "weights int8" in found["model"]
    assert len(found["completions"][0]["ids"]) > 0


BAD = {
    "two sources of prompts": (["--prompt", "a", "--prompts", "b"], 2, ["--prompt and --prompts"]),
    "prompts that are not there": (["--prompts", "/no/prompts"], 4, ["--prompts", "/no/prompts", "every line"]),
    "no tokens": (["--prompt", "a", "--max-tokens", "0"], 2, ["--max-tokens", "got 0"]),
    "no rows": (["--prompt", "a", "--batch", "0"], 2, ["--batch", "got 0"]),
    "no guesses": (["--prompt", "a", "--guesses", "0"], 2, ["--guesses", "got 0"]),
    "temperature": (["--prompt", "a", "--temperature", "-1"], 3, ["temperature", "-1"]),
    "top k": (["--prompt", "a", "--top-k", "0"], 3, ["top_k", "got 0"]),
    "top p": (["--prompt", "a", "--top-p", "1.5"], 3, ["top_p", "1.5"]),
    "min p": (["--prompt", "a", "--min-p", "-1"], 3, ["min_p", "-1"]),
    "an empty stop": (["--prompt", "a", "--stop", ""], 2, ["--stop", "empty"]),
    "cache": (["--prompt", "a", "--cache", "int9"], 3, ["cache", "int9", "int8"]),
    "keys alone": (["--prompt", "a", "--keys", "channel"], 2, ["--keys", "--cache"]),
    "keys": (["--prompt", "a", "--cache", "int8", "--keys", "head"], 3, ["keys", "'head'", "channel"]),
    "weights": (["--prompt", "a", "--weights", "int99"], 3, ["quantization format", "int99"]),
    "precision": (["--prompt", "a", "--precision", "compute=float65"], 3, ["precision.compute", "float65"]),
    "mesh": (["--prompt", "a", "--mesh.tensor", "3"], 3, ["mesh", "8 devices"]),
    "a mesh that cuts layers": (["--prompt", "a", "--mesh.pipe", "2"], 3, ["mesh.pipe", "inference"]),
    "a mesh that does not divide": (["--prompt", "a", "--mesh.tensor", "8"], 3, ["over tensor = 8"]),
    "longer than the model": (["--prompt", "a", "--max-tokens", "100"], 3, ["64", "max_tokens"]),
    "artifact of no run": (["--prompt", "a", "--artifact", "x"], 3, ["no run", "'x'"]),
    "a draft that is not there": (["--prompt", "a", "--draft", "/no/draft"], 5, ["/no/draft", "holds no model"]),
    "unknown option": (["--prompt", "a", "--temprature", "1"], 2, ["--temprature"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, model):
    options, code, words = BAD[name]
    got, out, err = lmeff("generate", model, *options)
    assert got == code, err
    assert all(word in err for word in words), err
    assert out == ""
    assert "Traceback" not in err


def test_no_prompt_at_all(model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    code, out, err = lmeff("generate", model)
    assert (code, out) == (4, "")
    assert "stdin holds none" in err


def test_a_model_without_a_tokenizer(model, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((model / file).read_bytes())
    code, out, err = lmeff("generate", tmp_path, "--prompt", "a", "--json")
    assert code == 2
    assert "has no tokenizer" in json.loads(out)["error"]
    assert "--tokenizer" in err
