"""Memory of the Llama-3-8B train step on TPUs that are not here: compiles lmeff's own step and reads what the compiler reserves.

PYTHONPATH=. python experiments/tpu_memory/run.py [--topology v5e:4x4 ...] [--json results.jsonl]
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from rich.console import Console
from rich.table import Table

from lmeff.models.config import preset
from lmeff.parallel.devices import parse_topology
from lmeff.parallel.mesh import MeshPlan
from lmeff.plan.job import Job, Shape
from lmeff.plan.verify import verify

BARS = {"v5e:4x4": 6.1, "v5p:4x4x4": 5.2, "v5e:16x16": 5.1}  # GiB of temporaries a chip
TOKENS = 4096
PRECISION = "params=float32,compute=bfloat16,output=bfloat16,state=float32"
GIB = 2**30


def measure(name: str, shape: str) -> dict[str, Any]:
    """Compiles the step for a topology, one row a chip, everything cut over all chips, the block's input alone kept."""
    chips = parse_topology(name).devices
    found = verify(
        Job(
            name=shape,
            student=Shape(cfg=preset(shape)),
            precision=PRECISION,
            mesh=MeshPlan(fsdp=chips),
            devices=chips,
            rows=chips,
            tokens=TOKENS,
            remat="full",
        ),
        name,
    )
    return {
        "topology": name,
        "shape": shape,
        "arguments_gib": round(found.argument / GIB, 3),
        "temporary_gib": round(found.temp / GIB, 3),
        "peak_gib": round(((found.peak or 0) - found.argument) / GIB, 3),
        "compile_seconds": round(found.seconds),
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
