"""Sentences against numbers worked out by hand."""

import dataclasses

import pytest

from lmeff.models.config import preset
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.devices import parse_topology
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.schedules import build
from lmeff.parallel.simulate import simulate
from lmeff.plan import reasons, words
from lmeff.plan.estimate import Energy, Estimate, Flow, Memory, StepTime, Work
from lmeff.plan.hardware import chip
from lmeff.plan.job import Job, Shape
from lmeff.plan.search import Search
from lmeff.plan.space import Refused
from lmeff.train.local_updates import LocalUpdates

GIB = 2**30
V5P, H100 = chip("v5p"), chip("h100")
LLAMA = preset("llama3_70b")  # F = 28,672, 64 heads for 8 key-value heads


def job(mesh=MeshPlan(), devices=64, chip=V5P, cfg=LLAMA, **changes):  # noqa: B008 -- frozen
    given = {"rows": 64, "tokens": 8192, "remat": "full", "precision": "compute=bfloat16"} | changes
    return Job(name="pretrain", student=Shape(cfg=cfg), mesh=mesh, devices=devices, platform=chip.platform, **given)


def estimate(of, *, middle=10.0, parts=None, state=None, temporaries=None, flows=(), stage=0):
    """An estimate with the numbers that a sentence reads."""
    time = StepTime(0.5 * middle, middle, 2 * middle, (), parts or {"compute": 8.0, "network": 2.0}, 1.0, 0.4, 0.4, 0.5)
    memory = Memory(stage, state or {"optimizer": 4 * GIB}, temporaries or {"gradients": GIB})
    return Estimate(
        job=of,
        chip="v5e",
        parameters=1,
        active_parameters=1,
        work=Work((), (), {}, 1.0, 1.0, 1.0, 1.0, 1.0),
        memory=(memory,),
        capacity=int(15.75 * GIB),
        flows=tuple(flows),
        time=time,
        energy=Energy({}, 0.0, 0.0, {}),
        notes=(),
    )


def test_what_does_not_fit_is_told_with_what_takes_most():
    found = estimate(
        job(), state={"optimizer": 8 * GIB, "parameters": 4 * GIB}, temporaries={"gradients": int(7.5 * GIB)}
    )
    said = words.room(found)
    assert (
        said
        == "does not fit: 19.5 GiB of 15.8 GiB on a device; optimizer 8.00 GiB, gradients 7.50 GiB, parameters 4.00 GiB"
    )
    assert words.room(estimate(job())).startswith("fits: 5.00 GiB of 15.8 GiB on a device; optimizer")


def test_a_pipeline_names_its_fullest_stage():
    found = estimate(job(MeshPlan(pipe=4)), stage=3)
    assert "on a device on stage 3 of the pipeline" in words.room(found)


def test_the_largest_part_of_a_step():
    said = words.time(estimate(job(), parts={"compute": 6.0, "network": 3.0, "memory": 1.0, "bubble": 0.0}))
    assert "a step takes about 10 s (5 s to 20 s), and products take the most of it: 6 s" in said
    assert "60% of all parts laid end to end, network 3 s, memory 1 s" in said
    assert "the network takes the most of it" in words.time(estimate(job(), parts={"compute": 1.0, "network": 3.0}))


@pytest.mark.parametrize(
    ("mesh", "devices", "said"),
    [
        # One ring of 4 at 180 GB/s: alpha = 459e12 / 180e9 = 2,550, and 28,672 / 2,550 = 11.2.
        (MeshPlan(fsdp=16, tensor=4), 64, "tensor 4 is within 11.2, up to which products take longer"),
        # Two rings of 4.
        (MeshPlan(fsdp=4, tensor=16), 64, "tensor 16 is within 22.5"),
        # A line of 2 has no closing link: half of a ring's rate, and a limit of 5.6.
        (MeshPlan(fsdp=4, tensor=2), 8, "tensor 2 is within 5.6"),
    ],
    ids=["one-ring", "two-rings", "line"],
)  # fmt: skip
def test_tensor_parallelism_and_alpha(mesh, devices, said):
    (found,) = words.tensor(job(mesh, devices), V5P)
    assert found.startswith(said)
    assert "F = 28,672" in found


def test_alpha_is_told_as_the_ratio_that_it_is():
    (found,) = words.tensor(job(MeshPlan(fsdp=16, tensor=4)), V5P)
    assert "(alpha 2,550 = 459 TFLOP/s / 180 GB/s of ici, F = 28,672)" in found


