"""A prompt and single tokens through the cache are the plain forward pass."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lmeff.core.errors import ConfigError, UsageError
from lmeff.core.numerics import parse_format
from lmeff.core.ops import Numerics
from lmeff.infer import engine as engine_module
from lmeff.infer.engine import decode, make_engine
from lmeff.models.cache import CacheFormat, cache_bytes, parse_cache
from lmeff.models.config import preset
from lmeff.models.transformer import sites
from tests.infer.tiny import MESHES, MODELS, full_logits, pack, rows, served

F32 = CacheFormat(numbers="float32")
LENGTH = 18
PROMPTS = np.array([7, 2, 5, 1], np.int32)  # tokens of each row's prompt
ON = [(name, "one") for name in ("plain", "gqa-untied", "window", "moe", "gpt2", "gemma", "mixed")] + [
    ("mixed", "fsdp2-data2-tensor2"),
    pytest.param("gqa-untied", "data4-tensor2", marks=pytest.mark.slow),
    pytest.param("moe", "expert2-data2-tensor2", marks=pytest.mark.slow),
    pytest.param("uneven", "one", marks=pytest.mark.slow),
]


def replayed(engine, tokens_BT, prompts_B, steps):
    """Logits of each row after its prompt and after each of `steps` more of its own tokens, [steps + 1, B, V]."""
    prompt_BT = np.where(np.arange(prompts_B.max()) < prompts_B[:, None], tokens_BT[:, : prompts_B.max()], 0)
    logits, cache = engine.prefill(prompt_BT, prompts_B)
    found = [np.asarray(logits)]
    for step in range(steps):
        logits, cache = engine.decode(cache, tokens_BT[np.arange(len(tokens_BT)), prompts_B + step])
        found.append(np.asarray(logits))
    return np.stack(found), cache


def at(logits_BTV, prompts_B, steps):
    """The same of whole rows."""
    index = prompts_B - 1 + np.arange(steps + 1)[:, None]
    return logits_BTV[np.arange(len(prompts_B)), index]


@pytest.mark.parametrize(("name", "mesh"), ON, ids=lambda x: x)
def test_prompt_and_tokens_are_the_whole_row(name, mesh):
    model = served(MODELS[name], mesh)
    tokens, steps = rows(64, 4, LENGTH), LENGTH - 7
    engine = make_engine(model, batch=4, length=LENGTH, cache=F32)
    found, cache = replayed(engine, tokens, PROMPTS, steps)
    np.testing.assert_allclose(found, at(full_logits(model, tokens), PROMPTS, steps), atol=1e-5)
    assert np.asarray(cache.length_B).tolist() == (PROMPTS + steps).tolist()
    assert np.abs(found).max() > 1  # the model says something


def test_packed_weights_and_rounded_activations_are_served():
    """Packed matrices exactly; activations on calibrated grids but for what a last bit may send to the next step of a grid."""
    model, tokens = served(MODELS["gqa-untied"]), rows(64, 4, LENGTH)
    packed = dataclasses.replace(model, params=pack(model, "int4/g8"))
    found, _ = replayed(make_engine(packed, batch=4, length=LENGTH, cache=F32), tokens, PROMPTS, 4)
    want = at(full_logits(packed, tokens), PROMPTS, 4)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert np.abs(want - at(full_logits(model, tokens), PROMPTS, 4)).max() > 0.1
    grid = parse_format("int8/tensor")
    numerics = Numerics(tuple((site, grid) for site in sorted(sites(model.cfg))))
    ranges = {site: np.array([[-4.0, 4.0], [-6.0, 6.0]], np.float32) for site in sites(model.cfg) if site != "head"}
    rounded = dataclasses.replace(
        packed, numerics=numerics, ranges={**ranges, "head": np.array([-4.0, 4.0], np.float32)}
    )
    found, _ = replayed(make_engine(rounded, batch=4, length=LENGTH, cache=F32), tokens, PROMPTS, 4)
    assert np.abs(found - at(full_logits(rounded, tokens), PROMPTS, 4)).mean() < 1e-3
    assert np.abs(found - want).mean() > 5e-3


@pytest.mark.parametrize("name", ["window", "uneven"])
def test_a_window_keeps_no_more_than_it_sees(name):
    cfg = MODELS[name]
    engine = make_engine(served(cfg), batch=1, length=LENGTH, cache=F32)
    slots = {stack.k.shape[0]: stack.k.shape[3] for stack in engine.specs.stacks}
    assert slots == {"window": {2: 4}, "uneven": {4: 3, 1: LENGTH}}[name]


def test_several_tokens_at_once_are_single_ones_and_may_be_taken_back():
    model = served(MODELS["window"])
    tokens, chunk = rows(64, 2, LENGTH), 4
    engine = make_engine(model, batch=2, length=LENGTH, cache=F32, chunk=chunk)
    full = full_logits(model, tokens)
    _, cache = engine.prefill(tokens[:, :5], [5, 3])
    length = np.array([5, 3])
    for counts in ([4, 4], [1, 3], [4, 2], [0, 4]):
        wrong = np.array(tokens)  # what is taken back was something else
        for row, (n, count) in enumerate(zip(length, counts, strict=True)):
            wrong[row, n + count :] = (wrong[row, n + count :] + 1) % 64
        offered = np.stack([own[n : n + chunk] for own, n in zip(wrong, length, strict=True)])
        logits, cache = engine.extend(cache, offered, np.full(2, chunk))
        for row, count in enumerate(counts):
            got = np.asarray(logits)[row, :count]
            np.testing.assert_allclose(got, full[row, length[row] : length[row] + count], atol=1e-5)
        length = length + counts
        cache = cache.taken_back(length)


@pytest.mark.parametrize(("name", "mesh"), [("gqa-untied", "one"), ("mixed", "one"), ("gqa-untied", "data4-tensor2")])
def test_a_step_writes_in_place(name, mesh):
    model = served(MODELS[name], mesh)
    engine = make_engine(model, batch=4, length=1024, cache=F32)
    devices = model.layout.mesh.size
    weights = (model.params, model.ranges)
    specs = engine.specs
    compiled = decode.lower(engine.program, weights, specs, np.zeros(4, np.int32)).compile()
    memory, held = compiled.memory_analysis(), cache_bytes(engine.specs) // devices
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held
    stacks = {tuple(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(specs.stacks)}
    copied = re.findall(r"f32\[([\d,]+)\][^=]* copy\(", compiled.as_text())
    assert not stacks & {tuple(map(int, shape.split(","))) for shape in copied}
    gathered = re.findall(r"f32\[([\d,]+)\][^=]* all-(?:gather|to-all)\(", compiled.as_text())
    assert not any(len(shape.split(",")) >= 4 for shape in gathered)


def test_steps_are_compiled_once_and_prompts_in_few_widths(monkeypatch):
    traced = []
    forward = engine_module.forward

    def counting(params, batch, cfg, **how):
        traced.append(batch.tokens.shape)
        return forward(params, batch, cfg, **how)

    monkeypatch.setattr(engine_module, "forward", counting)
    engine = make_engine(served(preset("tiny", ffn=48)), batch=2, length=64, cache=F32)
    for width in (3, 9, 16, 17, 30):
        logits, cache = engine.prefill(rows(64, 2, width), [width, 1])
        for _ in range(3):
            logits, cache = engine.decode(cache, np.asarray(logits).argmax(-1))
    assert sorted(traced) == [(2, 1), (2, 16), (2, 32)]


@pytest.mark.parametrize("name", ["moe", pytest.param("mixed", marks=pytest.mark.slow)])
def test_rows_do_not_know_their_neighbours(name):
    model, tokens = served(MODELS[name]), rows(64, 4, LENGTH)
    together, _ = replayed(make_engine(model, batch=4, length=LENGTH, cache=F32), tokens, PROMPTS, 6)
    single = make_engine(model, batch=1, length=LENGTH, cache=F32)
    for row in range(4):
        alone, _ = replayed(single, tokens[row : row + 1], PROMPTS[row : row + 1], 6)
        np.testing.assert_allclose(together[:, row], alone[:, 0], atol=1e-5)
        np.testing.assert_array_equal(together[:, row].argmax(-1), alone[:, 0].argmax(-1))


@pytest.mark.parametrize(
    ("text", "worst"),
    [
        ("int8", 0.06),
        ("int4/channel4", 1.0),
        pytest.param("bfloat16", 0.03, marks=pytest.mark.slow),
        pytest.param("int8/channel4", 0.06, marks=pytest.mark.slow),
        pytest.param("int4", 1.0, marks=pytest.mark.slow),
    ],
)
def test_rounded_caches_are_near(text, worst):
    model, tokens = served(MODELS["window"]), rows(64, 4, LENGTH)
    found, _ = replayed(make_engine(model, batch=4, length=LENGTH, cache=parse_cache(text)), tokens, PROMPTS, 11)
    want = at(full_logits(model, tokens), PROMPTS, 11)
    np.testing.assert_allclose(found[0], want[0], atol=1e-5)  # a prompt sees itself before it is rounded
    error = np.abs(found - want)
    assert 1e-4 < error.max() < worst * np.abs(want).max()


def test_what_cannot_be_served_is_refused():
    model = served(preset("tiny"))
    with pytest.raises(ConfigError, match="length: got rows of 0 tokens"):
        make_engine(model, batch=1, length=0, cache=F32)
    with pytest.raises(ConfigError, match="chunks of 9 tokens, expected at most the block of 8"):
        make_engine(model, batch=1, length=32, cache=parse_cache("int8/channel8"), chunk=9)
    with pytest.raises(ConfigError, match="which does not divide K = 1 over tensor = 2"):
        make_engine(served(preset("tiny", kv_heads=1), "data4-tensor2"), batch=4, length=8, cache=F32)
    with pytest.raises(ConfigError, match="batch: got 3 rows, expected a multiple of 4"):
        make_engine(served(preset("tiny"), "data4-tensor2"), batch=3, length=8, cache=F32)
    with pytest.raises(UsageError, match=r"prefill: got tokens \[1, 4\] and lengths \[5\]"):
        make_engine(model, batch=1, length=8, cache=F32).prefill(rows(64, 1, 4), [5])
    with pytest.raises(UsageError, match="got 9 tokens, expected at most 8"):
        make_engine(model, batch=1, length=8, cache=F32).prefill(rows(64, 1, 9), [9])


@pytest.mark.parametrize("axis", ["pipe", "context"])
def test_meshes_that_cut_layers_or_rows_are_refused(axis, monkeypatch):
    monkeypatch.setitem(MESHES, axis, type(MESHES["one"])(**{axis: 2}))
    with pytest.raises(ConfigError, match=f"mesh.{axis}: got 2 for inference"):
        make_engine(served(preset("tiny"), axis), batch=4, length=8, cache=F32)
