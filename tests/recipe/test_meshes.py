"""A whole recipe on meshes with every axis: what it measures is what one device measures."""

import numpy as np
import pytest

from tests.runs import finish, lmeff_json, start, write_config, write_text

RECIPE = """
            Stage(name="teacher", model=ModelConfig(vocab=264, width=32, layers=4, heads=4, kv_heads=2, ffn=64, tied=False)),
            Stage(
                name="composed",
                start="teacher",
                compress=(Prune(sparsity=0.5, end=2), Quantize(method="lsq", rules=(("blocks/.*(w.|up|gate|down)", "int8"), (".*", None)))),
                distill=Distill(teacher="teacher"),
                steps=3,
            ),
            Stage(name="packed", start="composed", steps=0, export=True),
            Stage(
                name="shrunk",
                start="teacher",
                shrink=ShrinkConfig(ffn=32, layers=3, calibration_batches=1),
                distill=Distill(teacher="packed"),
                steps=2,
            ),
            Stage(
                name="integers",
                start="shrunk",
                compress=(Quantize(),),
                activations=Activations(rules=(("mlp.down", "int8/tensor"), (".*", "int8")), batches=1),
                steps=0,
                export=True,
            ),
"""
MESHES = {
    "pipe-fsdp-tensor": "--mesh.pipe 2 --mesh.fsdp 2 --mesh.tensor 2 --train.accumulate 2",
    "context-pipe-data": "--mesh.context 2 --mesh.sequence gather --mesh.pipe 2 --mesh.schedule zb-h1 --train.accumulate 2",
    "expert-dcn-data": "--mesh.expert 2 --mesh.dcn 2",
}
# Adam divides by the size of each gradient: with a larger eps, one that is small beside its rounding is no step in a random direction.
OPTIONS = ("--optim.eps", "1e-5", "--optim.learning-rate", "1e-3")
ROUNDED = {"integers"}  # activations: a sum that differs in its last bit may round to the next code


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The config, and the report of a process with one device."""
    folder = tmp_path_factory.mktemp("meshes")
    config = write_config(folder, write_text(folder), recipe=RECIPE, claims="")
    return config, finish(start(config, "one", *OPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_losses_are_those_of_one_device(name, one_device):
    config, want = one_device
    got = lmeff_json("run", config, "--name", name, *OPTIONS, *MESHES[name].split())
    assert [row["name"] for row in got["artifacts"]] == ["teacher", "composed", "packed", "shrunk", "integers"]
    for row, expected in zip(got["artifacts"], want["artifacts"], strict=True):
        allowed = 1e-4 if row["name"] in ROUNDED else 1e-5
        assert abs(row["loss"] / expected["loss"] - 1) <= allowed, row["name"]
        np.testing.assert_allclose(row["curve"], expected["curve"], rtol=1e-5, err_msg=row["name"])
        for key in ("parameters", "nonzero_parameters", "stored_bytes", "flops_per_token"):
            assert row[key] == expected[key], (row["name"], key)
    again = lmeff_json("eval", config.parent / "runs" / name)
    assert [row["loss"] for row in again["artifacts"]] == [row["loss"] for row in got["artifacts"]]
