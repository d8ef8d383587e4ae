"""Every layout, with everything composed on it, is one device: losses, gradients, states and five optimizer steps."""

import dataclasses

import numpy as np
import pytest

from tests.layouts.trial import Mesh, relative, run

MESHES = [
    Mesh(data=8),
    Mesh(fsdp=8),
    Mesh(tensor=8, model="tied"),
    Mesh(data=2, fsdp=4),
    Mesh(data=4, tensor=2, remat="dots"),
    Mesh(data=2, tensor=4, accumulate=2),
    Mesh(fsdp=4, tensor=2, model="tied"),
    Mesh(fsdp=2, tensor=4, remat="full"),
    Mesh(data=2, fsdp=2, tensor=2),
    Mesh(data=2, fsdp=2, tensor=2, accumulate=2, remat="full", model="tied"),
    Mesh(data=4, fsdp=2, accumulate=2, remat="names"),
    Mesh(fsdp=4, tensor=2, accumulate=2, remat="names"),
    Mesh(fsdp=8, accumulate=2, remat="dots", model="tied"),
    Mesh(data=2, fsdp=2, tensor=2, accumulate=4, model="tied"),
    Mesh(data=8, accumulate=2),
    Mesh(data=1, accumulate=4, remat="full"),
]
EXACT = ["plain", "weights", "mask", "teacher", "all"]
FAST = {
    ("plain", MESHES[0]),
    ("plain", MESHES[1]),
    ("plain", MESHES[2]),
    ("plain", MESHES[10]),
    ("weights", MESHES[8]),
    ("mask", MESHES[6]),
    ("teacher", MESHES[5]),
    ("all", MESHES[9]),
    ("all", MESHES[7]),
}


def name(mesh):
    parts = [f"{axis}{size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh.degrees, strict=True) if size > 1]
    parts += [f"accumulate{mesh.accumulate}"] if mesh.accumulate > 1 else []
    return "-".join([*(parts or ["one"]), *([mesh.remat] if mesh.remat != "none" else []), mesh.model])


def cases(features, fast):
    for feature in features:
        for mesh in MESHES:
            marks = () if (feature, mesh) in fast else (pytest.mark.slow,)
            yield pytest.param(mesh, feature, id=f"{feature}-{name(mesh)}", marks=marks)


def one(mesh):
    return dataclasses.replace(Mesh(), model=mesh.model)


@pytest.mark.parametrize(("mesh", "feature"), cases(EXACT, FAST))
def test_equals_one_device(mesh, feature):
    got, want = run(mesh, feature), run(one(mesh), feature)
    for key in ("loss", "objective", *(["kl"] if feature in ("teacher", "all") else [])):
        assert abs(got.metrics[0][key] / want.metrics[0][key] - 1) <= 1e-6, key
    assert got.gradients.keys() == want.gradients.keys()
    for path, gradient in want.gradients.items():
        assert np.abs(gradient).max() > 0, path
        assert relative(got.gradients[path], gradient) <= 1e-5, path
    for path, value in want.auxiliary.items():
        assert (got.auxiliary[path] == value).all(), path
    for path, value in want.final.items():
        assert relative(got.final[path], value) <= 1e-5, path
    assert want.metrics[-1]["objective"] < want.metrics[0]["objective"]
