"""The script for a GPU runs all its parts on a CPU at the size of a test, and outlives a part that fails."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments/gpu/run.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_run"]


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_all_parts_run(script, tmp_path):
    file = tmp_path / "gpu.jsonl"
    assert script.main(["--tiny", "--json", str(file)]) == 0
    found = {}
    for record in records(file):
        found.setdefault(record["part"], []).append(record)
    assert list(found) == ["device", "products", "decoding", "train", "serving-tiny"]
    assert {record["weights"] for record in found["products"]} == {"int8", "int4", "int4/g32", "int8-affine/g64"}
    assert {record["activations"] for record in found["products"]} == {None, "int8"}
    assert all(record["ok"] for part in ("products", "decoding", "train") for record in found[part])
    assert [(record["kind"], record["shape"]["batch"]) for record in found["serving-tiny"]] == [
        (kind, batch) for batch in (1, 2) for kind in ("decode", "prefill")
    ]


def test_a_part_that_fails_is_told_and_the_rest_goes_on(script, tmp_path, monkeypatch, capsys):
    def broken(options):
        yield {"first": 1}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(script.PARTS, "products", broken)
    monkeypatch.setitem(script.PARTS, "decoding", lambda options: iter([{"error": 0.5, "ok": False}]))
    monkeypatch.setitem(script.PARTS, "train", lambda options: iter([{"ok": True}]))
    file = tmp_path / "gpu.jsonl"
    names = ("device", "products", "decoding", "train")
    assert script.main(["--tiny", "--json", str(file), "--parts", *names]) == 1
    told = records(file)
    assert [record["part"] for record in told] == ["device", "products", "products", "decoding", "train"]
    assert told[2]["error"] == "RuntimeError: no such kernel"
    out = capsys.readouterr().out
    assert "no such kernel" in out
    assert "failed: products, decoding" in out


def test_a_part_that_would_begin_too_late_is_left_out_and_told(script, tmp_path):
    file = tmp_path / "gpu.jsonl"
    assert script.main(["--tiny", "--json", str(file), "--parts", "device", "--seconds", "0"]) == 1
    assert records(file)[0]["left_out"] == "its time was over"


def test_wrong_numbers_of_a_product_are_seen(script, monkeypatch):
    import jax.numpy as jnp

    from lmeff.core.numerics import parse_format, quantize

    x = jnp.linspace(-1, 1, 64).reshape(1, 2, 32)
    w = quantize(jnp.sin(jnp.arange(32 * 8.0)).reshape(32, 8), parse_format("int4/g16"), (-2,))
    assert script.product(script.one_device(), x, w, script.FLOATING)["ok"]
    right = script.values
    monkeypatch.setattr(script, "values", lambda t: right(t) * 1.1)
    assert not script.product(script.one_device(), x, w, script.FLOATING)["ok"]


@pytest.mark.slow
def test_what_it_imports_needs_no_command_line_or_data_pipeline():
    block = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('tyro', 'grain', 'cattrs'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"import runpy; runpy.run_path({str(SCRIPT)!r})\n"
    )
    root = SCRIPT.parents[2]
    done = subprocess.run([sys.executable, "-c", block], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
