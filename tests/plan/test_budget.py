"""Recipes that meet a budget: their bytes against the code that stores, their order, and that their config works."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from lmeff.compress.config import Prune, Quantize, build, pruned
from lmeff.compress.shrink import ShrinkConfig
from lmeff.compress.storage import storage_bits
from lmeff.config import Experiment, Stage
from lmeff.config.validate import validate
from lmeff.core.errors import ConfigError
from lmeff.core.specs import count, initialize
from lmeff.data.config import DataConfig
from lmeff.distill.objectives import Distill
from lmeff.models.config import preset
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan
from lmeff.plan.budget import budget, fit, steps
from lmeff.plan.compressions import CACHES, EXPECTED, code, cuts, recipes, stored_bytes
from lmeff.plan.hardware import chip
from lmeff.plan.job import Job, Shape
from lmeff.plan.predict import fullest
from lmeff.report import plan_options

V5P, V5E = chip("v5p"), chip("v5e")
SMALL = preset("tiny")
LLAMA = preset("llama3_8b")


@pytest.mark.parametrize(
    "names",
    [("4:8", "int4/g32", "ends int8"), pytest.param(("unstructured 0.5", "int8"), marks=pytest.mark.slow)],
    ids=["pattern", "unstructured"],
)
def test_stored_bytes_are_those_of_packed_weights(names):
    """The whole way: random weights, masks, packing, and every zero counted."""
    recipe = next(r for r in recipes(SMALL) if r.names == names)
    specs, compression = param_specs(recipe.cfg), build(recipe.transforms)

    @jax.jit
    def packed(key):
        params = initialize(key, specs, jnp.bfloat16)
        state = compression.init(params, specs)
        return compression.export(params, state._replace(auxiliary=compression.update(params, params, state, 0)))

    exact = storage_bits(packed(jax.random.key(0)), pruned(recipe.transforms, specs)) / 8
    assert stored_bytes(recipe, "bfloat16") == pytest.approx(exact, rel=0.01)


def test_llama_in_eight_bits_by_hand():
    """Matrices in a byte with a scale of 4 bytes for each output channel; embedding, head and norms in 2 bytes."""
    recipe = next(r for r in recipes(LLAMA) if r.names == ("int8",))
    channels = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14_336 + 4096)
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    rest = 2 * 128_256 * 4096 + 65 * 4096
    assert stored_bytes(recipe, "bfloat16") == matrices + 4 * channels + 2 * rest


def test_what_harms_least_comes_first():
    found = budget(LLAMA, V5P, bytes=10e9)
    assert [option.rank for option in found] == [1, 2, 3, 4, 5]
    assert [option.nats for option in found] == sorted(option.nats for option in found)
    assert all(option.stored_bytes <= 10e9 for option in found)
    assert found[0].stage.compress == (Quantize(),)  # int8 alone is enough
    assert "expected, not measured: int8 +0.002 nats (torchao" in found[0].because


def test_a_tighter_budget_harms_more():
    worst = [budget(LLAMA, V5P, bytes=size, keep=1)[0].nats for size in (17e9, 10e9, 8e9, 5e9, 4e9)]
    assert worst == sorted(worst)
    assert worst[0] == 0.0  # 16 GB of bfloat16 is within 17
    assert worst[1] < worst[2] < worst[4]
    assert not budget(SMALL, V5P, bytes=1e3)


def test_all_recipes_are_weighed():
    """The first that meets a target has the least expected damage of all that do."""
    for size in (9e9, 6e9, 3.5e9):
        meeting = [recipe.nats for recipe in recipes(LLAMA) if stored_bytes(recipe, "bfloat16") <= size]
        assert budget(LLAMA, V5P, bytes=size, keep=1)[0].nats == min(meeting)


def test_a_target_of_time():
    slow = budget(LLAMA, V5P, latency_ms=1000.0, keep=1)[0]
    # 2 bytes of each weight but the embedding's, and 4,096 tokens of keys and values, at 2,765 GB/s.
    read = 2 * (count(param_specs(LLAMA)) - 128_256 * 4096) + 4096 * 32 * 2 * 8 * 128 * 2
    assert slow.decode_ms == pytest.approx(1e3 * read / 2.765e12, rel=1e-3)
    found = budget(LLAMA, V5P, latency_ms=slow.decode_ms / 2)
    assert found
    assert all(option.decode_ms <= slow.decode_ms / 2 for option in found)
    assert {option.cache for option in budget(LLAMA, V5P, latency_ms=slow.decode_ms * 0.99, keep=20)} == set(CACHES)


def test_pruned_weights_save_bytes_and_no_time():
    dense, sparse = (next(r for r in recipes(LLAMA) if r.names == names) for names in ((), ("4:8",)))
    assert stored_bytes(sparse, "bfloat16") < 0.7 * stored_bytes(dense, "bfloat16")
    assert budget(LLAMA, V5P, bytes=1e12, keep=1)[0].decode_ms == pytest.approx(
        next(
            o for o in budget(LLAMA, V5P, bytes=1e12, keep=1000) if o.stage.compress == (Prune(pattern="4:8"),)
        ).decode_ms
    )


@pytest.mark.parametrize("size", [0.5, 0.3], ids=str)
def test_the_config_of_an_option_is_valid_python_and_trains(size):
    cfg = preset("small", width=64, ffn=128)
    dense = 2 * count(param_specs(cfg))
    option = budget(cfg, V5P, bytes=size * dense, keep=1)[0]
    names = {c.__name__: c for c in (Stage, Quantize, Prune, ShrinkConfig, Distill)}
    stage = eval(option.code, names)
    assert stage == option.stage
    experiment = Experiment(
        name="x", model=cfg, data=DataConfig(tokenizer="bytes"), recipe=(Stage(name="teacher"), stage)
    )
    assert validate(experiment, 1)["compressed"] == option.cfg


def test_code_leaves_out_defaults():
    assert (
        code(Stage(name="a", compress=(Prune(pattern="2:4"),))) == "Stage(name='a', compress=(Prune(pattern='2:4'),))"
    )
    assert code(()) == "()"
    assert code((1, "b")) == "(1, 'b')"


def test_cuts_are_sizes_that_a_model_can_take():
    found = cuts(LLAMA)
    assert found["ffn 0.75"] == ShrinkConfig(ffn=10_752)
    assert found["layers 0.5"] == ShrinkConfig(layers=16)
    assert found["kv_heads 0.5"] == ShrinkConfig(kv_heads=4)
    assert not any("ffn" in name for name in cuts(preset("moe_tiny")))
    assert "kv_heads 0.5" not in cuts(dataclasses.replace(SMALL, kv_heads=1))
    for cfg in (LLAMA, SMALL, preset("moe_tiny")):
        assert all(shrink is None or shrink.apply(cfg) != cfg for shrink in cuts(cfg).values())


def test_every_part_of_a_recipe_has_an_expectation_with_a_source():
    for recipe in recipes(SMALL, CACHES):
        parts = (recipe.shrink is not None) + len(recipe.transforms) + (recipe.cache != "bfloat16")
        assert parts <= len(recipe.names) <= parts + 1  # ends have one of their own
    assert all(damage.nats > 0 and damage.source for damage in EXPECTED.values())


def test_a_budget_needs_a_target():
    with pytest.raises(ConfigError, match="budget: got no target, expected bytes or latency_ms"):
        budget(LLAMA, V5P)


def job(**changes):
    given = {
        "name": "a", "student": Shape(cfg=preset("125m")), "mesh": MeshPlan(fsdp=4), "devices": 4, "rows": 8, "tokens": 1024, "remat": "full",
        "precision": "compute=bfloat16",
    }  # fmt: skip
    return Job(**(given | changes))


@pytest.mark.parametrize(
    "of",
    [
        job(),
        job(accumulate=2),
        job(mesh=MeshPlan(fsdp=2, tensor=2)),
        job(mesh=MeshPlan(pipe=2, fsdp=2), accumulate=4),
        job(mesh=MeshPlan(fsdp=2, context=2)),
    ],
    ids=["fsdp", "accumulate", "tensor", "pipe", "context"],
)  # fmt: skip
def test_the_largest_batch_and_context(of):
    found = fit(of, V5E)
    rows, tokens = steps(of)
    assert (found.row_step, found.token_step) == (rows, tokens)
    assert (found.rows % rows, found.tokens % tokens) == (0, 0)
    largest, more = (of.changed(rows=found.rows + n * rows) for n in (0, 1))
    assert (fullest(largest), fullest(more)) == (found.rows_bytes, found.more_rows_bytes)
    assert fullest(largest) <= V5E.usable < fullest(more)
    longest, more = (of.changed(tokens=found.tokens + n * tokens) for n in (0, 1))
    assert fullest(longest) <= V5E.usable < fullest(more)


def test_steps_are_what_the_mesh_cuts():
    of = job(mesh=MeshPlan(data=2, fsdp=2, context=2, tensor=3), devices=24, accumulate=2, rows=24)
    assert steps(of) == (2 * 2 * 2, math.lcm(4, 6, 128))
    assert steps(of.changed(platform="cpu")) == (8, 12)


def test_no_batch_fits_a_model_that_is_too_large():
    found = fit(job(student=Shape(cfg=preset("llama3_70b")), tokens=1024), V5E)
    assert (found.rows, found.tokens) == (0, 0)
    assert found.more_rows_bytes > V5E.usable


def test_a_job_that_cannot_train_has_no_fit():
    with pytest.raises(ConfigError, match="the mesh cannot cut"):
        fit(job(mesh=MeshPlan(tensor=8), devices=8), V5E)


def test_a_budget_of_activations_ends_the_search_for_room():
    of = job(remat="budget:256MiB")
    found = fit(of, V5E)
    assert found.rows > 0
    assert (found.more_rows_bytes, found.more_tokens_bytes) == (0, 0)
    assert fullest(of.changed(rows=found.rows)) == found.rows_bytes <= V5E.usable
    with pytest.raises(ConfigError, match="budget:256MiB"):
        fullest(of.changed(rows=found.rows + found.row_step))
    told = plan_options.roomy({"room": found._asdict(), "job": {"rows": of.rows, "tokens": of.tokens}})
    assert told[0].startswith(f"room for {found.rows:,} rows of ")
    assert told[0].endswith("are more than the budget of train.remat keeps the inputs of layers of")
