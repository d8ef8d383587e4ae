"""The same of what is composed with a layout: rows over devices, experts, teachers, compressed sums, and workers that train apart.

Those that other tests compile anyway are compared there (`tests/parallel/test_context_step.py`, `tests/layouts/test_experts.py`).
"""

import dataclasses
from typing import NamedTuple

import pytest

from lmeff.parallel.compressed import Reduce, make_reducer
from lmeff.parallel.workload import Local
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.step import begin
from tests.layouts.traffic import compared, step_of
from tests.layouts.trial import Mesh, compile_step, make_inputs, make_runtime

INT8, POWER = Reduce(block=32), Reduce(method="powersgd", rank=2)
PIPE = {"pipe": 2, "accumulate": 4}


class Case(NamedTuple):
    """A trial's mesh and feature, how gradients are compressed, and who trains apart."""

    mesh: Mesh
    feature: str = "plain"
    reduce: Reduce | None = None
    local: Local | None = None


CASES = {
    "ring-fsdp2-context4-dots": Case(Mesh(fsdp=2, context=4, remat="dots")),
    "ring-zero1-context2": Case(Mesh(fsdp=2, context=2, tensor=2, zero=1)),
    "gather-teacher-dots": Case(Mesh(data=2, fsdp=2, context=2, sequence="gather", remat="dots"), "teacher"),
    "gather-context8-accumulated": Case(Mesh(context=8, accumulate=2, sequence="gather")),
    "gather-pipe2-residuals": Case(Mesh(**PIPE, context=2, tensor=2, sequence="gather", stash="residuals")),
    "gather-pipe2-full": Case(Mesh(**PIPE, data=2, context=2, sequence="gather", remat="full", model="four")),
    "ulysses-pipe2-full": Case(Mesh(**PIPE, data=2, context=2, sequence="ulysses", remat="full", model="four")),
    "dropless-full": Case(Mesh(expert=2, fsdp=2, tensor=2, model="experts", remat="full")),
    "dropless-data2-fsdp2": Case(Mesh(data=2, fsdp=2, expert=2, model="experts")),
    "dropless-zero2": Case(Mesh(data=2, fsdp=2, expert=2, zero=2, model="experts")),
    "dropless-context2-accumulated": Case(Mesh(expert=2, context=2, tensor=2, accumulate=2, model="experts")),
    "dropless-pipe2-tensor2": Case(Mesh(**PIPE, expert=2, tensor=2, model="experts")),
    "capacity-names": Case(Mesh(expert=4, tensor=2, model="capacity", remat="names")),
    "capacity-fsdp2-accumulated": Case(Mesh(expert=2, fsdp=2, tensor=2, accumulate=2, model="capacity")),
    "capacity-context2-tensor2": Case(Mesh(expert=2, context=2, tensor=2, model="capacity")),
    "teacher-fsdp8": Case(Mesh(fsdp=8), "teacher"),
    "teacher-tensor8": Case(Mesh(tensor=8, model="tied"), "teacher"),
    "teacher-data2-fsdp2-tensor2": Case(Mesh(data=2, fsdp=2, tensor=2), "teacher"),
    "teacher-pipe2-tensor2": Case(Mesh(**PIPE, data=2, tensor=2), "teacher"),
    "teacher-pipe2-residuals": Case(Mesh(**PIPE, data=2, tensor=2, stash="residuals"), "teacher"),
    "int8-data8": Case(Mesh(data=8), reduce=INT8),
    "int8-pipe2-fsdp2": Case(Mesh(**PIPE, data=2, fsdp=2), reduce=INT8),
    "powersgd-data2-fsdp2-tensor2": Case(Mesh(data=2, fsdp=2, tensor=2), reduce=POWER),
    "powersgd-fsdp2-expert2": Case(Mesh(data=2, expert=2, fsdp=2, model="experts"), reduce=POWER),
    "apart-data4-fsdp2": Case(Mesh(data=4, fsdp=2), local=Local("data", 4)),
    "apart-zero1": Case(Mesh(data=2, fsdp=4, zero=1), local=Local("data", 4)),
    "apart-fragments": Case(Mesh(data=2, fsdp=2, tensor=2, accumulate=2), local=Local("data", 4, 2)),
    "apart-teacher": Case(Mesh(data=2, fsdp=2, tensor=2), "teacher", local=Local("data", 4)),
    "apart-int8": Case(Mesh(dcn=2, data=2, fsdp=2), reduce=Reduce(block=64), local=Local("dcn", 4, 2)),
}


def text(mesh, feature, reduce, local):
    """The compiled step."""
    rt = make_runtime(mesh, feature)
    workers = None if local is None else LocalUpdates(**local._asdict())
    rt = dataclasses.replace(rt, reducer=make_reducer(reduce, rt.specs), local=workers, steps=100)
    state, batch, frozen = make_inputs(rt, mesh)
    return compile_step(rt, begin(rt, state), batch, frozen).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compositions_move_what_the_formula_says_to_the_byte(name):
    mesh, feature, reduce, local = CASES[name]
    found = text(mesh, feature, reduce, local)
    for stage in range(mesh.pipe):
        got, want = compared(found, step_of(mesh, feature, stage=stage, reduce=reduce, local=local))
        assert got == pytest.approx(want), stage
