"""The same of what is composed with a layout: rows over devices, experts, teachers, compressed sums, and workers that train apart.

Those that other tests compile anyway are compared there (`tests/parallel/test_context_step.py`, `tests/layouts/test_experts.py`).
"""

import dataclasses

import pytest

from lmeff.parallel.compressed import Reduce, make_reducer
from lmeff.parallel.workload import Local
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.step import begin
from tests.layouts.traffic import compared, step_of
from tests.layouts.trial import Mesh, compile_step, make_inputs, make_runtime

INT8, POWER = Reduce(block=32), Reduce(method="powersgd", rank=2)
PIPE = {"pipe": 2, "accumulate": 4}
CASES = {
    # mesh, feature, reducer, workers
    "ring-fsdp2-context4-dots": (Mesh(fsdp=2, context=4, remat="dots"), "plain", None, None),
    "gather-data2-fsdp2-context2-dots": (
        Mesh(data=2, fsdp=2, context=2, sequence="gather", remat="dots"),
        "teacher",
        None,
        None,
    ),
    "gather-context8-accumulated": (Mesh(context=8, accumulate=2, sequence="gather"), "plain", None, None),
    "gather-pipe2-context2-tensor2": (
        Mesh(**PIPE, context=2, tensor=2, sequence="gather", stash="residuals"),
        "plain",
        None,
        None,
    ),
    "gather-pipe2-context2-full": (
        Mesh(**PIPE, data=2, context=2, sequence="gather", remat="full", model="four"),
        "plain",
        None,
        None,
    ),
    "ulysses-pipe2-context2-full": (
        Mesh(**PIPE, data=2, context=2, sequence="ulysses", remat="full", model="four"),
        "plain",
        None,
        None,
    ),
    "ring-zero1-context2": (Mesh(fsdp=2, context=2, tensor=2, zero=1), "plain", None, None),
    "dropless-expert2-fsdp2-tensor2-full": (
        Mesh(expert=2, fsdp=2, tensor=2, model="experts", remat="full"),
        "plain",
        None,
        None,
    ),
    "dropless-data2-fsdp2-expert2": (Mesh(data=2, fsdp=2, expert=2, model="experts"), "plain", None, None),
    "dropless-zero2-expert2": (Mesh(data=2, fsdp=2, expert=2, zero=2, model="experts"), "plain", None, None),
    "dropless-context2-accumulated": (
        Mesh(expert=2, context=2, tensor=2, accumulate=2, model="experts"),
        "plain",
        None,
        None,
    ),
    "dropless-pipe2-expert2-tensor2": (Mesh(**PIPE, expert=2, tensor=2, model="experts"), "plain", None, None),
    "capacity-expert4-tensor2-names": (Mesh(expert=4, tensor=2, model="capacity", remat="names"), "plain", None, None),
    "capacity-fsdp2-accumulated": (
        Mesh(expert=2, fsdp=2, tensor=2, accumulate=2, model="capacity"),
        "plain",
        None,
        None,
    ),
    "capacity-context2-tensor2": (Mesh(expert=2, context=2, tensor=2, model="capacity"), "plain", None, None),
    "teacher-fsdp8": (Mesh(fsdp=8), "teacher", None, None),
    "teacher-tensor8": (Mesh(tensor=8, model="tied"), "teacher", None, None),
    "teacher-data2-fsdp2-tensor2": (Mesh(data=2, fsdp=2, tensor=2), "teacher", None, None),
    "teacher-pipe2-tensor2": (Mesh(**PIPE, data=2, tensor=2), "teacher", None, None),
    "teacher-pipe2-tensor2-residuals": (Mesh(**PIPE, data=2, tensor=2, stash="residuals"), "teacher", None, None),
    "int8-data8": (Mesh(data=8), "plain", INT8, None),
    "int8-pipe2-fsdp2": (Mesh(**PIPE, data=2, fsdp=2), "plain", INT8, None),
    "powersgd-data2-fsdp2-tensor2": (Mesh(data=2, fsdp=2, tensor=2), "plain", POWER, None),
    "powersgd-fsdp2-expert2": (Mesh(data=2, expert=2, fsdp=2, model="experts"), "plain", POWER, None),
    "apart-data4-fsdp2": (Mesh(data=4, fsdp=2), "plain", None, Local("data", 4)),
    "apart-fragments-accumulated": (
        Mesh(data=2, fsdp=2, tensor=2, accumulate=2),
        "plain",
        None,
        Local("data", 4, 2),
    ),
    "apart-data2-fsdp2-tensor2": (Mesh(data=2, fsdp=2, tensor=2), "teacher", None, Local("data", 4)),
    "apart-int8-data2-fsdp4": (Mesh(dcn=2, data=2, fsdp=2), "plain", INT8, Local("dcn", 4, 2)),
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
