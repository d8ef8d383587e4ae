"""Measuring the artifacts of a run again: on its own held-out text or on any other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lmeff.config import Experiment
from lmeff.config.validate import validate
from lmeff.core.errors import CheckpointError
from lmeff.data.loader import read_text
from lmeff.recipe.artifact import Artifact
from lmeff.recipe.measure import held_out, make_scorer
from lmeff.recipe.run import is_done, load_artifact, open_workshop
from lmeff.recipe.summary import bits_per_byte
from lmeff.report.statistics import bootstrap_mean


def evaluate(
    experiment: Experiment, directory: Path, *, names: Sequence[str], text: Sequence[str], console: Console
) -> dict[str, Any]:
    """Loss, interval and bits/byte of the named artifacts (default: all that are done), as a JSON-able object."""
    shapes = validate(experiment, jax.device_count(), directory)
    for name in names:
        experiment.stage(name)
    shop = open_workshop(experiment, shapes, directory, console)
    data = read_text(text, shop.corpus, experiment.data.text_field) if text else shop.corpus.test
    artifacts: dict[str, Artifact] = {}
    rows = []
    for stage in experiment.recipe:
        if not is_done(shop, stage):
            if stage.name in names:
                raise CheckpointError(
                    f"{directory}: artifact '{stage.name}' is not done; expected a finished stage. Run it first: lmeff train."
                )
            continue
        artifacts[stage.name] = load_artifact(shop, stage, artifacts)
        if not names or stage.name in names:
            options = experiment.evaluate
            losses = held_out(
                make_scorer(artifacts[stage.name], shop.layout, shop.policy),
                data,
                shop.layout,
                options.batch,
                options.batches,
            )
            loss, low, high = bootstrap_mean(losses.nats, losses.tokens, samples=options.samples)
            row = {
                "name": stage.name,
                "loss": loss,
                "loss_interval": [low, high],
                "bits_per_byte": bits_per_byte(losses, data),
                "tokens": int(losses.tokens.sum()),
            }
            rows.append(row)
            console.print(
                f"{stage.name}: {loss:.4f} [{low:.4f}, {high:.4f}] nats/token, {row['bits_per_byte']:.3f} bits/byte over {row['tokens']:,} tokens",
                highlight=False,
            )
    if not rows:
        raise CheckpointError(
            f"{directory}: no artifact is done; expected at least one finished stage. Run it first: lmeff run."
        )
    return {"run": str(directory), "text": list(text), "artifacts": rows}
