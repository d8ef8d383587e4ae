"""A recipe run: every stage, then every artifact measured on the same held-out text, then one report."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console

from lmeff.config import Experiment, Stage
from lmeff.config.files import check_resume, write
from lmeff.config.loads import check_same, keep, loads
from lmeff.config.validate import validate
from lmeff.core.errors import CheckpointError, DataError
from lmeff.core.extras import require
from lmeff.core.files import write_text
from lmeff.core.precision import parse
from lmeff.data.loader import Corpus, build
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.leaves import leaf_table, warn
from lmeff.parallel.mesh import make_layout
from lmeff.parallel.processes import leads, refuse_unjoined, same, sync
from lmeff.recipe.artifact import Artifact, load, save
from lmeff.recipe.log import replay
from lmeff.recipe.stage import Workshop, recipe_of, run_stage
from lmeff.recipe.summary import make_report, rule_rows
from lmeff.report.html import write_html
from lmeff.report.schema import Report
from lmeff.report.tables import print_artifacts, print_rules
from lmeff.train.checkpoint import lock
from lmeff.train.profile import Window
from lmeff.train.profile import check as check_profile
from lmeff.train.progress import make_progress
from lmeff.train.sinks import check as check_sinks


def run(
    experiment: Experiment,
    *,
    sources: Mapping[str, str],
    only: str | None = None,
    resume: bool = True,
    profile: Window | None = None,
    console: Console,
) -> Report:
    """Runs the recipe and reports on it. Stages that are done are read back; a stage that was cut off goes on where it was saved.

    sources: the origin of each setting, for the report.
    only:    run this stage and what it needs that is not there yet, without the others.
    profile: the steps of each stage that trains to trace, under `profile/STAGE` of the run.
    """
    shapes = validate(experiment, jax.device_count())
    for package in ("matplotlib", "jinja2"):  # before hours of training, not after
        require(package, extra="report")
    if leads():
        check_sinks(experiment.log)
    stages = experiment.recipe if only is None else needed(experiment.recipe, only)
    if profile is not None:
        check_profile(profile, ((stage.name, experiment.steps(stage)) for stage in stages))
    directory = Path(experiment.run_dir)
    if not resume and (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory}: holds a run already, and --no-resume was asked for; expected an empty place. Delete it or choose another --name."
        )
    check_resume(experiment, directory)
    loaded = loads(experiment, directory)
    check_same(loaded, directory)
    shop = open_workshop(experiment, shapes, directory, console, resume=resume)  # builds data whole or leaves no trace
    shop = dataclasses.replace(shop, profile=profile)
    with lock(directory):
        if leads():
            write(experiment, directory)
            keep(loaded, directory)
        artifacts: dict[str, Artifact] = {}
        for stage in stages:
            artifacts = at_hand(shop, artifacts, stage.parents)
            artifacts[stage.name] = make_or_load(shop, stage, artifacts, console)
        artifacts = at_hand(shop, artifacts, tuple(artifacts))
        report = make_report(shop, stages, artifacts, sources, console)
        name = "report" if only is None else f"report-{only}"
        if leads():
            report.write(directory / f"{name}.json")
            write_html(report, directory / f"{name}.html")
            replay(
                experiment.log,
                experiment,
                directory,
                report.artifacts,
                lambda line: console.print(line, highlight=False, soft_wrap=True),
            )
        print_artifacts(report, console)
        console.print(f"report: {directory / f'{name}.html'}", highlight=False, soft_wrap=True)
        return report


def make_data(experiment: Experiment, devices: int) -> tuple[Path, Corpus]:
    """The tokens of a run alone, and the folder that they are in; checks all of the config as a run on so many devices does."""
    validate(experiment, devices)
    directory = Path(experiment.run_dir)
    check_resume(experiment, directory)
    return directory / "data", _corpus(experiment, directory / "data")


def open_workshop(
    experiment: Experiment, shapes: Mapping[str, ModelConfig], directory: Path, console: Console, *, resume: bool = True
) -> Workshop:
    """The data and the mesh of a run."""
    refuse_unjoined()
    corpus = _corpus(experiment, directory / "data")
    console.print(f"data: {corpus.describe()}", highlight=False, soft_wrap=True)
    layout = make_layout(experiment.mesh)
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.print(
        f"mesh: {layout.describe()} on {jax.devices()[0].device_kind}{processes}", highlight=False, soft_wrap=True
    )
    for cfg in dict.fromkeys(shapes.values()):
        warn(leaf_table(param_specs(cfg), layout, parse(experiment.precision).params), console)
    return Workshop(
        experiment=experiment, shapes=shapes, corpus=corpus, layout=layout, directory=directory, resume=resume
    )


def _corpus(experiment: Experiment, directory: Path) -> Corpus:
    """The tokens of a run. Of several processes the first builds them and the others read them back."""
    if not leads():
        sync("data built")
    corpus = build(experiment.data, directory, experiment.seed, batch=experiment.train.batch)
    if leads():
        sync("data built")
    if not same(corpus.digest):
        raise DataError(
            f"{directory}: the processes hold different tokens; expected one folder that all of them see, or the same text everywhere. "
            "Set --runs to a shared file system."
        )
    return corpus


def needed(stages: Sequence[Stage], only: str) -> tuple[Stage, ...]:
    """The stages that `only` depends on, and itself."""
    wanted = {only}
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted.update(stage.parents)
    return tuple(stage for stage in stages if stage.name in wanted)


def is_done(shop: Workshop, stage: Stage) -> bool:
    """Whether the stage's artifact is complete."""
    return (shop.stage_dir(stage) / "done.json").exists()


