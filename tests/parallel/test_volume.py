"""The closed forms of what a step moves, on shapes that nothing is compiled for."""

import dataclasses

import jax.numpy as jnp
import pytest

from lmeff.core.errors import ConfigError
from lmeff.core.precision import parse
from lmeff.core.specs import count
from lmeff.models.config import ModelConfig, MoE, preset
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan
from lmeff.parallel.volume import ROWS, terms, volume
from lmeff.parallel.volume_term import Term
from lmeff.parallel.workload import Local, Step

LLAMA = preset("llama3_8b")
WEIGHTS = count(param_specs(LLAMA))
MODEL = ModelConfig(vocab=256, width=64, layers=8, heads=8, kv_heads=8, ffn=256, tied=False)


def step(cfg=MODEL, *, devices=8, rows=32, tokens=64, **changes):
    plan = {k: changes.pop(k) for k in list(changes) if k in MeshPlan.__dataclass_fields__}
    return Step(cfg=cfg, plan=MeshPlan(**plan), devices=devices, rows=rows, tokens=tokens, **changes)


def test_data_parallel_reduces_every_weight_once():
    moved = volume(step(LLAMA, devices=16, tokens=4096))
    assert moved == {("all-reduce", ("data",)): 2 * 15 / 16 * 4 * WEIGHTS}
    accumulated = volume(step(LLAMA, devices=16, tokens=4096, rows=64, accumulate=4, dcn=2))
    assert accumulated == {("all-reduce", ("dcn", "data")): 2 * 15 / 16 * 4 * WEIGHTS}


def test_zero_3_moves_weights_twice_and_gradients_once():
    """3 (n-1)/n of the weights (Rajbhandari et al. 2020), but for head and table: rows travel, the head turns once each way."""
    cfg, n = LLAMA, 16
    moved = volume(step(cfg, devices=n, fsdp=n, tokens=4096, policy=parse("compute=bfloat16")))
    outer = cfg.vocab * cfg.width
    vectors = (2 * cfg.layers + 1) * cfg.width
    tokens = 32 // n * 4096
    part = (n - 1) / n
    rows = n * tokens
    assert moved == pytest.approx(
        {
            ("all-gather", ("fsdp",)): part * (2 * 2 * (WEIGHTS - 2 * outer) + rows * (4 * cfg.width + 12)),
            ("reduce-scatter", ("fsdp",)): part * 4 * (WEIGHTS - 2 * outer - vectors + rows * cfg.width),
            ("all-reduce", ("fsdp",)): 2 * part * (2 * vectors + 4 * 5 * rows),
            ("all-to-all", ("fsdp",)): part * 2 * 2 * (tokens * cfg.width + outer / n),
        }
    )


def test_a_region_gathers_once_and_scatters_once_whatever_the_microbatches():
    for accumulate in (2, 8):
        moved = volume(step(LLAMA, devices=16, fsdp=4, tokens=4096, rows=128, accumulate=accumulate))
        assert moved == {
            ("all-gather", ("fsdp",)): 3 / 4 * 4 * WEIGHTS,
            ("reduce-scatter", ("fsdp",)): 3 / 4 * 4 * WEIGHTS,
            ("all-reduce", ("data",)): 2 * 3 / 4 * 4 * WEIGHTS / 4,
        }


@pytest.mark.parametrize(("zero", "factor"), [(0, 2), (1, 3), (2, 3)])
def test_stages_of_zero_in_a_region(zero, factor):
    moved = volume(step(LLAMA, devices=8, fsdp=8, zero=zero, tokens=4096, accumulate=2))
    assert sum(moved.values()) == factor * 7 / 8 * 4 * WEIGHTS


def test_a_tensor_parallel_layer():
    """Forward two gathers and two reduce-scatters of [B, T, D]; backward two gathers and five reduce-scatters, where two would do."""
    deep, shallow = (volume(step(dataclasses.replace(MODEL, layers=layers), tensor=8)) for layers in (8, 7))
    one = {key: deep[key] - shallow[key] for key in deep if key[0] != "all-reduce"}
    unit = 7 / 8 * 4 * 32 * 64 * MODEL.width
    assert one == {("all-gather", ("tensor",)): 4 * unit, ("reduce-scatter", ("tensor",)): 7 * unit}


@pytest.mark.parametrize(
    ("remat", "gathers", "reductions"), [("none", 4, 7), ("dots", 6, 7), ("names", 6, 8), ("full", 6, 8)]
)
def test_rematerialisation_runs_collectives_of_the_forward_pass_again(remat, gathers, reductions):
    layers = {
        term.kind: term.times for term in terms(step(tensor=8, remat=remat))["layers"] if term.kind != "all-reduce"
    }
    assert layers == {"all-gather": 8 * gathers, "reduce-scatter": 8 * reductions}


def test_partial_sums_are_float32_and_gathered_activations_are_not():
    found = {t.kind: t.dtype for t in terms(step(tensor=8, policy=parse("compute=bfloat16")))["layers"]}
    assert found["all-gather"] == jnp.bfloat16
    assert found["reduce-scatter"] == jnp.float32


