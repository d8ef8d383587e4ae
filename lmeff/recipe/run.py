"""A recipe run: every stage, then every artifact measured on the same held-out text, then one report."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
from lmeff.config import Experiment, Stage, check_resume, validate, write
from lmeff.data.loader import build
from lmeff.recipe.summary import make_report
from lmeff.report.html import write_html
from lmeff.report.schema import Report
from lmeff.report.tables import print_artifacts
from lmeff.train.checkpoint import lock
from rich.console import Console

from lmeff.core.errors import CheckpointError
from lmeff.parallel.mesh import make_layout
from lmeff.recipe.artifact import Artifact, load, save
from lmeff.recipe.stage import Workshop, recipe_of, run_stage
from lmeff.train.progress import make_progress


def run(experiment: Experiment, *, only: str | None = None, resume: bool = True, console: Console) -> Report:
    """Runs the recipe and reports on it. Stages that are done are read back; a stage that was cut off goes on where it was saved.

    only: run this stage and what it needs that is not there yet, without the others.
    """
    validate(experiment, jax.device_count())
    directory = Path(experiment.run_dir)
    if not resume and (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory}: holds a run already, and --no-resume was asked for; expected an empty place. Delete it or choose another --name."
        )
    check_resume(experiment, directory)
    directory.mkdir(parents=True, exist_ok=True)
    with lock(directory):
        write(experiment, directory)
        return _run(experiment, directory, only, resume, console)


def _run(experiment: Experiment, directory: Path, only: str | None, resume: bool, console: Console) -> Report:
    corpus = build(experiment.data, directory / "data", experiment.seed, batch=experiment.train.batch)
    console.print(f"data: {corpus.describe()}")
    layout = make_layout(experiment.mesh)
    console.print(f"mesh: {dict(layout.mesh.shape)} on {jax.devices()[0].device_kind}")
    shop = Workshop(experiment=experiment, corpus=corpus, layout=layout, directory=directory, resume=resume)
    artifacts: dict[str, Artifact] = {}
    stages = experiment.recipe if only is None else needed(experiment.recipe, only)
    for stage in stages:
        artifacts[stage.name] = make_or_load(shop, stage, artifacts, console)
    report = make_report(shop, stages, artifacts)
    report.write(directory / "report.json")
    write_html(report, directory / "report.html")
    print_artifacts(report, console)
    return report


def needed(stages: tuple[Stage, ...], only: str) -> tuple[Stage, ...]:
    """The stages that `only` depends on, and itself."""
    by_name = {stage.name: stage for stage in stages}
    wanted = {only}
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted |= {name for name in parents(stage) if name in by_name}
    return tuple(stage for stage in stages if stage.name in wanted)


def parents(stage: Stage) -> list[str]:
    """The earlier artifacts a stage reads."""
    return [name for name in (stage.start, stage.distill.teacher if stage.distill else None) if name is not None]


def make_or_load(shop: Workshop, stage: Stage, earlier: Mapping[str, Artifact], console: Console) -> Artifact:
    """The artifact of a stage: read back where it is complete, else made and saved."""
    place = shop.stage_dir(stage) / "artifact"
    done = shop.stage_dir(stage) / "done.json"
    if done.exists():
        console.print(f"{stage.name}: done before, read from {place}")
        return load(stage.name, recipe_of(shop, stage, earlier), place, shop.layout, shop.policy.params)
    steps = shop.experiment.steps(stage)
    progress = make_progress(stage.name, steps, console)
    try:
        artifact = run_stage(shop, stage, earlier, progress)
    finally:
        progress.close()
    save(artifact, place)
    done.write_text(json.dumps({"stage": stage.name, "steps": steps}) + "\n", encoding="utf-8")
    return artifact
