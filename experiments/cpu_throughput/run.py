"""Training throughput of lmeff and of eager PyTorch on the CPU: the same model, weights, batch and optimizer. See README.md.

    python experiments/cpu_throughput/run.py [--shape 7m] [--rounds 9] [--steps 3] [--json results.jsonl]

Each side lives in a process of its own and they work in turn, a few steps at a time, so that noise on the machine falls on both.
"""

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Shape

PACKAGES = {"lmeff": ("jax", "jaxlib"), "torch": ("torch",)}
AGREE = 2e-4  # relative difference of the two losses after the warm-up steps: float32 in another order
WARM_UP = 3


def make_side(name: str, shape: Shape, weights: dict[str, Any], threads: int) -> Callable[[], float]:
    """The train step of one side; imports only that side's framework."""
    if name == "torch":
        import torch_side

        return torch_side.make_step(shape, weights, shape.tokens(), threads)
    import lmeff_side

    return lmeff_side.make_step(shape, weights, shape.tokens())


def serve(name: str, shape: Shape, weights: dict[str, Any], threads: int, pipe: Connection) -> None:
    """A worker: warms up and sends the loss, then answers each number of steps with its seconds a step."""
    step = make_side(name, shape, weights, threads)
    pipe.send([step() for _ in range(WARM_UP)][-1])
    while steps := pipe.recv():
        step()  # wakes the thread pool and refills the caches after the other side's turn
        start = time.perf_counter()
        for _ in range(steps):
            step()
        pipe.send((time.perf_counter() - start) / steps)


def measure(shape: Shape, rounds: int, steps: int, threads: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a step of both sides, round by round, and their losses after the warm-up."""
    import lmeff_side

    weights = lmeff_side.initial_weights(shape)
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for name in PACKAGES:
        pipes[name], theirs = spawn.Pipe()
        workers.append(spawn.Process(target=serve, args=(name, shape, weights, threads, theirs), daemon=True))
        workers[-1].start()
        theirs.close()
    losses = {name: pipe.recv() for name, pipe in pipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(steps)
            seconds[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(0)
    for worker in workers:
        worker.join()
    return seconds, losses


def summary(name: str, shape: Shape, seconds: dict[str, list[float]], losses: dict[str, float]) -> dict[str, Any]:
    """One line of results: medians and spread in tokens/s and their ratio."""
    tokens = shape.rows * shape.length
    medians = {side: tokens / statistics.median(times) for side, times in seconds.items()}
    return {
        "date": datetime.date.today().isoformat(),
        "shape": name,
        "tokens_per_second": {side: round(value) for side, value in medians.items()},
        "fastest": {side: round(tokens / min(times)) for side, times in seconds.items()},
        "slowest": {side: round(tokens / max(times)) for side, times in seconds.items()},
        "ratio": round(medians["lmeff"] / medians["torch"], 3),
        "loss": losses,
        "rounds": len(seconds["lmeff"]),
        "cpus": os.cpu_count(),
        "versions": {p: version(p) for side in PACKAGES.values() for p in side} | {"python": sys.version.split()[0]},
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table and the ratio."""
    table = Table("side", "tokens/s (median)", "slowest round", "fastest round", "loss after warm-up")
    for side, value in result["tokens_per_second"].items():
        row = (value, result["slowest"][side], result["fastest"][side])
        table.add_row(side, *(f"{n:,}" for n in row), f"{result['loss'][side]:.5f}")
    Console().print(table, f"{result['shape']}: lmeff / torch = {result['ratio']:.2f} (ratio of medians)", sep="\n")


def main() -> None:
    """Parses the command line, measures, prints, and appends to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7m")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch; XLA takes all cores")
    parser.add_argument("--json", type=Path, help="file to append one line of results to")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit("This benchmark compares with PyTorch, which lmeff does not depend on: pip install torch==2.13.0")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        sys.exit("XLA_FLAGS simulates several devices, which divides the cores among them: unset it for this benchmark")
    os.environ["JAX_PLATFORMS"] = "cpu"
    shape = SHAPES[args.shape]
    seconds, losses = measure(shape, args.rounds, args.steps, args.threads)
    result = summary(args.shape, shape, seconds, losses)
    show(result)
    if abs(losses["lmeff"] - losses["torch"]) > AGREE * losses["torch"]:
        sys.exit(f"the two sides do not train the same model: losses {losses}")
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
