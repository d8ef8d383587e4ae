"""What one GPU does with lmeff: packed products checked, decoding checked, a train step, decoding and prefill timed. See README.md.

    python experiments/gpu/run.py [--json results.jsonl] [--seconds 300] [--parts device products ...] [--models 125m 1b]

Each part stands alone: one that fails is told and the rest goes on. A part that would begin after `--seconds` is left out and told, too. Nothing here
imports the command line or the data pipeline, so tyro, grain and cattrs need not be installed.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmeff.bench.measure import Shape, bench, chip_of
from lmeff.bench.traffic import weight_bytes
from lmeff.bench.variants import make_variant, make_variants, random_model
from lmeff.bench.words import words
from lmeff.compress.base import identity
from lmeff.core.batch import Batch
from lmeff.core.numerics import QFormat, QTensor, parse_format, quantize
from lmeff.core.ops import FLOATING, Numerics
from lmeff.core.precision import Policy, parse
from lmeff.core.specs import count
from lmeff.distill.objectives import Projection, head_objective
from lmeff.infer.engine import make_engine
from lmeff.models.config import preset
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import Layout, MeshPlan, make_layout
from lmeff.parallel.rows import place_batch
from lmeff.parallel.seam import layout_ops
from lmeff.plan import flops
from lmeff.train.loop import compile_step
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import create_state

Record = dict[str, Any]
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "numpy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is run, and how large. trained: the model of the train step, on `rows` rows of `tokens` tokens. sizes: [M, D, F] of the products."""

    models: tuple[str, ...] = ("125m", "1b")
    formats: tuple[str, ...] = ("bf16", "int8", "int4/g32", "int4/g32+table")
    batches: tuple[int, ...] = (1, 16)
    context: int = 512
    decoded: int = 64
    turns: int = 7
    trained: str = "125m"
    rows: int = 16
    tokens: int = 1024
    steps: int = 10
    sizes: tuple[tuple[int, int, int], ...] = ((1, 2048, 8192), (16, 2048, 8192), (512, 1024, 2048), (3, 43, 70))


TINY = Options(
    models=("tiny",),
    formats=("bf16", "int4/g32+table"),
    batches=(1, 2),
    context=8,
    decoded=3,
    turns=2,
    trained="tiny",
    rows=2,
    tokens=16,
    steps=2,
    sizes=((5, 64, 96), (3, 43, 70)),
)


def device(options: Options) -> Iterator[Record]:
    """What this machine is."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    first = jax.devices()[0]
    chip = chip_of(first)
    yield {
        "devices": len(jax.devices()),
        "kind": first.device_kind,
        "platform": first.platform,
        "chip": None if chip is None else chip.name,
        "memory": (first.memory_stats() or {}).get("bytes_limit"),
        "python": platform.python_version(),
        "versions": found,
    }


def products(options: Options) -> Iterator[Record]:
    """Products with packed weights, through the seam that models use, against float64 in NumPy: the largest error over the sum of magnitudes."""
    layout = one_device()
    rng = np.random.default_rng(0)
    for m, d, f in options.sizes:
        x = rng.standard_normal((1, m, d)).astype(np.float32)
        w = rng.standard_normal((d, f)).astype(np.float32)
        for text in ("int8", "int4", "int4/g32", "int8-affine/g64"):
            packed = jax.jit(lambda w, text=text: quantize(w, parse_format(text), (-2,)))(w)
            codes = Numerics((("mlp.up", QFormat(bits=8)),))
            for dtype, formats in ((jnp.float32, FLOATING), (jnp.bfloat16, FLOATING), (jnp.bfloat16, codes)):
                yield product(layout, jnp.asarray(x, dtype), packed, formats)


def product(layout: Layout, x_BTD: jax.Array, w: QTensor, formats: Numerics) -> Record:
    """One of them. Errors: half a unit in the last place of a bfloat16 output or operand, or TF32's of operands, each with room for sums."""

    def run(x: jax.Array, w: QTensor) -> jax.Array:
        return layout_ops(layout, formats)({}).ops.einsum("BTD,DF->BTF", x, w, site="mlp.up")

    found = np.asarray(jax.jit(run)(x_BTD, w), np.float64)[0]
    format = formats.at("mlp.up")
    operand = x_BTD if format is None else jax.jit(lambda x: quantize(x.astype(jnp.float32), format, (-1,)))(x_BTD)
    left = (values(operand) if isinstance(operand, QTensor) else np.asarray(operand, np.float64))[0]
    right = values(w)
    magnitude = np.abs(left) @ np.abs(right)
    error = float((np.abs(found - left @ right) / magnitude).max())
    limit = 2**-7 if x_BTD.dtype == jnp.bfloat16 else 2**-10
    return {
        "shape": [*found.shape, left.shape[-1]],
        "weights": str(w.format),
        "dtype": x_BTD.dtype.name,
        "activations": None if format is None else str(format),
        "error": error,
        "limit": limit,
        "ok": error < limit,
    }


