"""A model is the same however it is opened; what is no model, or does not fit, is refused in one paragraph."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmeff.compress.config import MATRICES
from lmeff.core.batch import Batch
from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import QTensor, dequantize, parse_format, quantize
from lmeff.core.precision import Policy
from lmeff.core.tree import flatten
from lmeff.interop.model_folder import read_header
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.rows import place_batch
from lmeff.recipe.open import open_model
from lmeff.recipe.sources import load_numbers
from lmeff.train.evaluate import make_eval_step
from lmeff.train.runtime import Model
from tests.recipe.pretrained_model import CFG, write_huggingface
from tests.runs import lmeff, lmeff_json


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A Hugging Face folder and the model folder that was imported from it."""
    folder = tmp_path_factory.mktemp("models")
    write_huggingface(folder / "hf")
    lmeff_json("import", folder / "hf", folder / "imported")
    return folder


def nats(served, seed=0):
    """Of 8 random rows, [8, 32]."""
    tokens = np.random.default_rng(seed).integers(0, served.cfg.vocab, (8, 33)).astype(np.int32)
    ones = np.ones((8, 32), np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, np.ones((8, 32), np.float32))
    step = make_eval_step(Model(served.cfg, served.numerics), served.layout, served.policy)
    return np.asarray(step(served.params, (), served.ranges, place_batch(batch, served.layout)))


def test_imported_and_opened_where_it_lies_are_the_same(places):
    there, imported = open_model(places / "hf"), open_model(places / "imported")
    assert there.served.cfg == imported.served.cfg == CFG
    for path, x in flatten(there.served.params).items():
        np.testing.assert_array_equal(x, flatten(imported.served.params)[path], err_msg=path)
    np.testing.assert_array_equal(nats(there.served), nats(imported.served))
    text = "the small model, naïve"
    assert there.tokenizer.encode(text).tolist() == imported.tokenizer.encode(text).tolist()
    assert there.tokenizer.stops == imported.tokenizer.stops == (1, 2)
    assert (there.family, dict(there.keep)) == (imported.family, dict(imported.keep)) == ("llama", {"eos_token_id": 1})
    header = read_header(places / "imported")
    assert header.origin == str(places / "hf")
    assert set(header.files) == {
        "artifact/0/SHA256SUMS",
        *(
            f"tokenizer/{n}"
            for n in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_ids.json")
        ),
    }


def test_exported_again_it_is_the_same_file(places, tmp_path):
    answer = lmeff_json("export", places / "imported", tmp_path / "again")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (places / "hf" / name).read_bytes(), name
    assert answer["family"] == "llama"
    assert "special_ids.json" not in answer["tokenizer_files"]


