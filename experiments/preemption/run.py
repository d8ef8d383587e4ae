"""What listening for a preemption costs a train step: the same steps with and without asking whether all stop here, in turn.

PYTHONPATH=. python experiments/preemption/run.py [--processes 1 2 4] [--turns 40] [--steps 20] [--json results.jsonl]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lmeff.bench.variants import random_model
from lmeff.compress.base import identity
from lmeff.core.batch import Batch
from lmeff.core.precision import Policy
from lmeff.distill.objectives import Projection, head_objective
from lmeff.launch.local import attempt, signals
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import MeshPlan, make_layout
from lmeff.parallel.preemption import agreed, listen
from lmeff.parallel.processes import join, launched
from lmeff.parallel.rows import place_batch
from lmeff.train.loop import compile_step
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime
from lmeff.train.state import create_state

Record = dict[str, Any]
CONFIG = ModelConfig(vocab=264, width=96, layers=2, heads=4, kv_heads=2, ffn=256)
"""The quickstart's student. The smaller a step, the more of it asking could be."""
ROWS, TOKENS = 4, 64  # of a process


def measure(turns: int, steps: int) -> Record:
    """Milliseconds a step, medians over turns, and microseconds of a call, its mean; on all processes at once."""
    layout = make_layout(MeshPlan(data=jax.device_count()), jax.devices())
    specs = param_specs(CONFIG)
    tx = make_optimizer(OptimConfig(), turns * steps, policy=Policy(), specs=specs)
    rt = Runtime(
        student=Model(CONFIG),
        teacher=None,
        specs=specs,
        compression=identity(),
        objective=head_objective(Projection(CONFIG)),
        tx=tx,
        layout=layout,
        policy=Policy(),
        steps=turns * steps,
    )
    state = create_state(random_model(CONFIG, layout, Policy()).params, specs, rt.compression, tx, layout, ema=False)
    batch = place_batch(documents(ROWS * jax.process_count()), layout)
    step = compile_step(rt, state, batch, Frozen())
    seconds: dict[bool, list[float]] = {False: [], True: []}
    calls: list[float] = []
    for turn, asks in enumerate([False, True] + [False, True, True, False] * (turns // 2)):
        began = time.perf_counter()
        for _ in range(steps):
            state, values = step(state, batch, Frozen())
            if asks:
                called = time.perf_counter()
                agreed()
                calls.append(time.perf_counter() - called)
        jax.block_until_ready((state, values))
        if turn > 1:  # the first of each warms up
            seconds[asks].append((time.perf_counter() - began) / steps)
    without, asking = (statistics.median(seconds[asks]) for asks in (False, True))
    pairs = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    return {
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "turns": turns,
        "steps": steps,
        "ms_without": 1e3 * without,
        "ms_asking": 1e3 * asking,
        "ratio": asking / without,
        "quartiles_of_pairs": [float(x) for x in np.quantile(pairs, (0.25, 0.75))],
        "us_per_call": 1e6 * statistics.mean(calls),
    }


def documents(rows: int) -> Batch:
    """Random rows of one document each."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab, (rows, TOKENS + 1), dtype=np.int32)
    ones = np.ones((rows, TOKENS), np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), ones.shape)
    return Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))


def main() -> None:
    """Starts the processes of each count, prints the table, and appends to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--turns", type=int, default=40, help="of each kind, an even number")
    parser.add_argument("--steps", type=int, default=20, help="steps in a turn")
    parser.add_argument("--json", type=Path, help="file to append a line of results to for each count")
    args = parser.parse_args()
    if launched():
        listen(lambda: join(cluster=False), lambda why: os._exit(42))
        found = measure(args.turns, args.steps)
        if jax.process_index() == 0:
            with args.json.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return
    with signals() as received, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.jsonl"
        shape = ["--turns", str(args.turns), "--steps", str(args.steps), "--json", str(file)]
        for count in args.processes:
            attempt([sys.executable, __file__, *shape], count, received)
        lines = file.read_text()
    if args.json:
        with args.json.open("a") as kept:
            kept.write(lines)
    table = Table("processes", "device", "ms a step", "asking", "ratio", "quartiles of pairs", "a call, us")
    for found in map(json.loads, lines.splitlines()):
        low, high = found["quartiles_of_pairs"]
        numbers = (f"{found[name]:.3f}" for name in ("ms_without", "ms_asking", "ratio"))
        ends = (f"{low:.3f} to {high:.3f}", f"{found['us_per_call']:.1f}")
        table.add_row(str(found["processes"]), found["device"], *numbers, *ends)
    Console().print(table)


if __name__ == "__main__":
    main()