def values(t: QTensor) -> np.ndarray:
    """`(q - zero) * scale` in float64, from its definition: each number of the last contracted dim shares the scale of its group."""

    def spread(x: Any) -> np.ndarray:
        x = np.asarray(x, np.float64)
        if t.format.granularity != "group":
            return x
        return np.repeat(x, t.format.group or 1, axis=t.axes[-1]).take(np.arange(t.shape[t.axes[-1]]), axis=t.axes[-1])

    codes = np.asarray(t.q.astype(jnp.int8), np.float64)
    return (codes - (0 if t.zero is None else spread(t.zero))) * spread(t.scale)


def decoding(options: Options) -> Iterator[Record]:
    """Logits token by token from a cache, against those of one prompt: float32, and with packed weights."""
    cfg = preset("small")
    served = random_model(cfg, one_device(), Policy())
    ids = np.random.default_rng(1).integers(0, cfg.vocab, (2, 24), dtype=np.int32)
    for text in ("f32@float32", "f32@int8", "int4/g32@float32"):
        variant = make_variant(served, text)
        engine = make_engine(variant.served, batch=2, length=24, cache=variant.cache)
        whole_BV, _ = engine.prefill(ids, np.full(2, 24))
        _, cache = engine.prefill(ids[:, :16], np.full(2, 16))
        logits_BV = whole_BV
        for t in range(16, 24):
            logits_BV, cache = engine.decode(cache, ids[:, t])
        error = float(jnp.abs(logits_BV - whole_BV).max() / jnp.abs(whole_BV).max())
        limit = 0.1 if "@int8" in text else 0.02
        yield {"format": text, "error": error, "limit": limit, "ok": error < limit}


def train(options: Options) -> Iterator[Record]:
    """A train step in bfloat16 with float32 parameters: tokens a second, and the share of the chip's peak (MFU)."""
    cfg, layout = preset(options.trained), one_device()
    policy, specs = parse("params=float32,compute=bfloat16"), param_specs(cfg)
    tx = make_optimizer(OptimConfig(), 1000, policy=policy, specs=specs)
    rt = Runtime(
        student=Model(cfg),
        teacher=None,
        specs=specs,
        compression=identity(),
        objective=head_objective(Projection(cfg)),
        tx=tx,
        layout=layout,
        policy=policy,
        steps=1000,
    )
    state = create_state(random_model(cfg, layout, policy).params, specs, rt.compression, tx, layout, ema=False)
    batch = place_batch(documents(cfg.vocab, options.rows, options.tokens), layout)
    start = time.perf_counter()
    step = compile_step(rt, state, batch, Frozen())
    compiling = time.perf_counter() - start
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, Frozen())
        losses.append(float(metrics["loss"]))
    start = time.perf_counter()
    for _ in range(options.steps):
        state, metrics = step(state, batch, Frozen())
    losses.append(float(metrics["loss"]))
    seconds = (time.perf_counter() - start) / options.steps
    rate = options.rows * options.tokens / seconds
    each = flops.palm_per_token(count(specs), cfg.layers, cfg.heads, cfg.head_size, options.tokens)
    chip = chip_of(jax.devices()[0])
    yield {
        "model": options.trained,
        "rows": options.rows,
        "tokens": options.tokens,
        "tokens_per_second": rate,
        "ms_per_step": 1e3 * seconds,
        "mfu": None if chip is None else flops.mfu(rate, each, 1, chip.rate("bfloat16")),
        "flops_per_second": rate * each,
        "compile_seconds": compiling,
        "losses": losses,
        "ok": losses[-1] < losses[0],
    }


