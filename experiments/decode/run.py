"""Decoding and prefill of random models on this machine, format by format. See README.md.

    python experiments/decode/run.py [--shape 7m 125m] [--formats f32 int8 ...] [--caches float32 int8 ...] [--json results.jsonl]

Formats take turns within one process; the memory's bandwidth is measured in the same turns.
"""

import argparse
import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from lmeff.bench.measure import KINDS, Result, Shape, bench
from lmeff.bench.show import print_result
from lmeff.bench.variants import make_variants, random_model
from lmeff.core.precision import Policy
from lmeff.models.config import ModelConfig, preset
from lmeff.parallel.mesh import MeshPlan, make_layout

SHAPES = {
    "tiny": preset("tiny"),
    "7m": ModelConfig(vocab=4096, width=256, layers=6, heads=8, kv_heads=8, ffn=688),
    "125m": preset("125m"),
}
FORMATS = ("f32", "bf16", "int8", "int4", "int4/g32", "int8+table", "int4/g32+table")
CACHES = ("float32", "bfloat16", "int8", "int4", "int8/channel", "int4/channel")


def line(name: str, result: Result) -> dict[str, Any]:
    """A line of results: the benchmark's own object, and where it ran."""
    where = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    versions = {"jax": version("jax"), "python": platform.python_version()}
    return {"date": datetime.date.today().isoformat(), "model": name, **result.to_json(), **where, **versions}


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, measures, prints, and appends to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["7m", "125m"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["decode"])
    parser.add_argument(
        "--formats", nargs="*", default=FORMATS, help="of weights; the first is what others are compared with"
    )
    parser.add_argument("--caches", nargs="*", default=CACHES, help="of keys and values, under weights in float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--long", type=int, default=1024, help="the same, where caches are compared")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file to append lines of results to")
    args = parser.parse_args(argv)
    console = Console(width=180)
    for name in args.shape:
        served = random_model(SHAPES[name], make_layout(MeshPlan()), Policy())
        compared = [(args.formats, args.context), ([f"f32@{cache}" for cache in args.caches], args.long)]
        for formats, context in compared:
            for kind in args.kinds if formats else ():
                shape = Shape(batch=args.batch, context=context, tokens=args.tokens, turns=args.turns)
                result = bench(kind, make_variants(served, formats), shape)
                console.print(f"\n{name}")
                print_result(result, console)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(line(name, result)) + "\n")


if __name__ == "__main__":
    main()
