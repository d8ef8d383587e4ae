"""The closed forms of what rows over devices, experts, teachers, compressed sums and workers that train apart move; nothing is compiled."""

import dataclasses

import jax.numpy as jnp
import pytest

from lmeff.core.precision import parse
from lmeff.core.specs import count
from lmeff.models.config import ModelConfig, MoE, preset
from lmeff.models.transformer import param_specs
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.members import leaves_of
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.volume import terms, volume, volume_by_loop
from lmeff.parallel.volume_term import LOOPS
from lmeff.parallel.workload import Local, Step

MODEL = ModelConfig(vocab=256, width=64, layers=8, heads=8, kv_heads=4, ffn=256, tied=False)
EXPERTS = dataclasses.replace(MODEL, ffn=32, moe=MoE(experts=16, top_k=4))
LIMITED = dataclasses.replace(EXPERTS, moe=MoE(experts=16, top_k=4, capacity=1.25))
TEACHER = dataclasses.replace(MODEL, width=128, layers=12)
MIXED = parse("compute=bfloat16")
N = 32 * 64 // 8  # tokens of a device


def step(cfg=MODEL, *, devices=8, rows=32, tokens=64, **changes):
    plan = {k: changes.pop(k) for k in list(changes) if k in MeshPlan.__dataclass_fields__}
    return Step(cfg=cfg, plan=MeshPlan(**plan), devices=devices, rows=rows, tokens=tokens, **changes)


def moved(some, row):
    """`{(kind, axes, dtype): elements times runs}` of a row of the table."""
    found = {}
    for term in terms(some)[row]:
        key = term.kind, term.axes, jnp.dtype(term.dtype).name
        found[key] = found.get(key, 0) + term.elements * term.times
    return found


@pytest.mark.parametrize(
    ("remat", "again"), [("none", 0), ("names", 0), ("save:attn_out,attn.o", 0), ("dots", 6), ("full", 6)]
)
def test_a_ring_sends_keys_twice_and_their_gradients_once(remat, again):
    """7 sends each; where attention runs again its first send is shared."""
    keys = 2 * N * MODEL.kv_heads * MODEL.head_size
    found = moved(step(context=8, remat=remat, policy=MIXED), "sequence")
    assert found["collective-permute", ("context",), "bfloat16"] == MODEL.layers * keys * (7 + 7 + again)
    assert found["collective-permute", ("context",), "float32"] == MODEL.layers * keys * 7
    assert found["all-gather", ("context",), "int32"] == 8 * N, "documents, once"


def test_a_window_of_a_few_tokens_needs_the_neighbours_keys_alone():
    near = step(dataclasses.replace(MODEL, window=5), context=8)
    found, whole = (moved(some, "sequence") for some in (near, step(context=8)))
    key = "collective-permute", ("context",), "float32"
    assert found[key] == 2 / 7 * whole[key]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gathering_keys_moves_all_of_them_twice_whatever_is_kept(remat):
    keys = 2 * 8 * N * MODEL.kv_heads * MODEL.head_size
    found = moved(step(context=8, sequence="gather", remat=remat, policy=MIXED), "sequence")
    assert found["all-gather", ("context",), "bfloat16"] == MODEL.layers * 2 * keys
    assert found["reduce-scatter", ("context",), "float32"] == MODEL.layers * keys


@pytest.mark.parametrize(("kv_heads", "sent"), [(8, 8), (4, 8), (2, 8), (1, 8)])
def test_ulysses_sends_a_key_head_to_all_who_need_it(kv_heads, sent):
    cfg = dataclasses.replace(MODEL, kv_heads=kv_heads)
    found = moved(step(cfg, context=8, sequence="ulysses"), "sequence")
    heads = N * MODEL.head_size
    once = heads * (8 + 2 * sent) + heads * 8
    assert found["all-to-all", ("context",), "float32"] == MODEL.layers * 2 * once


def test_in_a_region_every_microbatch_sums_gradients_over_context():
    outer = 2 * MODEL.vocab * MODEL.width + MODEL.width
    layers = count(param_specs(MODEL)) - outer
    automatic, region = (moved(step(data=2, context=4, accumulate=m), "inner gradients") for m in (1, 2))
    key = "all-reduce", ("context",), "float32"
    assert automatic[key] == layers + MODEL.width
    assert region[key] == 2 * (layers + MODEL.width + MODEL.vocab * MODEL.width)


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("full", 1)])
def test_without_a_capacity_tokens_go_to_all(remat, again):
    """(e - 1) n D numbers forward and each way, and the same backward."""
    found = moved(step(EXPERTS, expert=8, remat=remat, policy=MIXED), "experts")
    rows = EXPERTS.layers * 8 * N * EXPERTS.width
    assert found["all-gather", ("expert",), "bfloat16"] == (2 + again) * rows
    assert found["reduce-scatter", ("expert",), "bfloat16"] == 2 * rows
    assert found["all-gather", ("expert",), "int32"] == (1 + again) * EXPERTS.layers * 8 * N * 4
    assert not any(kind == "all-to-all" for kind, *_ in found)


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("names", 1)])
def test_a_capacity_sends_c_k_n_rows(remat, again):
    found = moved(step(LIMITED, expert=8, remat=remat, policy=MIXED), "experts")
    slots = 1.25 * 4 * N
    assert found["all-to-all", ("expert",), "bfloat16"] == LIMITED.layers * (4 + 2 * again) * slots * LIMITED.width