def documents(vocab: int, rows: int, tokens: int) -> Batch:
    """Random rows of one document each."""
    ids = np.random.default_rng(0).integers(0, vocab, (rows, tokens + 1), dtype=np.int32)
    ones = np.ones((rows, tokens), np.int32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), ones.shape)
    return Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))


def serving(options: Options, name: str) -> Iterator[Record]:
    """Decoding and prefill of a model of random weights, formats in turn; batch by batch."""
    served = random_model(preset(name), one_device(), parse("params=bfloat16,compute=bfloat16,output=bfloat16"))
    variants = make_variants(served, options.formats)
    del served
    for batch in options.batches:
        for kind in ("decode", "prefill"):
            shape = Shape(batch=batch, context=options.context, tokens=options.decoded, turns=options.turns)
            result = bench(kind, variants, shape)
            sizes = {text: weight_bytes(own.served.params) for text, own in variants.items()}
            yield {"model": name, **result.to_json(), "weight_bytes": sizes, "words": words(result)}


def one_device() -> Layout:
    """The first device alone."""
    return make_layout(MeshPlan(), jax.devices()[:1])


def told(record: Record) -> str:
    """A record in one line, its runs below it."""
    short = {
        key: value for key, value in record.items() if key not in ("runs", "words", "weight_bytes", "shape", "losses")
    }
    text = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in short.items()
    )
    for run in record.get("runs", ()):
        table = "" if run["table_share"] is None else f", {run['table_share']:.0%} of the sheet's"
        text += (
            f"\n    {run['name']:16} {run['tokens_per_second']:>12,.1f} tokens/s {run['ms']['median']:>9.4f} ms/token "
            f"({run['ms']['low']:.4f} to {run['ms']['high']:.4f}) {run['bytes_per_second'] / 1e9:>8.1f} GB/s, {run['bandwidth_share']:.0%} of measured"
            f"{table}, x{run['ratio']:.2f}, compiled in {run['compile_seconds']:.1f} s"
        )
    return "\n    ".join([text, *record.get("words", ())])


def parts(options: Options) -> dict[str, Callable[[], Iterator[Record]]]:
    """All parts by name, the shortest first."""
    found = {name: lambda part=part: part(options) for name, part in PARTS.items()}
    return found | {f"serving-{model}": lambda model=model: serving(options, model) for model in options.models}


PARTS = {"device": device, "products": products, "decoding": decoding, "train": train}


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; 1 where one failed or was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.jsonl"), help="file to append a line for each record to")
    parser.add_argument("--seconds", type=float, default=300, help="no part begins later than this")
    parser.add_argument("--parts", nargs="*", help="only these")
    parser.add_argument("--models", nargs="*", help="presets to decode with")
    parser.add_argument("--tiny", action="store_true", help="all parts at sizes of a test")
    args = parser.parse_args(argv)
    options = TINY if args.tiny else Options()
    if args.models is not None:
        options = Options(**{**vars(options), "models": tuple(args.models)})
    chosen = parts(options)
    if unknown := sorted(set(args.parts or ()) - chosen.keys()):
        parser.error(f"--parts: got {', '.join(unknown)}, expected some of {', '.join(chosen)}")
    start, failed = time.perf_counter(), []
    with args.json.open("a") as file:
        for name in args.parts or chosen:
            failed += [name] * run_part(name, chosen[name], args.seconds - (time.perf_counter() - start), file)
    print(
        f"{time.perf_counter() - start:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'all parts ran'}",
        flush=True,
    )
    return int(bool(failed))


def run_part(name: str, part: Callable[[], Iterator[Record]], left: float, file: Any) -> bool:
    """Runs one part and writes its records as they come; whether it failed, was wrong or was left out."""
    print(f"\n== {name}", flush=True)
    start, bad = time.perf_counter(), 0

    def write(record: Record) -> None:
        whole = {"part": name, "after": round(time.perf_counter() - start, 2), **record}
        print(told(record), flush=True)
        file.write(json.dumps(whole) + "\n")
        file.flush()

    if left <= 0:
        write({"left_out": "its time was over", "ok": False})
        return True
    try:
        for record in part():
            write(record)
            bad += not record.get("ok", True)
    except Exception as error:  # whatever a GPU may say; the other parts do not depend on it
        traceback.print_exc(file=sys.stdout)
        write({"error": f"{type(error).__name__}: {error}", "ok": False})
        return True
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
