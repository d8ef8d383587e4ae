"""The reader of compiled programs, on texts whose every number is known."""

import math

import pytest

from lmeff.core.errors import ConfigError
from lmeff.parallel.collective import axes_of, bits, sent, volumes
from lmeff.parallel.hlo import collectives
from lmeff.parallel.replica_groups import device_groups

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

# Two loops in each other around a combined all-reduce, a called computation, a conditional with a collective in each branch, and the entry's own.
NESTED = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %all-reduce.1 = (f32[4,8], /*index=1*/bf16[16]{0:T(8,128)}, f32[]) all-reduce(%x, %y, %z), replica_groups=[4,2]<=[8], metadata={op_name="jit(step)/psum"}
}

%inner_condition (p: (s32[], f32[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%called (p: f32[4]) -> f32[8] {
  ROOT %all-gather.1 = f32[8]{0} all-gather(%p), channel_id=2, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
}

%outer_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %kernel.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 256
}}, metadata={op_name="jit(step)/a kernel whose text has lines of its own"}
  %while.1 = (s32[], f32[4,8]{1,0}) while(%init), condition=%inner_condition, body=%inner_body
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%called
}

%outer_condition (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%no (p: f32[6]) -> f32[6] {
  ROOT %permute.1 = f32[6]{0} collective-permute(%p), channel_id=3, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
}

%yes (p: f32[6]) -> f32[6] {
  ROOT %all-to-all.1 = (f32[3]{0}, f32[3]{0}) all-to-all(%a, %b), channel_id=4, replica_groups=mesh['x'=4,'y'=2] {'x':(2)2}
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %while.2 = (s32[], f32[4,8]{1,0}) while(%init), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %conditional.1 = f32[6]{0} conditional(%choice, %p, %p), true_computation=%yes, false_computation=%no, metadata={op_name="jit(step)/cond"}
  ROOT %reduce-scatter.1 = f32[2,8]{1,0} reduce-scatter(%p), channel_id=5, replica_groups={}, dimensions={0}, to_apply=%add
}
"""

# What a TPU's compiler writes: results in halves, a reduce-scatter as a fusion, one gather in three steps of which the middle one is in a loop.
TPU = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%all-reduce-scatter.3 (x: f32[16,64], y: f32[8,64]) -> (f32[2,64], f32[1,64]) {
  %all-reduce.9 = (f32[16,64]{1,0:T(8,128)}, f32[8,64]{1,0:T(8,128)}) all-reduce(%x, %y), replica_groups={{0,1,2,3,4,5,6,7}}
}

%step.1 (x: bf16[2,64]) -> bf16[16,64] {
  ROOT %all-gather.1 = bf16[16,64]{1,0:T(8)} all-gather(%x), channel_id=9, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="2"}, metadata={op_name="g"}
}

%step.2 (x: bf16[2,64]) -> bf16[16,64] {
  ROOT %all-gather.2 = bf16[16,64]{1,0:T(8)} all-gather(%x), channel_id=9, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="2"}, metadata={op_name="g"}
}

%body (p: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %fusion.4 = bf16[16,64]{1,0} fusion(%p), kind=kCustom, calls=%step.2
}

%condition (p: (s32[], bf16[16,64])) -> pred[] {
  %four = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %four), direction=LT
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %fusion.1 = (f32[2,64]{1,0:T(8,128)S(1)}, f32[1,64]{1,0:T(8,128)}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.3, metadata={op_name="f/reduce"}
  %fusion.2 = bf16[16,64]{1,0} fusion(%p), kind=kCustom, calls=%step.1
  %while.1 = (s32[], bf16[16,64]) while(%init), condition=%condition, body=%body
  %permute-start = (f32[64,4]{1,0:T(8,128)}, f32[64,4]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %permute-done = f32[64,4]{1,0:T(8,128)S(1)} collective-permute-done(%permute-start)
  %gather-start = ((f32[1,4]{1,0}, s8[2]{0}), (f32[8,4]{1,0}, s8[16]{0}), u32[]) all-gather-start(%p, %q), channel_id=3, replica_groups=[1,8]<=[8]
  ROOT %gather-done = (f32[8,4]{1,0}, s8[16]{0}) all-gather-done(%gather-start)
}
"""


def by_name(text, taken=None):
    return {c.name: c for c in collectives(text, taken)}


def test_loops_calls_and_branches():
    found = by_name(NESTED)
    times = {name: (c.times, c.loop, c.branches) for name, c in found.items()}
    assert times == {
        "all-reduce.1": (15, True, ()),
        "all-gather.1": (5, True, ()),
        "permute.1": (1, False, (("conditional.1", 0),)),
        "all-to-all.1": (1, False, (("conditional.1", 1),)),
        "reduce-scatter.1": (1, False, ()),
    }
    assert found["all-reduce.1"].origin == "jit(step)/psum"
    assert found["all-gather.1"].inside == "called"


def test_branches_run_as_often_as_the_caller_says():
    seen = []

    def taken(conditional):
        seen.append((conditional.name, conditional.times, conditional.count, conditional.origin))
        return 0.25, 0.75

    found = by_name(NESTED, taken)
    assert seen == [("conditional.1", 1, 2, "jit(step)/cond")]
    assert (found["permute.1"].times, found["all-to-all.1"].times) == (0.25, 0.75)


def test_sizes_and_what_a_ring_sends():
    found = by_name(NESTED)
    combined = found["all-reduce.1"]
    assert combined.shapes == ((4, 8), (16,), ())
    assert (combined.bytes, combined.elements, combined.largest, combined.size) == (128 + 32 + 4, 49, 32, 2)
    assert combined.arrays().shapes == ((4, 8), (16,))
    assert {name: sent(c) for name, c in found.items()} == {
        "all-reduce.1": 164,  # 2 x 1/2
        "all-gather.1": 16,  # 1/2
        "permute.1": 24,
        "all-to-all.1": 12,  # 1/2
        "reduce-scatter.1": 64 * 7,
    }


def test_axes():
    found = by_name(NESTED)
    assert {name: axes_of(c, MESH) for name, c in found.items()} == {
        "all-reduce.1": ("tensor",),
        "all-gather.1": ("fsdp",),
        "permute.1": ("data",),
        "all-to-all.1": ("fsdp",),
        "reduce-scatter.1": ("data", "fsdp", "tensor"),
    }


def test_volumes_add_up_by_kind_and_axes_without_scalars():
    assert volumes(collectives(NESTED), MESH) == {
        ("all-reduce", ("tensor",)): 15 * 160,
        ("all-gather", ("fsdp",)): 5 * 16,
        ("collective-permute", ("data",)): 24,
        ("all-to-all", ("fsdp",)): 12,
        ("reduce-scatter", ("data", "fsdp", "tensor")): 64 * 7,
    }


def test_text_of_a_tpu():
    found = by_name(TPU)
    assert found.keys() == {"all-reduce.9", "all-gather.1", "permute-start", "gather-start"}
    scattered = found["all-reduce.9"]
    assert (scattered.kind, scattered.shapes, scattered.origin) == ("reduce-scatter", ((2, 64), (1, 64)), "f/reduce")
    assert sent(scattered) == 4 * 64 * 3 * 7
    assert found["all-gather.1"].times == 1, "of a gather in steps, the first one counts, and not the one in the loop"
    assert sent(found["all-gather.1"]) == 16 * 64 * 2 * 7 / 8
    assert found["permute-start"].shapes == ((64, 4),)
    assert found["gather-start"].shapes == ((8, 4), (16,))
    assert found["gather-start"].bytes == 8 * 4 * 4 + 16


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_groups(text, groups):
    assert device_groups(f"%x = f32[2] all-reduce(%y), {text}, to_apply=%add", 4) == frozenset(map(frozenset, groups))


def test_a_loop_that_does_not_tell_is_refused_only_where_it_is_counted():
    text = NESTED.replace("%bound = s32[]{:T(128)} constant(3)", "%bound = s32[] get-tuple-element(%p), index=2")
    assert math.isnan(by_name(text)["all-reduce.1"].times)
    with pytest.raises(ConfigError, match=r"all-reduce\.1 is in a loop.*expected a known_trip_count"):
        volumes(collectives(text), MESH)


def test_what_is_no_program_is_refused():
    with pytest.raises(ConfigError, match=r"no ENTRY computation, expected the text of a compiled program"):
        collectives("module @jit_step {}")


def test_bits():
    assert [bits(d) for d in ("f32", "bf16", "f8e4m3fn", "s4", "u2", "pred", "f64", "c64")] == [
        32,
        16,
        8,
        4,
        2,
        8,
        64,
        64,
    ]
