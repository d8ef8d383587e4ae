"""Memory of the Llama-3-8B train step on TPUs that are not here: compiles lmeff's own step and reads what the compiler reserves.

PYTHONPATH=. python experiments/tpu_memory/run.py [--topology v5e:4x4 ...] [--json results.jsonl]
"""

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from rich.console import Console
from rich.table import Table

from lmeff.core.precision import parse
from lmeff.models.config import preset
from lmeff.parallel.devices import topology
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.train.loop import compile_step
from lmeff.train.optim import OptimConfig
from lmeff.train.runtime import Frozen, plain_runtime
from lmeff.train.state import abstract_batch, abstract_state

BARS = {"v5e:4x4": 6.1, "v5p:4x4x4": 5.2, "v5e:16x16": 5.1}  # GiB of temporaries a chip
TOKENS = 4096
PRECISION = "params=float32,compute=bfloat16,output=bfloat16,state=float32"
GIB = 2**30


def measure(name: str, shape: str) -> dict[str, Any]:
    """Compiles the step for a topology, one row a chip, everything cut over all chips, the block's input alone kept."""
    devices = topology(name)
    layout = make_layout(MeshPlan(fsdp=len(devices)), devices)
    rt = plain_runtime(preset(shape), layout, OptimConfig(), policy=parse(PRECISION), remat="full")
    state = abstract_state(rt.specs, rt.compression, rt.tx, layout)
    began = time.perf_counter()
    memory = compile_step(rt, state, abstract_batch(len(devices), TOKENS, layout), Frozen()).memory_analysis()
    return {
        "topology": name,
        "shape": shape,
        "arguments_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temporary_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "peak_gib": round((memory.peak_memory_in_bytes - memory.argument_size_in_bytes) / GIB, 3),
        "compile_seconds": round(time.perf_counter() - began),
        "versions": {p: version(p) for p in ("jax", "libtpu")} | {"python": sys.version.split()[0]},
    }


def main() -> None:
    """Parses the command line, compiles for each topology, prints, and appends to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--topology", action="append", help="FAMILY:SHAPE[:SLICES]; the three of the README where none is given"
    )
    parser.add_argument("--shape", default="llama3_8b", help="a preset")
    parser.add_argument("--json", type=Path, help="file to append a line of results to for each topology")
    args = parser.parse_args()
    table = Table("topology", "arguments GiB", "temporaries GiB", "bar", "peak above arguments GiB", "compile s")
    for name in args.topology or BARS:
        row = measure(name, args.shape)
        table.add_row(
            name,
            *(str(row[key]) for key in ("arguments_gib", "temporary_gib")),
            str(BARS.get(name, "-")),
            *(str(row[key]) for key in ("peak_gib", "compile_seconds")),
        )
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        jax.clear_caches()
    Console().print(table)


if __name__ == "__main__":
    main()
