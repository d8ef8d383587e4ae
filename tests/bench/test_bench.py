"""What is timed is what is told: turns of a scripted clock become known medians, and a slow format is named in words."""

import dataclasses
import functools
import io
import json
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from lmeff.bench import measure
from lmeff.bench.measure import CHIPS, KIND_OF_CHIP, Contestant, Quartiles, Result, Run, Shape, bench, quartiles
from lmeff.bench.show import print_result
from lmeff.bench.stream import Rate, make_stream
from lmeff.bench.traffic import Traffic
from lmeff.bench.variants import make_variants, random_model
from lmeff.bench.words import words
from lmeff.core.errors import ConfigError, UsageError
from lmeff.core.numerics import is_qtensor
from lmeff.core.precision import Policy
from lmeff.models.config import ModelConfig
from lmeff.parallel.mesh import MeshPlan, make_layout

CFG = ModelConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, ffn=64)
SMALL = 1 << 16


@functools.cache
def model(devices=1, **plan):
    return random_model(CFG, make_layout(MeshPlan(**plan), jax.devices()[:devices]), Policy())


@pytest.fixture
def scripted(monkeypatch):
    """Formats and streams whose seconds are known."""
    order = []
    seconds = {"f32": iter([4.0, 2.0, 3.0]), "int8": iter([6.0, 6.0, 7.0])}
    rates = iter([Rate(50.0, 100.0), Rate(300.0, 10.0), Rate(200.0, 10.0)])

    def contestant(engine, shape):
        name = "int8" if is_qtensor(engine.served.params["blocks"]["mlp"]["up"]) else "f32"

        def turn():
            order.append(name)
            return next(seconds[name])

        return Contestant(turn, Traffic(stored=900.0, weights=100.0, cache=20.0 if name == "f32" else 5.0), 1.5)

    def stream():
        order.append("stream")
        return next(rates)

    monkeypatch.setattr(measure, "_decoding", contestant)
    monkeypatch.setattr(measure, "_prefilling", contestant)
    monkeypatch.setattr(measure, "make_stream", lambda device, size: stream)
    return order


def test_the_numbers_follow_from_the_turns(scripted):
    result = bench("decode", make_variants(model(), ["f32", "int8"]), Shape(batch=2, context=8, tokens=10, turns=3))
    assert scripted == ["stream", "f32", "int8"] * 3
    assert result.bandwidth == Quartiles(200.0, 150.0, 250.0)
    f32, int8 = result.runs
    assert f32.ms == Quartiles(300.0, 250.0, 350.0)  # of ten steps
    assert f32.tokens_per_second == pytest.approx(2 * 10 / 3)
    assert f32.bytes_per_second == pytest.approx(120 * 10 / 3)
    assert f32.bandwidth_share == pytest.approx(2.0)
    assert int8.ratio == pytest.approx(0.5)
    assert (int8.read, int8.cache, int8.stored, int8.compile_seconds) == (100, 5, 900, 1.5)
    assert f32.table_share is f32.flops_per_second is f32.peak_share is result.chip is None


def test_prefill_tells_its_arithmetic(scripted, monkeypatch):
    monkeypatch.setitem(KIND_OF_CHIP, "cpu", "h100")
    result = bench("prefill", make_variants(model(), ["f32", "int8"]), Shape(batch=2, context=8, turns=3))
    f32 = result.runs[0]
    assert f32.tokens_per_second == pytest.approx(16 / 3)
    assert f32.ms.median == pytest.approx(3000 / 16)
    assert f32.flops_per_second == pytest.approx(measure.prefill_flops(CFG, 2, 8) / 3)
    assert f32.peak_share == pytest.approx(f32.flops_per_second / CHIPS["h100"].rate("float32"))
    assert f32.table_share == pytest.approx(120 / 3 / CHIPS["h100"].bandwidth)
    assert result.chip == "h100"


