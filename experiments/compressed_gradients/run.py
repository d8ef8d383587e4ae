"""What compressed gradients cost in quality: the quickstart's teacher, trained with each reduction from several seeds.

PYTHONPATH=. python experiments/compressed_gradients/run.py [--seeds 0 1 2] [--reductions float32 int8] [--json results.jsonl]
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lmeff.config import Experiment
from lmeff.config.files import load_experiment
from lmeff.launch import simulate_devices
from lmeff.parallel.compressed import Reduce
from lmeff.recipe.run import run

CONFIG = Path(__file__).parents[2] / "configs/quickstart.py"
DEVICES = 2
REDUCTIONS = {"float32": None, "int8": Reduce(method="int8"), "powersgd": Reduce(method="powersgd", rank=4)}


def taught(seed: int, reduce: Reduce | None, runs: str) -> float:
    """Held-out nats per token of the teacher; a run of another seed has other weights and another order of the data."""
    whole: Experiment = load_experiment(CONFIG)
    experiment = dataclasses.replace(
        whole,
        runs=runs,
        seed=seed,
        recipe=(whole.stage("teacher"),),
        claims=(),
        train=dataclasses.replace(whole.train, reduce=reduce),
    )
    return run(experiment, sources={}, console=Console(quiet=True)).artifacts[0].loss


def main() -> None:
    """Parses the command line, trains, prints the table, and appends to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reductions", nargs="+", default=[*REDUCTIONS], choices=[*REDUCTIONS])
    parser.add_argument("--json", type=Path, help="file to append a line of results to for each run")
    args = parser.parse_args()
    simulate_devices(DEVICES)
    losses: dict[str, list[float]] = {name: [] for name in args.reductions}
    for seed in args.seeds:  # in turn, so that an interrupted run has whole comparisons
        for name in args.reductions:
            with tempfile.TemporaryDirectory() as runs:
                losses[name].append(taught(seed, REDUCTIONS[name], runs))
            print(f"seed {seed}, {name}: {losses[name][-1]:.4f}", flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps({"seed": seed, "reduce": name, "loss": losses[name][-1]}) + "\n")
    table = Table("reduction", *(f"seed {seed}" for seed in args.seeds), "mean", f"against {args.reductions[0]}")
    first = statistics.mean(losses[args.reductions[0]])
    for name, found in losses.items():
        mean = statistics.mean(found)
        table.add_row(name, *(f"{loss:.4f}" for loss in found), f"{mean:.4f}", f"{100 * (mean / first - 1):+.2f}%")
    Console().print(table)


if __name__ == "__main__":
    main()
