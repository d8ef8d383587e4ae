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
from lmeff.parallel.mesh import AXES
from lmeff.parallel.seam import layout_ops
from tests.layouts.trial import SHARP, UNOPTIMIZED, Mesh, assert_equals_one_device, make_inputs, make_runtime, run

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
# What is trained on which mesh, every feature composed with every kind of parallelism. The first of each group run in `make test`.
CASES = {
    "rows and matrices": [
        ("plain", MESHES[0]),
        ("plain", MESHES[1]),
        ("plain", MESHES[2]),
        ("all", MESHES[9]),
        ("weights", MESHES[3]),
        ("teacher", MESHES[4]),
        ("mask", MESHES[5]),
        ("mask", MESHES[6]),
        ("all", MESHES[7]),
        ("weights", MESHES[8]),
        ("plain", MESHES[10]),
        ("teacher", MESHES[11]),
        ("plain", MESHES[12]),
        ("all", MESHES[13]),
        ("plain", MESHES[15]),
    ],
    "ZeRO": [
        ("plain", Mesh(fsdp=8, zero=0)),
        ("all", Mesh(fsdp=4, tensor=2, zero=1, accumulate=2)),
        ("plain", Mesh(fsdp=8, zero=1, model="tied")),
        ("mask", Mesh(data=2, fsdp=4, zero=2, remat="full")),
        ("weights", Mesh(data=2, fsdp=2, tensor=2, zero=2, accumulate=2)),
    ],
    "slices": [
        ("plain", Mesh(dcn=2, data=2, tensor=2, accumulate=2, remat="names")),
        ("teacher", Mesh(dcn=2, fsdp=4)),
        ("weights", Mesh(dcn=2, fsdp=2, pipe=2, accumulate=2)),
        ("plain", Mesh(dcn=2, expert=2, tensor=2, model="moe")),
        ("mask", Mesh(dcn=2, fsdp=2, context=2, accumulate=2)),
    ],
    "pipeline": [
        ("all", Mesh(pipe=2, fsdp=2, tensor=2, accumulate=4, schedule="zb-h1")),
        ("plain", Mesh(pipe=4, data=2, accumulate=8, schedule="interleaved", chunks=2, model="deep", remat="full")),
        ("plain", Mesh(pipe=4, tensor=2, accumulate=4, model="uneven", stash="residuals")),
        ("mask", Mesh(pipe=2, accumulate=4, schedule="gpipe", model="uneven", data=4)),
        ("weights", Mesh(pipe=2, tensor=4, accumulate=2, schedule="1f1b", model="tied", remat="dots")),
        ("plain", Mesh(pipe=2, fsdp=4, accumulate=4, schedule="zbv", model="deep", zero=1)),
        ("teacher", Mesh(pipe=2, data=2, fsdp=2, accumulate=4, schedule="zb-h2", stash="residuals", zero=2)),
        ("plain", Mesh(pipe=2, data=2, tensor=2, accumulate=4, schedule="circular", chunks=2, model="four")),
        ("plain", Mesh(pipe=8, accumulate=8, schedule="zb-h1", model="deep")),
        ("teacher", Mesh(pipe=2, context=2, tensor=2, accumulate=2, sequence="gather")),
    ],
    "long sequences": [
        ("all", Mesh(fsdp=2, context=4, sequence="ring")),
        ("plain", Mesh(context=8, remat="full")),
        ("weights", Mesh(context=4, tensor=2, sequence="ulysses", model="tied")),
        ("plain", Mesh(data=2, context=2, tensor=2, sequence="gather", accumulate=2)),
        ("plain", Mesh(pipe=2, context=2, data=2, sequence="ulysses", accumulate=4)),
        ("plain", Mesh(expert=2, context=2, data=2, model="moe")),
    ],
    "experts": [
        ("plain", Mesh(expert=4, tensor=2, model="moe", remat="full")),
        ("all", Mesh(expert=2, fsdp=2, tensor=2, model="moe")),
        ("mask", Mesh(expert=4, data=2, model="moe", accumulate=2)),
        ("all", Mesh(pipe=2, expert=2, fsdp=2, model="moe", accumulate=2, schedule="zbv")),
        ("plain", Mesh(pipe=2, expert=2, tensor=2, model="moe", accumulate=2, stash="residuals")),
        ("weights", Mesh(expert=2, context=2, tensor=2, model="moe", sequence="ulysses", accumulate=2)),
    ],
    "variants": [
        ("plain", Mesh(data=2, tensor=2, model="gemma", remat="names")),
        ("plain", Mesh(fsdp=4, model="gpt")),
        ("plain", Mesh(fsdp=2, tensor=4, model="olmo")),
        ("plain", Mesh(pipe=2, tensor=2, accumulate=2, schedule="zb-h1", model="gemma", remat="full")),
        (
            "plain",
            Mesh(pipe=2, data=2, accumulate=4, schedule="interleaved", chunks=2, model="gemma", stash="residuals"),
        ),
        ("teacher", Mesh(pipe=2, context=2, fsdp=2, accumulate=2, sequence="gather", model="olmo")),
        ("plain", Mesh(context=4, fsdp=2, sequence="ring", model="olmo", remat="dots")),
        ("plain", Mesh(context=2, tensor=2, sequence="ulysses", model="gemma", accumulate=2)),
        ("plain", Mesh(pipe=2, fsdp=2, tensor=2, accumulate=2, model="gpt")),
        ("plain", Mesh(context=2, tensor=2, data=2, model="gpt")),
        ("plain", Mesh(context=4, fsdp=2, model="phi")),
        ("weights", Mesh(dcn=2, fsdp=2, tensor=2, accumulate=2, model="phi", zero=2)),
    ],
}