def test_a_compiler_that_does_not_scatter_sends_twice_as_much():
    """Only what is left to the compiler; what the step scatters itself stays."""
    some = step(tensor=8)
    yes, no = volume(some), volume(some, scatters=False)
    embedding = 7 / 8 * 4 * some.activation
    assert no["reduce-scatter", ("tensor",)] == embedding
    scattered = yes["reduce-scatter", ("tensor",)] - embedding
    assert no["all-reduce", ("tensor",)] == yes["all-reduce", ("tensor",)] + 2 * scattered


def test_pipeline_permutes_its_payload_every_tick():
    some = step(pipe=4, data=2, accumulate=8)
    payload = 4 * 32 // 2 // 8 * 64 * MODEL.width
    assert some.schedule.ticks == 3 * 8 + 3 * 3
    moved = volume(some)
    assert moved["collective-permute", ("pipe",)] == 2 * 33 * payload
    outer = 2 * MODEL.vocab * MODEL.width + MODEL.width
    assert moved["all-reduce", ("data", "pipe")] == 2 * 7 / 8 * 4 * outer
    layers = (count(param_specs(MODEL)) - outer) // 4
    assert moved["all-reduce", ("data",)] == 2 * 1 / 2 * 4 * layers
    assert moved.keys() == {
        ("collective-permute", ("pipe",)),
        ("all-reduce", ("data", "pipe")),
        ("all-reduce", ("data",)),
    }


@pytest.mark.parametrize(
    ("layers", "chunks", "kinds"),
    [(8, 1, set()), (8, 2, {"all-to-all"}), (12, 2, {"all-gather", "reduce-scatter"}), (10, 2, set())],
)
def test_layers_of_several_chunks_are_exchanged(layers, chunks, kinds):
    """Slices that are alike are exchanged, others gathered; where stages do not divide layers every stage has all of them."""
    cfg = dataclasses.replace(MODEL, layers=layers)
    found = terms(step(cfg, pipe=4, accumulate=4, schedule="interleaved", chunks=chunks))["pipeline"]
    assert {t.kind for t in found} - {"collective-permute"} == kinds


def test_only_the_first_stage_embeds_and_only_the_last_has_the_loss():
    stages = [terms(step(pipe=4, tensor=2, accumulate=4, stage=stage)) for stage in range(4)]
    assert [bool(found["embedding"]) for found in stages] == [True, False, False, False]
    assert [bool(found["loss"]) for found in stages] == [False, False, False, True]
    both = [terms(step(pipe=4, tensor=2, accumulate=4, schedule="zbv", stage=stage)) for stage in range(4)]
    assert [bool(found["embedding"] and found["loss"]) for found in both] == [True, False, False, False]


def test_one_device_moves_nothing():
    assert volume(step(devices=1)) == {}


def test_a_row_is_all_that_a_new_strategy_adds(monkeypatch):
    monkeypatch.setitem(ROWS, "beacon", lambda step: iter([Term("all-gather", ("data",), 100, jnp.int8, 3)]))
    assert volume(step())["all-gather", ("data",)] == 3 * 7 / 8 * 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 8, "tokens": 60}, "T = 60 over tensor = 8"),
        ({"tensor": 2, "context": 2, "tokens": 66, "sequence": "ulysses"}, "T = 66 over context x tensor = 4"),
        ({"context": 4, "tokens": 60}, "rows of 60 tokens, expected a multiple of 2 x mesh.context = 8"),
        (
            {"context": 8, "sequence": "ulysses", "teacher": dataclasses.replace(MODEL, heads=4, kv_heads=4)},
            r"H = \[8, 4\] over context x tensor",
        ),
        ({"cfg": dataclasses.replace(MODEL, moe=MoE(experts=4)), "expert": 8}, "E = 4 over expert = 8"),
        ({"teacher": dataclasses.replace(MODEL, kv_heads=2), "tensor": 4}, "K = 2 over tensor = 4"),
        ({"teacher": dataclasses.replace(MODEL, vocab=512)}, "a teacher with V = 512, expected the student's 256"),
        (
            {"pipe": 4, "accumulate": 4, "teacher": dataclasses.replace(MODEL, layers=2)},
            "got 2 layers, expected at least",
        ),
        ({"local": Local("fsdp", 4), "fsdp": 8}, "workers along 'fsdp', expected dcn or data"),
        ({"local": Local("dcn", 4)}, "workers along 'dcn', expected dcn or data, and at least two"),
        ({"remat": "budget:1GiB"}, "got remat 'budget:1GiB', expected the policy it means"),
        ({"remat": "most"}, "train.remat: got 'most'"),
        ({"rows": 12}, "B = 12 over the batch axes and 1 microbatches"),
        ({"pipe": 4, "accumulate": 4, "stage": 4}, "got stage 4, expected 0 to 3"),
        ({"cfg": dataclasses.replace(MODEL, kv_heads=2), "tensor": 8}, "K = 2 over tensor = 8"),
    ],
)
def test_what_no_step_could_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        step(**changes)
