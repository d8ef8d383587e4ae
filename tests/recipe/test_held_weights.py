"""What lies on the devices beside a step: a recipe keeps the arrays that a stage reads and no others, and a plan counts them."""

import dataclasses

import jax
import numpy as np
import pytest

from lmeff.compress.config import build
from lmeff.config import DataConfig, Distill, Experiment, ModelConfig, Prune, Quantize, ShrinkConfig, Stage, TrainConfig
from lmeff.core.numerics import is_qtensor
from lmeff.core.specs import count, initialize
from lmeff.core.tree import flatten
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.plan.hardware import chip
from lmeff.plan.job import jobs
from lmeff.plan.predict import predict
from lmeff.plan.state import held_bytes
from lmeff.recipe import run as running
from lmeff.recipe.sources import load_numbers, load_packed
from lmeff.recipe.transfer import import_model
from tests.recipe.pretrained_model import CFG, write_huggingface
from tests.runs import lmeff_json, write_config, write_text

SMALL = ModelConfig(vocab=264, width=32, layers=4, heads=4, kv_heads=2, ffn=64)
RULES = (("blocks/.*/(w[qkvo]|up|gate|down)", "int8"), ("embed/table", "int4/g8"), (".*", None))


def held(*stages, devices=1):
    """`{stage: bytes on a device beside the step}` of those that train."""
    experiment = Experiment(
        name="run",
        model=SMALL,
        data=DataConfig(sequence=16),
        mesh=MeshPlan(fsdp=devices),
        train=TrainConfig(batch=8, steps=2),
        recipe=stages,
    )
    return {job.name: held_bytes(job).get("start", 0) for job in jobs(experiment, devices, "cpu")}


WHOLE = 4 * count(param_specs(SMALL))
HALF = 4 * count(param_specs(dataclasses.replace(SMALL, layers=2)))
FIRST = Stage(name="a", steps=0)


@pytest.mark.parametrize(
    ("stage", "bytes"),
    {
        "random": (Stage(name="b"), 0),
        "goes on": (Stage(name="b", start="a"), WHOLE),
        "goes on with its teacher": (Stage(name="b", start="a", distill=Distill(teacher="a")), 0),
        "compressed": (Stage(name="b", start="a", compress=(Quantize(),)), WHOLE),
        "cut": (Stage(name="b", start="a", shrink=ShrinkConfig(layers=2)), WHOLE + HALF),
        "cut from its teacher": (
            Stage(name="b", start="a", shrink=ShrinkConfig(layers=2), distill=Distill(teacher="a")),
            HALF,
        ),
    }.values(),
)  # fmt: skip
def test_a_plan_counts_what_a_stage_began_from(stage, bytes):
    assert held(FIRST, stage)["b"] == bytes
    assert held(FIRST, stage, devices=8)["b"] == pytest.approx(bytes / 8, rel=0.01)


def test_masks_of_the_start_and_what_was_made_of_it_count():
    pruned = Stage(name="p", compress=(Prune(sparsity=0.5),))
    found = held(pruned, Stage(name="b", start="p", compress=(Quantize(),)))
    assert found["p"] == 0
    masks = sum(x.size for path, x in weights().items() if path.startswith("blocks/") and "norm" not in path)
    assert found["b"] == pytest.approx(2 * WHOLE + masks, rel=0.001)


def weights():
    return flatten(jax.eval_shape(lambda: initialize(jax.random.key(0), param_specs(SMALL))))


def test_it_is_part_of_what_must_fit():
    experiment = Experiment(
        name="run", model=SMALL, data=DataConfig(sequence=16), recipe=(Stage(name="a"), Stage(name="b", start="a"))
    )
    one, two = (predict(job, chip("v5e")) for job in jobs(experiment, 1, "tpu"))
    assert two.peak.total - one.peak.total == held_bytes(two.job)["start"] > 0
    assert two.to_json()["bytes_per_device"]["start"] == held_bytes(two.job)["start"]
    assert two.peak.of_step == one.peak.total


@pytest.mark.slow
def test_a_recipe_keeps_what_a_stage_reads_and_measures_all(tmp_path, monkeypatch):
    seen, before = {}, running.run_stage

    def watched(shop, stage, earlier, progress):
        seen[stage.name] = {name for name, artifact in earlier.items() if artifact.at_hand}
        return before(shop, stage, earlier, progress)

    monkeypatch.setattr(running, "run_stage", watched)
    recipe = (
        'Stage(name="a", steps=1), Stage(name="b", steps=1), Stage(name="c", start="a", distill=Distill(teacher="b"), steps=1),'
        'Stage(name="d", start="c", compress=(Quantize(),), steps=0, export=True), Stage(name="e", start="a", steps=1),'
    )
    config = write_config(tmp_path, write_text(tmp_path), recipe=recipe, claims="")
    report = lmeff_json("run", config)
    assert seen == {"a": set(), "b": set(), "c": {"a", "b"}, "d": {"c"}, "e": {"a"}}
    again = lmeff_json("run", config)
    assert [row["loss"] for row in again["artifacts"]] == [row["loss"] for row in report["artifacts"]]
    assert [row["name"] for row in report["artifacts"]] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("method", ["minmax", "lsq"])
@pytest.mark.parametrize("imported", [False, True], ids=["hugging face", "imported"])
def test_packed_as_it_loads_is_packed_as_a_whole(method, imported, tmp_path):
    folder = write_huggingface(tmp_path / "hf")
    if imported:
        folder = tmp_path / "imported"
        import_model(tmp_path / "hf", folder)
    layout, transform = make_layout(MeshPlan(fsdp=8)), Quantize(method=method, rules=RULES)
    cfg, packed = load_packed(folder, layout, np.float32, transform)
    _, params = load_numbers(folder, layout, np.float32)
    specs = param_specs(cfg)
    whole = build((transform,))
    expected = jax.jit(lambda p: whole.export(p, whole.init(p, specs)))(params)
    assert cfg == CFG
    assert {path for path, x in flatten(packed).items() if is_qtensor(x)} == {
        path for path in flatten(specs) if path == "embed/table" or path.rpartition("/")[2] in ("wq", "wk", "wv", "wo", "up", "gate", "down")
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, packed, expected)


@pytest.mark.slow
def test_a_stage_that_only_packs_what_it_loads_never_holds_it_whole(tmp_path, monkeypatch):
    folder = str(write_huggingface(tmp_path / "hf"))
    quantize = f"compress=(Quantize(rules={RULES!r}),), steps=0, export=True"
    recipe = f'Stage(name="plain", load={folder!r}, steps=0), Stage(name="two", start="plain", {quantize}), Stage(name="one", load={folder!r}, {quantize}),'
    config = write_config(tmp_path, write_text(tmp_path), recipe=recipe, claims="")
    calls = []
    monkeypatch.setattr("lmeff.recipe.stage.load_packed", lambda *a: calls.append(a[0]) or load_packed(*a))
    report = lmeff_json("run", config, "--data.tokenizer", folder)
    _, two, one = report["artifacts"]
    assert list(map(str, calls)) == [folder]
    assert one["note"] == f"loaded from {folder} (llama, a Hugging Face folder)"
    same = ("loss", "stored_bytes", "parameters", "kind")
    assert {key: one[key] for key in same} == {key: two[key] for key in same}
    again = lmeff_json("run", config, "--data.tokenizer", folder)["artifacts"]
    assert [row["loss"] for row in again] == [row["loss"] for row in report["artifacts"]]
