"""A whole train step on rows that are cut over devices is that of one device, in every form and with everything composed."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.layouts.trial import Mesh, relative, run

STEPS = {
    # feature, mesh
    "ring-context8": ("all", Mesh(context=8)),
    "ring-context4-tensor2-remat": ("plain", Mesh(context=4, tensor=2, remat="full", model="tied")),
    "ring-data2-context2-tensor2-accumulated": ("teacher", Mesh(data=2, context=2, tensor=2, accumulate=2)),
    "ring-fsdp2-context4-names": ("weights", Mesh(fsdp=2, context=4, remat="names")),
    "gather-context8": ("plain", Mesh(context=8, sequence="gather")),
    "gather-fsdp2-context4-accumulated": ("mask", Mesh(fsdp=2, context=4, accumulate=2, sequence="gather")),
    "gather-context4-tensor2": ("all", Mesh(context=4, tensor=2, sequence="gather")),
    "ulysses-context8-remat": ("plain", Mesh(context=8, sequence="ulysses", remat="full")),
    "ulysses-data2-context2-tensor2": ("all", Mesh(data=2, context=2, tensor=2, sequence="ulysses", model="tied")),
    "ulysses-fsdp2-context4-accumulated": ("plain", Mesh(fsdp=2, context=4, accumulate=2, sequence="ulysses")),
}
FAST = {
    "ring-context8",
    "ring-data2-context2-tensor2-accumulated",
    "gather-fsdp2-context4-accumulated",
    "ulysses-data2-context2-tensor2",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in STEPS]
)
def test_equals_one_device(name):
    feature, mesh = STEPS[name]
    got, want = run(mesh, feature), run(Mesh(model=mesh.model), feature)
    for key, value in want.metrics[0].items():
        if key in ("loss", "objective", "kl"):
            assert abs(got.metrics[0][key] / value - 1) <= 1e-6, key
    for path, gradient in want.gradients.items():
        assert np.abs(gradient).max() > 0, path
        assert relative(got.gradients[path], gradient) <= 1e-5, path
    for path, value in want.final.items():
        assert np.abs(got.final[path] - value).max() <= 1e-5, path