def test_gradients_of_experts_are_not_summed_over_their_axis():
    cfg = dataclasses.replace(EXPERTS, layers=1)
    found = moved(step(cfg, devices=16, data=2, expert=8), "gradients")
    experts = 3 * cfg.moe.experts * cfg.width * cfg.ffn
    router = cfg.width * cfg.moe.experts
    assert found["all-reduce", ("data",), "float32"] == experts / 8 + router, "a router's where it is used: whole"
    others = count(param_specs(cfg)) - experts - router
    assert found["all-reduce", ("data", "expert"), "float32"] == others


def test_a_teacher_only_runs_forward():
    """ZeRO-3: its weights once, where the student's are gathered twice; over tensor two gathers and two sums a layer."""
    weights = [moved(step(fsdp=8, teacher=teacher), "weights") for teacher in (None, MODEL)]
    outer = 2 * MODEL.vocab * MODEL.width
    one, two = (found["all-gather", ("fsdp",), "float32"] for found in weights)
    assert one == 2 * (count(param_specs(MODEL)) - outer)
    assert two == one * 3 / 2
    alone, taught = (moved(step(tensor=4, data=2, teacher=t), "layers") for t in (None, TEACHER))
    unit = TEACHER.layers * 32 // 2 * 64 * TEACHER.width
    for kind in ("all-gather", "reduce-scatter"):
        key = kind, ("tensor",), "float32"
        assert taught[key] - alone[key] == 2 * unit
    assert moved(step(data=8, teacher=TEACHER), "gradients") == moved(step(data=8), "gradients")


def test_a_teacher_rides_along_and_runs_again_on_the_last_stage():
    plain, taught = (step(pipe=4, data=2, accumulate=4, teacher=teacher) for teacher in (None, TEACHER))
    (one,), (two,) = (moved(some, "pipeline").values() for some in (plain, taught))
    assert two == one * (1 + TEACHER.width / MODEL.width)
    runs = [step(pipe=4, data=2, accumulate=4, teacher=TEACHER, stage=s).members[1].forward for s in range(4)]
    assert runs == [12, 12, 12, 24]
    kept = [
        step(pipe=4, accumulate=4, teacher=TEACHER, stage=s, stash="residuals").members[1].forward for s in range(4)
    ]
    assert kept == [12] * 4


def test_int8_sends_a_quarter_and_a_scale_a_block():
    cfg = preset("llama3_8b")
    whole, coded = (volume(step(cfg, tokens=4096, reduce=r, accumulate=2)) for r in (None, Reduce(block=256)))
    ratio = sum(coded.values()) / sum(whole.values())
    assert ratio == pytest.approx((1 + 4 / 256) / 4, rel=1e-3)


def test_powersgd_sends_two_factors_a_matrix_and_the_rest_exactly():
    found = moved(step(reduce=Reduce(method="powersgd", rank=2)), "gradients")
    d, f, h, k, layers = 64, 256, 64, 32, MODEL.layers
    sides = layers * (3 * (d + f) + 2 * (d + h) + 2 * (d + k)) + 2 * (d + MODEL.vocab)
    vectors = (2 * layers + 1) * d
    assert found == {("all-reduce", ("data",), "float32"): 2 * sides + vectors}


def test_workers_apart_say_nothing_but_a_parameter_in_so_many_steps():
    for fragments in (1, 4):
        found = volume(step(data=8, local=Local("data", 50, fragments)))
        assert found == {("all-reduce", ("data",)): pytest.approx(2 * 7 / 8 * 4 * count(param_specs(MODEL)) / 50)}
    within = volume(step(data=2, fsdp=4, local=Local("data", 50)))
    assert within["all-reduce", ("data",)] == pytest.approx(2 / 2 * 4 * count(param_specs(MODEL)) / 4 / 50)
    together = volume(step(data=2, fsdp=4))
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert within[kind, ("fsdp",)] == together[kind, ("fsdp",)], kind


@pytest.mark.parametrize(
    "some",
    [
        step(data=2, fsdp=2, tensor=2),
        step(EXPERTS, data=2, expert=2, context=2, accumulate=2),
        step(pipe=4, tensor=2, accumulate=4, teacher=MODEL),
    ],
    ids=["automatic", "region", "pipeline"],
)
def test_bytes_by_loop_add_up(some):
    by_loop, total = volume_by_loop(some), {}
    for (kind, axes, loop), sent in by_loop.items():
        assert loop in LOOPS
        total[kind, axes] = total.get((kind, axes), 0) + sent
    assert total == pytest.approx(volume(some))


def test_loops_are_where_things_run():
    """Twice the layers are twice the bytes in loops over layers, and leave the others; so with microbatches."""
    cfg = dataclasses.replace(MODEL, layers=16)
    few, many = (volume_by_loop(step(c, fsdp=2, tensor=4)) for c in (MODEL, cfg))
    for key, sent in few.items():
        assert many[key] == pytest.approx(sent * (2 if key[2] == "layer" else 1)), key
    ticks = volume_by_loop(step(pipe=4, data=2, accumulate=8))
    assert [key for key in ticks if key[2] == "tick"] == [("collective-permute", ("pipe",), "tick")]


def test_hundreds_of_plans_take_no_time_to_look_at():
    """Leaves, layouts and schedules are made once."""
    some = step(preset("llama3_8b"), fsdp=8, tokens=4096)
    before = leaves_of.cache_info().misses
    for tokens in (8192, 16384):
        volume(dataclasses.replace(some, tokens=tokens))
    assert leaves_of.cache_info().misses <= before + 1