@pytest.mark.parametrize("kind", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_a_real_run(kind):
    variants = make_variants(model(), ["f32", "int4/g32+table@int8", "bf16", "bf16@int4/channel4"])
    result = bench(kind, variants, Shape(batch=2, context=5, tokens=3, turns=2), stream_size=SMALL)
    told = json.loads(json.dumps(result.to_json()))
    assert [run["name"] for run in told["runs"]] == list(variants)
    assert told["runs"][0]["ratio"] == 1
    for run, own in zip(told["runs"], result.runs, strict=True):
        assert run["ms"]["low"] <= run["ms"]["median"] <= run["ms"]["high"]
        assert run["tokens_per_second"] > 0
        assert run["bandwidth_share"] > 0
        assert own.compile_seconds > 1e-3 * own.ms.median
    assert told["runs"][1]["read"] < 0.4 * told["runs"][0]["read"]
    assert told["shape"] == {"batch": 2, "context": 5, "tokens": 3, "turns": 2}


def test_a_turn_decodes_what_generation_does():
    """The cache is taken back between turns: the last tokens of a turn are those of the turn before."""
    variant = make_variants(model(), ["f32"])["f32"]
    shape = Shape(batch=2, context=5, tokens=4)
    engine = measure.make_engine(variant.served, batch=2, length=9, cache=variant.cache)
    seen = []

    def decode(cache, tokens_B):
        seen.append((np.asarray(cache.length_B).tolist(), np.asarray(tokens_B).tolist()))
        return engine.decode(cache, tokens_B)

    one = measure._decoding(engine._replace(decode=decode), shape)
    seen.clear()
    one.turn()
    first = list(seen)
    seen.clear()
    one.turn()
    assert seen == first
    assert [lengths for lengths, _ in first] == [[5, 5], [6, 6], [7, 7], [8, 8]]


@pytest.mark.slow
def test_a_mesh():
    result = bench(
        "decode",
        make_variants(model(4, data=2, tensor=2), ["f32", "int8"]),
        Shape(batch=2, context=4, tokens=2, turns=1),
        stream_size=SMALL,
    )
    assert result.mesh == "data 2 x tensor 2"
    assert result.runs[0].stored == 4 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) / 2 + 5 * 32 + 64 * 32 / 2)


def run(name, ratio, low, high, **changes):
    fields = dict.fromkeys((field.name for field in dataclasses.fields(Run)), 1.0)
    ms = Quartiles((low + high) / 2, low, high)
    return Run(
        **{
            **fields,
            "name": name,
            "ms": ms,
            "ratio": ratio,
            "table_share": None,
            "flops_per_second": None,
            "peak_share": None,
            **changes,
        }
    )


def result(*runs, kind="decode", chip=None):
    bandwidth = Quartiles(20e9, 19e9, 21e9)
    return Result(kind=kind, shape=Shape(), device="cpu", mesh="one device", runs=runs, bandwidth=bandwidth, chip=chip)


def test_a_slower_format_is_never_silent():
    told = words(
        result(
            run("f32", 1, 9, 11),
            run("int8", 2, 4, 6),
            run("int4", 0.5, 19, 21),
            run("bf16", 0.9, 10, 12),
            run("int2", 1.1, 8, 10),
        )
    )
    assert len(told) == 4
    assert "20.0 GB/s" in told[0]
    assert re.match(r"int4 is SLOWER than f32 here: 0.50 times its speed \(20 against 10 ms a token\)", told[1])
    assert "noise" not in told[1]
    assert re.match(r"bf16 is SLOWER .*it may be noise", told[2])
    assert re.match(r"int2 is not told apart from f32", told[3])


def shown(width, *runs, **fields):
    console = Console(width=width, file=io.StringIO())
    print_result(result(*runs, **fields), console)
    return console.file.getvalue().splitlines()


def test_the_table_has_a_column_for_what_is_known():
    every = run("f32", 1, 9, 11, flops_per_second=2e12, peak_share=0.5, table_share=0.25)
    plain, full = shown(200, run("f32", 1, 9, 11)), shown(200, every, kind="prefill", chip="h100")
    heads = ("TFLOP/s", "of peak", "of sheet")
    assert [head in plain[1] for head in heads] == [False] * 3
    assert [head in full[1] for head in heads] == [True] * 3
    assert re.search(r"^f32 +1.0 +10 +9 - 11 .* 2 +50% +0.0 +100% +25% ", full[3])


def test_the_table_fits_a_narrow_terminal_whole():
    lines = shown(80, run("int4/g32", 1, 9, 11, flops_per_second=2e12), kind="prefill")
    assert all(len(line) <= 80 for line in lines[1:4])
    assert re.search(r"int4/g32 +1.0 +10 .* 2 +0.0 +100% +1.00", lines[3])
    assert not any("…" in line for line in lines)


def test_a_stream_measures_what_it_moves(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0] * 2)
    from lmeff.bench import stream

    monkeypatch.setattr(stream.time, "perf_counter", lambda: next(ticks))
    turn = make_stream(jax.devices()[0], SMALL)
    assert turn() == Rate(SMALL / 1.0, 2 * SMALL / 2.0)


@pytest.mark.parametrize("kind", KIND_OF_CHIP)
def test_chips_that_jax_names_are_in_the_table(kind):
    assert KIND_OF_CHIP[kind] in CHIPS


def test_what_cannot_be_timed_is_refused():
    variants = make_variants(model(), ["f32"])
    with pytest.raises(UsageError, match="got 'train', expected one of decode, prefill"):
        bench("train", variants)
    with pytest.raises(UsageError, match="got no format"):
        bench("decode", {})
    with pytest.raises(UsageError, match="tokens: got 0"):
        Shape(tokens=0)
    with pytest.raises(ConfigError, match="batch"):
        bench("decode", make_variants(model(2, data=2), ["f32"]), Shape(batch=3))


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == Quartiles(3.0, 2.0, 4.0)
