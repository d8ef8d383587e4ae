"""What the planner predicts of a train step's memory, beside what the compiler reserves for it: on the CPU and for TPUs that are not here.

PYTHONPATH=. python experiments/planner_vs_compiler/run.py [--case NAME ...] [--kind cpu|held_out|tpu] [--no-compile]
Appends to results.jsonl, skips what is there, and prints the table; `--no-compile` predicts anew for the numbers that are there.
"""

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
from rich.console import Console
from rich.table import Table

from lmeff.parallel.devices import topology
from lmeff.plan.job import Job
from lmeff.plan.state import state_bytes
from lmeff.plan.temporaries import reported_bytes, temporary_bytes
from tests.plan.cases import CPU, HELD_OUT, TPU, memory

RESULTS = Path(__file__).with_name("results.jsonl")
MIB = 2**20
KINDS: dict[str, dict[str, tuple[str | None, Job]]] = {
    "cpu": {name: (None, job) for name, job in CPU.items()},
    "held_out": {name: (None, job) for name, job in HELD_OUT.items()},
    "tpu": TPU,
}


def predicted(name: str | None, job: Job) -> dict[str, Any]:
    """MiB: arguments, temporaries by category and as the compiler reports them, and what is live of them."""
    family = None if name is None else name.split(":")[0]
    held = sum(state_bytes(job).values())
    found = {part: size / MIB for part, size in temporary_bytes(job, family=family).items()}
    live = sum(found.values()) - found.get("scratch", 0)
    return {"arguments": held / MIB, "temporaries": reported_bytes(job, family=family) / MIB, "live": live}


def compiled(job: Job, devices: list[Any]) -> dict[str, Any]:
    """MiB, from the compiler: `total` is arguments + outputs - aliases + temporaries."""
    began = time.perf_counter()
    found = memory(job, devices)
    sizes = {kind: getattr(found, f"{kind}_size_in_bytes") / MIB for kind in ("argument", "output", "alias", "temp")}
    total = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    more = {"peak": found.peak_memory_in_bytes / MIB, "code": found.generated_code_size_in_bytes / MIB}
    numbers = {**sizes, "total": total, **more}
    return {name: round(size, 2) for name, size in numbers.items()} | {"seconds": round(time.perf_counter() - began)}


def devices_of(name: str | None, job: Job) -> list[Any]:
    """Of a topology, or CPU devices."""
    return jax.devices()[: job.devices] if name is None else topology(name)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints what is predicted now beside what was compiled: temporaries and live ones as MiB, and by how much the total is off.

    On the CPU temporaries alone are judged: arguments would hide what they miss.
    """
    table = Table(
        "kind", "case", "arguments", "temporaries", "of compiler", "total off by", "live", "of compiler", "off by"
    )
    errors: dict[str, list[float]] = {}
    for row in rows:
        name, job = KINDS[row["kind"]][row["case"]]
        guess, truth = predicted(name, job), row["compiled"]
        tpu = row["kind"] == "tpu"
        off = (
            (guess["arguments"] + guess["temporaries"]) / truth["total"] - 1
            if tpu
            else guess["temporaries"] / truth["temp"] - 1
        )
        errors.setdefault(row["kind"], []).append(abs(off))
        alive = truth["peak"] - truth["argument"]  # the CPU does not tell it
        live = (f"{guess['live']:.1f}", f"{alive:.1f}", f"{guess['live'] / alive - 1:+.1%}") if tpu else ("", "", "")
        numbers = (guess["arguments"], guess["temporaries"], truth["temp"])
        table.add_row(row["kind"], row["case"], *(f"{n:.1f}" for n in numbers), f"{off:+.1%}", *live)
    Console(width=160).print(table)
    for kind, found in errors.items():
        print(f"{kind}: {len(found)} cases, median {statistics.median(found):.1%}, worst {max(found):.1%}")


def main() -> None:
    """Compiles what is asked for and not there, one case at a time, and shows all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="a name; all of the kind where none is given")
    parser.add_argument("--kind", choices=tuple(KINDS), help="all where none is given")
    parser.add_argument("--no-compile", action="store_true", help="only show what is there")
    args = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["kind"], row["case"]) for row in rows}
    versions = {p: version(p) for p in ("jax", "libtpu")} | {"python": sys.version.split()[0]}
    for kind, cases in KINDS.items():
        for case, (name, job) in cases.items():
            wanted = (args.kind in (None, kind)) and (args.case is None or case in args.case)
            if not wanted or (kind, case) in done or args.no_compile:
                continue
            row = {"kind": kind, "case": case, "compiled": compiled(job, devices_of(name, job)), "versions": versions}
            rows.append(row)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            jax.clear_caches()
    show([row for row in rows if args.kind in (None, row["kind"])])


if __name__ == "__main__":
    main()