def load_artifact(shop: Workshop, stage: Stage, earlier: Mapping[str, Artifact]) -> Artifact:
    """Reads the artifact of a stage that is done."""
    recipes = {name: artifact.recipe for name, artifact in earlier.items()}
    recipe = recipe_of(stage, shop.shapes[stage.name], recipes)
    recipe = dataclasses.replace(recipe, packed=recipe.packed or stage.export)
    return load(stage.name, recipe, shop.stage_dir(stage) / "artifact", shop.layout, shop.policy.params)


def at_hand(shop: Workshop, artifacts: Mapping[str, Artifact], wanted: Collection[str]) -> dict[str, Artifact]:
    """The arrays of these artifacts and of no others: while a stage trains, the devices hold what it reads."""
    found = {name: artifact if name in wanted else artifact.at_rest() for name, artifact in artifacts.items()}
    for name in wanted:
        if not found[name].at_hand:
            found[name] = load_artifact(shop, shop.experiment.stage(name), found)
    return found


def make_or_load(shop: Workshop, stage: Stage, earlier: Mapping[str, Artifact], console: Console) -> Artifact:
    """The artifact of a stage: read back where it is complete, else made and saved."""
    if is_done(shop, stage):
        told = "done before" if shop.profile is None else "done before, so not profiled"
        console.print(f"{stage.name}: {told}", highlight=False)
        return load_artifact(shop, stage, earlier)
    steps = shop.experiment.steps(stage)
    console.print(f"{stage.name}: {_intent(stage, steps)}", highlight=False, style="bold")
    if stage.compress:
        print_rules(rule_rows(stage.compress, param_specs(shop.shapes[stage.name])), console)
    progress = make_progress(stage.name, steps, console)
    try:
        artifact = run_stage(shop, stage, earlier, progress)
    finally:
        progress.close()
    save(artifact, shop.stage_dir(stage) / "artifact")
    if leads():
        write_text(shop.stage_dir(stage) / "done.json", json.dumps({"stage": stage.name, "steps": steps}) + "\n")
    if artifact.details["note"]:
        console.print(f"{stage.name}: {artifact.details['note']}", highlight=False)
    return artifact


def _intent(stage: Stage, steps: int) -> str:
    """What a stage is about to do, in words."""
    words = [f"from {stage.start or stage.load or 'random weights'}"]
    if stage.shrink is not None:
        words.append("cut smaller")
    if stage.compress:
        words.append("compressed by these rules" if steps else "compressed without training by these rules")
    if stage.activations is not None:
        words.append("activations quantized")
    if steps:
        words.append(f"trained for {steps} steps" + (f" by {stage.distill.teacher}" if stage.distill else ""))
    if stage.export:
        words.append("packed")
    return ", ".join(words)
