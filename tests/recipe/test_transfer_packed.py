"""Packed models out and in again: what `lmeff export` writes as compressed-tensors, `open_model` opens as it was."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.core.numerics import is_qtensor, materialize, parse_format
from lmeff.core.ops import Numerics
from lmeff.core.tree import flatten
from lmeff.infer.served import Served
from lmeff.models.transformer import sites
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.recipe.open import open_model
from lmeff.recipe.sources import load_numbers
from lmeff.recipe.transfer import export_model
from tests.recipe.pretrained_model import CFG, write_huggingface

ONE = MeshPlan(data=1)
UNTIED = dataclasses.replace(CFG, tied=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_huggingface(tmp_path_factory.mktemp("dense") / "model", cfg=UNTIED)


def opened(path, **options):
    return open_model(path, mesh=ONE, devices=jax.devices()[:1], **options)


def assert_same(got: Served, want: Served):
    assert jax.tree.structure(got.params) == jax.tree.structure(want.params)
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32))


@pytest.mark.parametrize("weights", ["int4/g8", "int8", "fp8", "int4-affine/g8"])
def test_what_is_exported_packed_opens_as_it_was(weights, dense, tmp_path):
    answer = export_model(dense, tmp_path / "packed", format="compressed-tensors", weights=weights)
    assert (answer["format"], answer["family"]) == ("compressed-tensors", "llama")
    assert "tokenizer.json" in answer["tokenizer_files"]
    back, want = opened(tmp_path / "packed"), opened(dense, weights=weights)
    assert_same(back.served, want.served)
    assert back.served.cfg == want.served.cfg
    assert back.tokenizer is not None
    assert want.tokenizer is not None
    np.testing.assert_array_equal(back.tokenizer.encode("the loss"), want.tokenizer.encode("the loss"))
    assert is_qtensor(flatten(back.served.params)["head/w"])


def test_formats_of_inputs_are_opened_too(dense, tmp_path):
    export_model(dense, tmp_path / "packed", format="compressed-tensors", weights="int8")
    file = tmp_path / "packed" / "config.json"
    told = json.loads(file.read_text())
    (group,) = told["quantization_config"]["config_groups"].values()
    group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    file.write_text(json.dumps(told))
    found = opened(tmp_path / "packed").served.numerics
    assert found == Numerics(tuple((site, parse_format("int8")) for site in sorted(sites(UNTIED))))


def test_packed_weights_are_trained_from_as_numbers_and_not_packed_again(dense, tmp_path):
    export_model(dense, tmp_path / "packed", format="compressed-tensors", weights="int8")
    with pytest.raises(ConfigError, match="packed already"):
        opened(tmp_path / "packed", weights="int4")
    want = jax.jit(materialize)(opened(dense, weights="int8").served.params)
    _, found = load_numbers(tmp_path / "packed", make_layout(ONE, jax.devices()[:1]), np.float32)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_without_packed_weights_is_refused(dense, tmp_path):
    with pytest.raises(ConfigError, match="holds no packed weights, expected some"):
        export_model(dense, tmp_path / "packed", format="compressed-tensors")
    with pytest.raises(ConfigError, match="--pretokenizer"):
        export_model(dense, tmp_path / "packed", format="compressed-tensors", weights="int8", pretokenizer="qwen2")
    assert not (tmp_path / "packed").exists()


def test_a_damaged_folder_is_told_by_its_tensor(dense, tmp_path):
    export_model(dense, tmp_path / "packed", format="compressed-tensors", weights="int8")
    file = tmp_path / "packed" / "config.json"
    told = json.loads(file.read_text())
    (group,) = told["quantization_config"]["config_groups"].values()
    group["weights"] |= {"strategy": "group", "group_size": 16}
    file.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"\.weight_scale: got \[\d+, 1\], expected \[\d+, \d\]"):
        opened(tmp_path / "packed")