def test_a_dtype_is_rounded_to_once(places, tmp_path):
    lmeff_json("import", places / "hf", tmp_path / "narrow", "--dtype", "bfloat16")
    whole, narrow = (flatten(open_model(p).served.params) for p in (places / "imported", tmp_path / "narrow"))
    for path, x in whole.items():
        assert narrow[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(x.astype(jnp.bfloat16), narrow[path], err_msg=path)
    opened = open_model(tmp_path / "narrow")
    assert opened.served.policy == Policy(params=jnp.bfloat16, compute=jnp.float32)
    wide = open_model(tmp_path / "narrow", precision="params=float32")
    np.testing.assert_array_equal(nats(wide.served), nats(opened.served))


@pytest.mark.parametrize("mesh", [MeshPlan(tensor=2), MeshPlan(fsdp=4, tensor=2)], ids=["tensor", "fsdp and tensor"])
def test_on_every_mesh(places, mesh):
    one, many = open_model(places / "imported"), open_model(places / "imported", mesh=mesh)
    assert len(flatten(many.served.params)["blocks/mlp/up"].sharding.device_set) == 8
    np.testing.assert_allclose(nats(one.served), nats(many.served), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("format", ["int8", "int4/g16", "int8/tensor"])
def test_weights_are_quantized_on_opening(places, format):
    import re

    plain = flatten(open_model(places / "hf").served.params)
    opened = open_model(places / "hf", weights=format, mesh=MeshPlan(tensor=2))
    specs, found = flatten(param_specs(CFG)), flatten(opened.served.params)
    for path, x in found.items():
        chosen = re.fullmatch(f"{MATRICES}|head/w", path) is not None
        assert isinstance(x, QTensor) == chosen, path
        if not chosen:
            np.testing.assert_array_equal(x, plain[path])
            continue
        spec, wanted = specs[path], parse_format(format)
        axes = spec.own_axes if wanted.granularity == "tensor" else spec.axes
        expected = jax.jit(lambda w, axes=axes, wanted=wanted: quantize(w, wanted, axes))(plain[path])
        np.testing.assert_array_equal(x.q, expected.q, err_msg=path)
        np.testing.assert_array_equal(dequantize(x), dequantize(expected), err_msg=path)
    assert format in opened.source


def test_a_model_of_quantized_weights_is_near_the_plain_one(places):
    plain, rounded = open_model(places / "hf"), open_model(places / "hf", weights="int8", mesh=MeshPlan(tensor=2))
    assert 0 < np.abs(nats(rounded.served) - nats(plain.served)).mean() < 0.01


def broken_copy(places, tmp_path, name, change):
    shutil.copytree(places / "imported", tmp_path / name)
    change(tmp_path / name)
    return tmp_path / name


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "a header": (lambda p: flip(p / "model.json"), "model.json"),
    "a tokenizer": (lambda p: flip(p / "tokenizer/tokenizer.json"), "tokenizer.json"),
    "a missing file": (lambda p: (p / "tokenizer/special_ids.json").unlink(), "special_ids.json"),
    "sums": (lambda p: flip(p / "artifact/0/SHA256SUMS"), "SHA256SUMS"),
    "weights": (
        lambda p: flip(max((p / "artifact/0").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)),
        "damaged",
    ),
    "a later version": (
        lambda p: (p / "model.json").write_text(
            json.dumps({**json.loads((p / "model.json").read_text()), "version": 9})
        ),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed(places, tmp_path, name):
    change, word = DAMAGE[name]
    path = broken_copy(places, tmp_path, "copy", change)
    with pytest.raises(CheckpointError, match=word):
        open_model(path)


def test_what_cannot_be_opened_is_told(places, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model, expected"):
        open_model(tmp_path)
    with pytest.raises(ConfigError, match=r"is no run.*'teacher'"):
        open_model(places / "hf", artifact="teacher")
    with pytest.raises(ConfigError, match=r"quantization format: got 'int9'"):
        open_model(places / "hf", weights="int9")
    with pytest.raises(ConfigError, match=r"over tensor = 8"):
        open_model(places / "hf", mesh=MeshPlan(tensor=8))


def test_import_refuses_before_it_writes(places, tmp_path):
    code, _, err = lmeff("import", places / "hf", places / "imported")
    assert code == 5
    assert "exists already" in err
    write_huggingface(tmp_path / "small", cfg=CFG.__class__(**{**CFG.__dict__, "vocab": 290}))
    code, _, err = lmeff("import", tmp_path / "small", tmp_path / "out")
    assert code == 5
    assert "300 ids" in err
    assert "vocabulary of 290" in err
    code, _, err = lmeff("import", places / "hf", tmp_path / "out", "--dtype", "float23")
    assert code == 2
    assert "--dtype" in err
    code, _, err = lmeff("import", tmp_path / "nothing", tmp_path / "out")
    assert code == 5
    assert "does not exist" in err
    code, _, err = lmeff("import", places / "hf", tmp_path / "out", "--tokenizer", tmp_path / "nothing")
    assert code == 4
    assert "does not exist" in err
    code, _, err = lmeff("export", places / "hf", tmp_path / "out", "--format", "ggml")
    assert code == 3
    assert "--format" in err
    assert "hf" in err
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("format", ["int8", "int4/g16"])
def test_packed_weights_go_out_and_come_back_bit_for_bit(places, tmp_path, format):
    answer = lmeff_json(
        "export", places / "imported", tmp_path / "out", "--format", "compressed-tensors", "--weights", format
    )
    assert answer["format"] == "compressed-tensors"
    sent, back = open_model(places / "imported", weights=format), open_model(tmp_path / "out")
    for path, x in flatten(sent.served.params).items():
        y = flatten(back.served.params)[path]
        assert isinstance(y, QTensor) == isinstance(x, QTensor), path
        np.testing.assert_array_equal(*(dequantize(z) if isinstance(z, QTensor) else z for z in (x, y)), err_msg=path)
    assert back.tokenizer.stops == (1, 2)
    assert "of packed weights" in back.source
    plain = load_numbers(tmp_path / "out", back.served.layout, jnp.float32)[1]
    np.testing.assert_array_equal(
        flatten(plain)["blocks/mlp/up"], dequantize(flatten(sent.served.params)["blocks/mlp/up"])
    )
    code, _, err = lmeff("import", tmp_path / "out", tmp_path / "imported")
    assert code == 3
    assert "packed (compressed-tensors)" in err


def test_plain_weights_are_not_written_as_packed(places, tmp_path):
    code, _, err = lmeff("export", places / "hf", tmp_path / "out", "--format", "compressed-tensors")
    assert code == 3
    assert "--weights" in err
    code, _, err = lmeff("export", places / "hf", tmp_path / "out", "--pretokenizer", "gpt-2")
    assert code == 3
    assert "--pretokenizer" in err
    code, _, err = lmeff("export", places / "hf", tmp_path / "out", "--format", "gguf-q8_0", "--dtype", "bfloat16")
    assert code == 3
    assert "--dtype" in err
    assert not (tmp_path / "out").exists()


def test_a_file_for_llama_cpp(places, tmp_path):
    gguf = pytest.importorskip("gguf")
    code, _, err = lmeff("export", places / "hf", tmp_path / "m.gguf", "--format", "gguf-q8_0")
    assert code == 3
    assert "pretokenizer" in err
    answer = lmeff_json("export", places / "hf", tmp_path / "m.gguf", "--format", "gguf-f32", "--pretokenizer", "gpt-2")
    assert answer["family"] == "gguf F32"
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    up = np.asarray(flatten(open_model(places / "hf").served.params)["blocks/mlp/up"])[1]
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"].data, up.T)
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == CFG.vocab