def test_too_much_tensor_parallelism():
    cfg = dataclasses.replace(preset("llama3_8b"), ffn=2048)  # 2,048 / 2,550 is below 1
    (found,) = words.tensor(job(MeshPlan(fsdp=16, tensor=4), cfg=cfg), V5P)
    assert found.startswith("tensor 4 is network-bound: above 0.8 collectives take longer than products")
    wide = job(MeshPlan(fsdp=16, tensor=4), precision="")  # float32 is twice the bytes
    assert next(iter(words.tensor(wide, V5P))).startswith("tensor 4 is within 5.6")
    assert not list(words.tensor(job(MeshPlan(fsdp=64)), V5P))


@pytest.mark.parametrize(
    ("rows", "tokens", "said"),
    [
        # All three axes of 4x4x4 are fsdp: 2,550 / 3 = 850 tokens a chip (Scaling Book).
        (64, 8192, "fsdp 64: 8,192 tokens for each gathered weight are above the 850 that hide the gathers"),
        (64, 512, "fsdp 64: 512 tokens for each gathered weight are below the 850 that would hide the gathers"),
    ],
    ids=["above", "below"],
)  # fmt: skip
def test_tokens_that_hide_the_gathers(rows, tokens, said):
    found = estimate(job(MeshPlan(fsdp=64), rows=rows, tokens=tokens))
    assert next(iter(words.rows(found, V5P))).startswith(said)


def test_tokens_of_a_group_are_those_of_all_its_parts():
    # 16 groups of 4 devices each hold a quarter of the weights: a group has 64 x 8,192 / 16 tokens.
    assert words.tokens_of_group(job(MeshPlan(fsdp=16, tensor=4))) == 64 * 8192 / 16
    assert words.tokens_of_group(job(MeshPlan(fsdp=16, context=4))) == 64 * 8192 / 64


def test_gathers_once_a_step_hide_behind_nothing():
    sent = [
        Flow("all-gather", ("fsdp",), "step", "ici", 1e9, 0.25),
        Flow("all-gather", ("fsdp",), "layer", "ici", 1e9, 9.0),
        Flow("reduce-scatter", ("fsdp",), "step", "ici", 1e9, 9.0),
    ]
    found = estimate(job(MeshPlan(fsdp=64), accumulate=1, rows=128), flows=sent)
    (said,) = words.rows(found._replace(job=found.job.changed(accumulate=2)), V5P)
    assert said.startswith(
        "fsdp 64: weights are gathered once a step, before anything computes: 250 ms that nothing hides"
    )


def test_sums_of_gradients():
    sent = [
        Flow("all-reduce", ("data",), "layer", "ici", 1e9, 0.5),
        Flow("all-gather", ("tensor",), "layer", "ici", 1e9, 9.0),
    ]
    (said,) = words.rows(estimate(job(MeshPlan(tensor=4)), flows=sent), V5P)
    assert said == "data 16: summing gradients takes 500 ms of the network"
    assert not list(words.rows(estimate(job(MeshPlan(tensor=4), devices=4)), V5P))


def test_slices_and_the_data_center_network():
    # A slice of 64 chips is 16 hosts: 64 x 459e12 / (16 x 25e9) = 73,440 FLOPs a byte, twice as many tokens for float32 gradients.
    of = job(MeshPlan(dcn=2, fsdp=64), devices=128)
    (said,) = words.slices(of, V5P)
    assert said.startswith(
        "dcn 2: 262,144 tokens of a slice are above the 146,880 that hide the sums of float32 gradients"
    )
    assert not list(words.slices(of, V5P, parse_topology("v5p:4x4x8"))), "one slice: its own links join the workers"
    assert "below the 146,880" in next(iter(words.slices(of.changed(rows=16, mesh=of.mesh), V5P)))


def test_parameters_that_meet_now_and_then_need_fewer_tokens_of_a_slice():
    # As many bytes as gradients have, once in 50 steps: 146,880 / 50.
    of = job(MeshPlan(dcn=2, fsdp=64), devices=128, local=LocalUpdates(every=50, axis="dcn"))
    (said,) = words.slices(of, V5P)
    assert "above the 2,938 that hide the meetings of parameters, one in 50 steps, between slices" in said