def name(mesh):
    parts = [f"{axis}{size}" for axis, size in mesh.degrees.items()]
    parts += [f"zero{mesh.zero}"] if mesh.zero < 3 else []
    parts += [mesh.schedule, mesh.stash] if mesh.pipe > 1 else []
    parts += [mesh.sequence] if mesh.context > 1 else []
    parts += [f"accumulate{mesh.accumulate}"] if mesh.accumulate > 1 else []
    return "-".join([*(parts or ["one"]), *([mesh.remat] if mesh.remat != "none" else []), mesh.model])


FAST = {"rows and matrices": 4, "variants": 1}


def cases():
    for group, members in CASES.items():
        for position, (feature, mesh) in enumerate(members):
            marks = () if position < FAST.get(group, 1) else pytest.mark.slow
            yield pytest.param(mesh, feature, id=f"{feature}-{name(mesh)}", marks=marks)


def test_every_axis_is_in_many_products():
    products = [mesh for members in CASES.values() for _, mesh in members if len(mesh.degrees) > 1]
    assert len(products) >= 30
    for axis in AXES:
        assert sum(axis in mesh.degrees for mesh in products) >= 5, axis


def one(mesh):
    return dataclasses.replace(Mesh(), model=mesh.model)


@pytest.mark.parametrize(("mesh", "feature"), list(cases()))
def test_equals_one_device(mesh, feature):
    assert_equals_one_device(mesh, feature)


@pytest.mark.parametrize("mesh", [pytest.param(mesh, id=name(mesh), marks=pytest.mark.slow) for mesh in MESHES[:9]])
def test_quantized_activations_give_the_same_loss(mesh):
    """A sum that differs in its last bit may round to the next code, so equality is of another kind here."""
    got, want = run(mesh, "activations"), run(one(mesh), "activations")
    assert abs(got.metrics[0]["loss"] / want.metrics[0]["loss"] - 1) <= 1e-4
    plain = run(one(mesh), "plain").metrics[0]["loss"]
    assert abs(want.metrics[0]["loss"] / plain - 1) > 1e-5, "quantization has no effect"


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
    """A sum that differs in its last bit may round to the next code, and one code that differs moves what comes after it: of all codes of both layers
    0.16% differ on the worst mesh. The first layer, which sees the same inputs, is held to 0.1% at every site.
    """
    (got, nll), (want, want_nll) = codes(mesh, sharpness), codes(one(mesh), sharpness)
    assert len(want) == 8
    alike = {site: got[site] == expected for site, expected in want.items()}
    for site, expected in want.items():
        assert len(np.unique(expected)) > 100, site
        assert site == "head" or alike[site][0].mean() >= 0.999, site
    assert np.concatenate([x.ravel() for x in alike.values()]).mean() >= 0.995
    assert abs(nll.sum() / want_nll.sum() - 1) <= 1e-4
