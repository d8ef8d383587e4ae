"""lmeff bench: numbers of a preset and of a model, as a table and as JSON; bad input in one paragraph."""

import jax
import pytest

from lmeff.bench.stream import make_stream
from lmeff.commands.bench import Bench, model_of
from lmeff.models.config import PRESETS
from tests.recipe.pretrained_model import write_huggingface
from tests.runs import lmeff, lmeff_json

SIZES = ("--context", 8, "--tokens", 2, "--turns", 2, "--batch", 8)


def test_a_model(tmp_path, monkeypatch):
    small = lambda device, size: make_stream(device, 1 << 20)  # noqa: E731 -- what it says of this machine is not looked at
    monkeypatch.setattr("lmeff.bench.measure.make_stream", small)
    model = write_huggingface(tmp_path / "hf")
    found = lmeff_json("bench", "decode", model, "--formats", "f32", "int8", *SIZES)
    assert [run["name"] for run in found["runs"]] == ["f32", "int8"]
    assert found["runs"][0]["ratio"] == 1
    assert found["runs"][1]["stored"] < found["runs"][0]["stored"]
    assert str(model) in found["model"]


@pytest.mark.slow
def test_a_preset_has_random_weights():
    served, source = model_of(Bench(kind="decode", model="tiny", precision="params=bfloat16"))
    assert served.cfg == PRESETS["tiny"]
    assert {x.dtype.name for x in jax.tree.leaves(served.params)} == {"bfloat16"}
    assert source == "tiny, random weights"


BAD = {
    "another kind": (["encode", "tiny"], 2, ["encode"]),
    "no model": (["decode", "tinny"], 5, ["tinny", "holds no model"]),
    "a format": (["decode", "tiny", "--formats", "int99"], 3, ["int99"]),
    "no rows": (["decode", "tiny", "--batch", "0"], 2, ["batch", "got 0"]),
    "no turns": (["decode", "tiny", "--turns", "0"], 2, ["turns", "got 0"]),
    "precision": (["decode", "tiny", "--precision", "compute=f65"], 3, ["f65"]),
    "unknown option": (["decode", "tiny", "--rows", "1"], 2, ["--rows"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, code, words = BAD[name]
    got, out, err = lmeff("bench", *options)
    assert got == code, err
    assert all(word in err for word in words), err
    assert out == ""
    assert "Traceback" not in err