def test_gradients_in_int8_are_summed_by_other_collectives():
    sent = [
        Flow("all-to-all", ("data",), "step", "ici", 1e9, 0.5),
        Flow("all-gather", ("data",), "step", "ici", 1e9, 0.25),
        Flow("all-reduce", ("data",), "step", "ici", 1e3, 0.001),
        Flow("all-to-all", ("expert",), "layer", "ici", 1e9, 9.0),
    ]
    of = job(MeshPlan(tensor=4), reduce=Reduce(method="int8"))
    (said,) = words.rows(estimate(of, flows=sent), V5P)
    assert said == "data 16: summing gradients takes 751 ms of the network"
    (exact,) = words.rows(estimate(of.changed(reduce=None), flows=sent), V5P)
    assert exact == "data 16: summing gradients takes 1.00 ms of the network"


def test_rates_of_a_cpu_keep_their_digits():
    slow = dataclasses.replace(
        chip("v5p"), platform="cpu", flops={"bfloat16": 64e9}, ici=0.0, nvlink=32e9, domain=2**20
    )
    (said,) = words.tensor(job(MeshPlan(fsdp=16, tensor=4), chip=slow), slow)
    assert "alpha 2 = 0.00100 TFLOP/s / 0.500 GB/s of nvlink" in said  # a 64th of each


def test_context_and_its_keys():
    # 8,192 / 2 keys x 4 x 64 heads over 2 x 8 key-value heads of 2 bytes, and over 4 devices: 8,192.
    (said,) = words.context(job(MeshPlan(fsdp=16, context=4)), V5P)
    assert said.startswith(
        "context 4: attention does 8,192 FLOPs for each byte of keys and values that comes, which hides them (alpha 2,550"
    )
    short = job(MeshPlan(fsdp=16, context=4), tokens=1024)
    assert "does 1,024 FLOPs for each byte of keys and values that comes, which does not hide them" in next(
        iter(words.context(short, V5P))
    )
    assert not list(words.context(job(MeshPlan(fsdp=16, context=4, sequence="ulysses")), V5P))


@pytest.mark.parametrize(
    ("schedule", "chunks", "formula", "share"),
    [
        ("1f1b", None, "(p-1)/(m+p-1)", 3 / 11),
        ("interleaved", 2, "(p-1)/(vm+p-1)", 3 / 19),
        ("zb-h1", None, "(p-1)/(3m+p-1)", 3 / 27),
    ],
)
def test_bubbles(schedule, chunks, formula, share):
    of = job(MeshPlan(pipe=4, schedule=schedule, chunks=chunks), devices=4, accumulate=8)
    assert words.bubble(of) == (formula, pytest.approx(share))
    (said,) = words.pipeline(estimate(of, parts={"compute": 1.0, "bubble": 0.5}))
    assert f"{formula} = {share:.0%} are idle" in said
    assert said.endswith("stages wait 500 ms of a step")


def test_bubbles_are_those_of_the_tables():
    named = dict.fromkeys(("gpipe", "1f1b", "circular", "zb-h1", "zb-h2", "zbv")) | {"interleaved": 4}
    for name, chunks in named.items():
        of = job(MeshPlan(pipe=4, schedule=name, chunks=chunks), devices=4, accumulate=8)
        assert words.bubble(of)[1] == pytest.approx(simulate(build(name, 4, 8, chunks)).idle_share)


def test_a_setting_in_words():
    assert words.setting(job(MeshPlan(fsdp=16, tensor=4))) == "fsdp 16 x tensor 4, ZeRO-3, remat full"
    piped = job(MeshPlan(pipe=4, fsdp=16, zero=1, schedule="interleaved", chunks=2), accumulate=8)
    assert (
        words.setting(piped)
        == "fsdp 16 x pipe 4, ZeRO-1, interleaved with 2 chunks that keeps input, 8 microbatches, remat full"
    )
    assert words.setting(job(MeshPlan(), devices=1)) == "one device, remat full"


PLAIN = estimate(job(MeshPlan(fsdp=64)), middle=10.0, parts={"compute": 8.0, "network": 3.0, "bubble": 0.0})
PIPED = estimate(
    job(MeshPlan(fsdp=16, pipe=4), accumulate=4), middle=12.5, parts={"compute": 8.0, "network": 1.0, "bubble": 3.5}
)


