"""Every layout, with everything composed on it, is one device: losses, gradients, states and five optimizer steps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmeff.core.numerics import quantize
from lmeff.core.ops import recording
from lmeff.distill.objectives import Projection, token_nll
from lmeff.models.transformer import forward
from lmeff.parallel.seam import layout_ops
from tests.layouts.trial import SHARP, UNOPTIMIZED, Mesh, make_inputs, make_runtime, relative, run

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


@pytest.mark.parametrize(("mesh", "feature"), list(cases(EXACT, FAST)))
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
        assert np.abs(got.final[path] - value).max() <= 1e-5, path
    assert want.metrics[-1]["objective"] < want.metrics[0]["objective"]


@pytest.mark.parametrize("mesh", [pytest.param(mesh, id=name(mesh), marks=pytest.mark.slow) for mesh in MESHES])
def test_quantized_activations_give_the_same_loss(mesh):
    """A sum that differs in its last bit may round to the next code, so equality is of another kind here."""
    got, want = run(mesh, "activations"), run(one(mesh), "activations")
    assert abs(got.metrics[0]["loss"] / want.metrics[0]["loss"] - 1) <= 1e-4
    plain = run(one(mesh), "plain").metrics[0]["loss"]
    assert abs(want.metrics[0]["loss"] / plain - 1) > 1e-4, "quantization has no effect"


@functools.cache
def codes(mesh, sharpness):
    """The integer codes of the activations entering every site, and the loss per token."""
    rt = make_runtime(mesh, "activations")
    state, batch, _ = make_inputs(rt, mesh, sharpness=sharpness)
    formats, cfg = dict(rt.student.numerics.activations), rt.student.cfg

    def measure(site, x):
        return quantize(x, formats[site], (-2, -1) if site == "attn.o" else (-1,)).q if site in formats else None

    def measured(params, view_state, batch):
        make = recording(layout_ops(rt.layout, rt.student.numerics), measure)
        out = forward(params, batch, cfg, make_ops=make, view=rt.student.view, view_state=view_state)
        head = quantize(out.hidden_BTD, formats["head"], (-1,)).q
        return {**out.records, "head": head}, token_nll(Projection(cfg, rt.student.numerics))(rt.layout, out, batch)

    compiled = jax.jit(measured).lower(state.trainable.params, state.compression, batch).compile(UNOPTIMIZED)
    return jax.tree.map(np.asarray, compiled(state.trainable.params, state.compression, batch))


@pytest.mark.parametrize("sharpness", [1.0, SHARP])
@pytest.mark.parametrize(
    "mesh", [pytest.param(m, id=name(m), marks=() if m is MESHES[7] else pytest.mark.slow) for m in MESHES[:9]]
)
def test_quantized_activations_have_the_same_codes(mesh, sharpness):
    """One code that differs moves what comes after it. With sharp weights that spreads (to a hundredth of the codes at the head of the worst mesh),
    so there only the first layer, which sees the same inputs, is held to it.
    """
    (got, nll), (want, want_nll) = codes(mesh, sharpness), codes(one(mesh), sharpness)
    assert len(want) == 8
    for site, expected in want.items():
        assert len(np.unique(expected)) > 100, site
        alike = got[site] == expected
        if sharpness == 1.0:
            assert alike.mean() >= 0.999, site
        elif site != "head":
            assert alike[0].mean() >= 0.999, site
    assert abs(nll.sum() / want_nll.sum() - 1) <= 1e-4
