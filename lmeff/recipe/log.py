"""The lines and results of a run that is done, brought to sinks: at the end of every run, and by `lmeff log` at any time."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lmeff.config import Experiment, Stage
from lmeff.config.schema import flat_values
from lmeff.report.schema import ArtifactRow, Report
from lmeff.train.metrics import Row, read_metrics
from lmeff.train.sinks import LogConfig, Place, Sinks

RESULTS = (
    "loss",
    "bits_per_byte",
    "parameters",
    "nonzero_parameters",
    "stored_bytes",
    "effective_bits",
    "flops_per_token",
    "ms_per_token",
    "train_tokens",
    "train_seconds",
)


def opener(
    config: LogConfig, experiment: Experiment, directory: Path, stage: Stage, tell: Callable[[str], None]
) -> Callable[[Sequence[Row]], Sinks]:
    """Opens the sinks of one stage with the lines that are there."""
    place = Place(directory, experiment.name, stage.name, dict(flat_values(experiment)))
    return lambda rows: Sinks(config, place, rows, tell)


def replay(
    config: LogConfig,
    experiment: Experiment,
    directory: Path,
    artifacts: Iterable[ArtifactRow],
    tell: Callable[[str], None],
) -> list[str]:
    """Brings each stage's lines, and its results where there are any, to the sinks of `config`; gives what failed."""
    results = {row.name: row for row in artifacts}
    failed = []
    for stage in experiment.recipe if config.sinks else ():
        rows = read_metrics(directory / "stages" / stage.name / "metrics.jsonl")
        if not rows and stage.name not in results:
            continue
        sinks = opener(config, experiment, directory, stage, lambda line, name=stage.name: tell(f"{name}: {line}"))(
            rows
        )
        if stage.name in results:
            sinks.summary({f"artifact/{name}": getattr(results[stage.name], name) for name in RESULTS})
        sinks.close()
        failed += [f"{name} of {stage.name}" for name in sinks.failed]
    return failed


def read_results(directory: Path) -> tuple[ArtifactRow, ...]:
    """The results of a run; none where it has no report yet."""
    file = directory / "report.json"
    return Report.read(file).artifacts if file.exists() else ()