def found(**changes):
    given = {
        "best": (PLAIN,), "plain": PLAIN, "piped": PIPED, "least": PLAIN, "simple": PLAIN, "own": PLAIN, "looked": 1000, "legal": 800, "close": 60, "fit": 40,
        "refused": {"model: the mesh cannot cut K": Refused(150, "K = 8 over tensor = 16"), "train.batch": Refused(50, "rows")}, "reasons": (),
    }  # fmt: skip
    return Search(**{**given, **changes})


def test_do_not_pipeline():
    (said,) = reasons.whether_to_pipeline(found())
    assert said.startswith("do not pipeline: the best plan with one (fsdp 16 x pipe 4,")
    assert "takes 12.5 s a step, 25% more than 10 s without" in said
    assert said.endswith(
        "its bubble, (p-1)/(m+p-1) = 43% of the ticks, costs 3.5 s and it saves 2 s of the network"
    )  # 3 / 7


def test_pipeline_where_it_is_faster():
    (said,) = reasons.whether_to_pipeline(
        found(plain=PIPED._replace(job=PLAIN.job), piped=PLAIN._replace(job=PIPED.job))
    )
    assert said.startswith("pipeline: the best plan with one")
    assert "20% less than 12.5 s without" in said
    assert said.endswith("and its network takes 2 s more")


def test_pipelines_alone_and_none():
    (alone,) = reasons.whether_to_pipeline(found(plain=None, best=(PIPED,)))
    assert alone.startswith("pipeline: no plan without one was found that fits")
    (none,) = reasons.whether_to_pipeline(found(piped=None))
    assert none == "do not pipeline: no plan with a pipeline was found that fits"
    assert not list(reasons.whether_to_pipeline(found(piped=None, plain=None)))


def test_the_configs_own_plan():
    assert list(reasons.against_own(found())) == ["the config's own plan is the best that was found"]
    (slower,) = reasons.against_own(found(own=PIPED))
    assert slower.endswith("takes 12.5 s a step, +25.0% against the best")
    (full,) = reasons.against_own(found(own=estimate(PIPED.job, state={"optimizer": 20 * GIB})))
    assert full.endswith("does not fit: 21.0 GiB of 15.8 GiB")
    assert list(reasons.against_own(found(own=None))) == ["the config's own plan cannot train on these devices"]


def test_a_simpler_plan_is_named_where_it_is_another():
    assert not list(reasons.as_simple(found()))
    near = estimate(job(MeshPlan(fsdp=32, tensor=2)), middle=10.2)
    (said,) = reasons.as_simple(found(simple=near))
    assert said.startswith(
        "about as fast and simpler: fsdp 32 x tensor 2, ZeRO-3, remat full; 10.2 s a step (+2.0%), 5.00 GiB of 15.8 GiB"
    )


def test_counts_and_why_plans_cannot_train():
    said = reasons.counted(found())
    assert said.startswith(
        "1,000 plans: 800 can train (150 cannot, such as: K = 8 over tensor = 16; 50 cannot, such as: rows); the 60 that looked"
    )
    assert said.endswith("the 60 that looked fastest were predicted, 40 of them fit")


def test_nothing_fits():
    least = estimate(job(MeshPlan(fsdp=64)), state={"optimizer": 30 * GIB}, temporaries={"gradients": int(1.5 * GIB)})
    said = reasons.choices(found(best=(), plain=None, piped=None, simple=None, least=least))[1]
    assert said.startswith(
        "no plan fits: the one that takes least, fsdp 64, ZeRO-3, remat full, needs 31.5 GiB of 15.8 GiB on a device: optimizer 30.0 GiB"
    )
    assert said.endswith("Set precision state=bfloat16 or optim.offload, or take about 2.0 times as many devices")
    (none,) = reasons.nothing_fits(found(best=(), least=None))
    assert none == "no plan can train; K = 8 over tensor = 16"


def test_gpus_have_links_of_two_kinds():
    inside = words.link(job(MeshPlan(fsdp=8, tensor=8), chip=H100), H100, ("tensor",))
    assert (inside.network, round(inside.alpha)) == ("nvlink", 2199)  # 989.4e12 / 450e9
    outside = words.link(job(MeshPlan(tensor=8), chip=H100), H100, ("data",))
    assert (outside.network, round(outside.alpha)) == ("dcn", 19788)  # 989.4e12 / 50e9
