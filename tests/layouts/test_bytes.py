"""Formulas of the bytes that a step moves are what the compiled step moves, by kind of collective and mesh axes.

XLA for the CPU leaves an all-reduce and a slice where XLA for TPUs makes a reduce-scatter: hence `scatters=False`.
"""

import functools

import pytest

from tests.layouts.test_pipeline import ROWS as PIPELINE_ROWS
from tests.layouts.test_pipeline import program
from tests.layouts.traffic import compared, step_of
from tests.layouts.trial import ROWS, Mesh, compile_step, make_inputs, make_runtime, run

REGIONS = {
    "data4-fsdp2": Mesh(data=4, fsdp=2, accumulate=2, remat="names"),
    "data2-fsdp2-tensor2": Mesh(data=2, fsdp=2, tensor=2, accumulate=4, model="tied"),
    "zero1-fsdp4-tensor2": Mesh(fsdp=4, tensor=2, zero=1, accumulate=2, model="tied"),
    "pipe4": Mesh(pipe=4, accumulate=8, stash="residuals", model="four"),
    "interleaved-pipe2-tensor2": Mesh(
        pipe=2, tensor=2, accumulate=4, schedule="interleaved", chunks=2, stash="residuals", remat="full", model="four"
    ),
    "pipe2-fsdp2-tensor2": Mesh(pipe=2, fsdp=2, tensor=2, accumulate=4, model="four"),
}
AUTOMATIC = {
    "data8": Mesh(data=8),
    "fsdp8": Mesh(fsdp=8),
    "tensor8": Mesh(tensor=8, model="tied"),
    "zero1-data2-fsdp4": Mesh(data=2, fsdp=4, zero=1),
    "zero2-fsdp8": Mesh(fsdp=8, zero=2),
    "data2-fsdp2-tensor2": Mesh(data=2, fsdp=2, tensor=2),
    "fsdp2-tensor4-full": Mesh(fsdp=2, tensor=4, remat="full"),
}
# Families: norms on both sides, one RMS over heads that are apart, a table of positions, biases. All to the byte.
VARIANTS = {
    "gemma-full": Mesh(data=2, fsdp=2, tensor=2, model="gemma", remat="full"),
    "olmo": Mesh(data=2, tensor=4, model="olmo"),
    "olmo-dots": Mesh(data=2, tensor=4, model="olmo", remat="dots"),
    "olmo-full": Mesh(fsdp=2, tensor=4, model="olmo", remat="full"),
    "olmo-context": Mesh(context=4, fsdp=2, model="olmo"),
    "gpt": Mesh(data=4, tensor=2, model="gpt"),
    "gpt-fsdp": Mesh(fsdp=8, model="gpt"),
    "gpt-fsdp-full": Mesh(fsdp=8, model="gpt", remat="full"),
    "gpt-context": Mesh(data=2, context=2, tensor=2, model="gpt"),
    "gpt-context-region": Mesh(data=2, context=2, tensor=2, accumulate=2, model="gpt"),
    "gpt-pipe": Mesh(pipe=2, fsdp=2, tensor=2, accumulate=2, model="gpt"),
}
SHARED = {"data8", "fsdp8", "tensor8", "data4-fsdp2"}  # the tests of equality compile them anyway
FAST = {"gpt"}
SLOW = (VARIANTS.keys() - FAST) | {"data2-fsdp2-tensor2", "zero1-fsdp4-tensor2", "zero1-data2-fsdp4"}


@functools.cache
def text(mesh, shared):
    """The compiled step."""
    if mesh.pipe == 4:
        return program(mesh.schedule, mesh.accumulate, mesh.stash)[0]
    if shared:
        return run(mesh, "plain").text
    rt = make_runtime(mesh, "plain")
    return compile_step(rt, *make_inputs(rt, mesh)).as_text()


def both(name, mesh, stage=0):
    rows = PIPELINE_ROWS * mesh.accumulate if mesh.pipe == 4 else ROWS
    return compared(text(mesh, name in SHARED), step_of(mesh, stage=stage, rows=rows))


def cases(meshes):
    return [
        pytest.param(name, mesh, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, mesh in meshes.items()
    ]


@pytest.mark.parametrize(("name", "mesh"), cases(REGIONS))
def test_regions_move_what_the_formula_says_to_the_byte(name, mesh):
    for stage in range(mesh.pipe):
        got, want = both(name, mesh, stage)
        assert got == want, stage


@pytest.mark.parametrize(("name", "mesh"), cases(VARIANTS))
def test_families_move_what_the_formula_says_to_the_byte(name, mesh):
    for stage in range(mesh.pipe):
        got, want = both(name, mesh, stage)
        assert got == want, stage


@pytest.mark.parametrize(("name", "mesh"), cases(AUTOMATIC))
def test_what_xla_places_is_within_two_percent(name, mesh):
    got, want = both(name, mesh)
    assert got.keys() == want.keys()
    for key, moved in got.items():
        assert moved == pytest.approx(want[key], rel=0.02), key
