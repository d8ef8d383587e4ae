"""Measuring the artifacts of a finished run again: on its own held-out text or on any other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lmeff.config import Experiment
from lmeff.config.validate import validate
from lmeff.core.errors import CheckpointError, ConfigError
from lmeff.data.loader import Dataset, build, read_text
from lmeff.recipe.measure import held_out, make_scorer
from lmeff.recipe.run import artifact_dir, is_done, load_artifact, open_workshop
from lmeff.recipe.summary import bits_per_byte
from lmeff.report.statistics import bootstrap_mean


def evaluate(
    experiment: Experiment, directory: Path, *, names: Sequence[str], text: Sequence[str], console: Console
) -> dict[str, Any]:
    """Loss, interval and bits/byte of the named artifacts (default: all that are done), as a JSON-able object."""
    raise NotImplementedError
