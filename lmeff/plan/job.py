"""What is planned: one training stage of an experiment on so many devices, as one hashable value. Needs no devices and allocates nothing."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmeff.config import Experiment, Stage
from lmeff.config.validate import validate
from lmeff.core.precision import Policy, parse
from lmeff.distill.objectives import Distill
from lmeff.models.config import ModelConfig, with_layers
from lmeff.parallel.activations import choose
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.mesh import Layout, MeshPlan, plan_layout
from lmeff.parallel.schedules import Size, size_of
from lmeff.parallel.workload import Local, Step
from lmeff.recipe.artifact import Recipe
from lmeff.recipe.stage import recipe_of
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model as a plan sees it: its sizes, and the transforms and formats of its weights and activations."""

    cfg: ModelConfig
    recipe: Recipe = Recipe()  # noqa: RUF009 -- frozen


@dataclass(frozen=True, kw_only=True)
class Job:
    """A train step and how often it runs.

    name:     of the stage.
    platform: of the devices: "cpu", "gpu" or "tpu".
    rows:     of the global batch, all microbatches; tokens: of a row.
    remat:    as `train.remat` has it; `policy_of_remat` says what a budget comes to.
    held:     models whose weights lie on the devices beside the step's own, while it trains.
    """

    name: str
    student: Shape
    teacher: Shape | None = None
    distill: Distill | None = None
    precision: str = "params=float32,compute=float32,output=float32,state=float32"
    mesh: MeshPlan = MeshPlan()  # noqa: RUF009 -- frozen
    devices: int = 1
    platform: str = "tpu"
    rows: int = 1
    tokens: int = 1
    steps: int = 1
    accumulate: int = 1
    remat: str = "none"
    optim: OptimConfig = OptimConfig()
    reduce: Reduce | None = None
    local: LocalUpdates | None = None
    held: tuple[Shape, ...] = ()

    @property
    def cfg(self) -> ModelConfig:
        """Sizes of the model that is trained."""
        return self.student.cfg

    @property
    def policy(self) -> Policy:
        """Dtypes by role."""
        return parse(self.precision)

    @property
    def layout(self) -> Layout:
        """Without devices."""
        return plan_layout(self.mesh, self.devices, self.platform)

    @property
    def degrees(self) -> dict[str, int]:
        """The size of every mesh axis."""
        return self.mesh.degrees(self.devices)

    @property
    def policy_of_remat(self) -> str:
        """The remat policy, with a budget resolved for these devices; raises `ConfigError` where none fits."""
        rows = self.rows // self.accumulate
        return choose(self.remat, self.cfg, self.layout, rows, self.tokens, self.policy.compute)

    @property
    def pipeline(self) -> Size | None:
        """How the schedule cuts the model; None without a pipeline."""
        stages = self.degrees["pipe"]
        return None if stages == 1 else size_of(self.mesh.schedule, stages, self.accumulate, self.mesh.chunks)

    def step(self, stage: int = 0) -> Step:
        """The step as the formulas of `lmeff.parallel.volume` see it, from a device of that stage of the pipeline."""
        return Step(
            cfg=self.cfg,
            plan=self.mesh,
            devices=self.devices,
            rows=self.rows,
            tokens=self.tokens,
            accumulate=self.accumulate,
            remat=self.policy_of_remat,
            policy=self.policy,
            stage=stage,
            teacher=None if self.teacher is None else self.teacher.cfg,
            reduce=self.reduce,
            local=None if self.local is None else Local(self.local.axis, self.local.every, self.local.fragments),
        )

    def shallow(self, layers: int) -> "Job":
        """The same job with every model cut to its first layers: as wide, and quicker to compile."""

        def cut(model: Shape) -> Shape:
            return dataclasses.replace(model, cfg=with_layers(model.cfg, range(min(layers, model.cfg.layers))))

        teacher = None if self.teacher is None else cut(self.teacher)
        return self.changed(student=cut(self.student), teacher=teacher, held=tuple(map(cut, self.held)))

    def changed(self, **changes: Any) -> "Job":
        """The same job with fields changed."""
        return dataclasses.replace(self, **changes)


def jobs(experiment: Experiment, devices: int, platform: str) -> list[Job]:
    """A job for every stage that trains, in the recipe's order; raises `ConfigError` for what cannot work on so many devices.

    Models that stages load need not be here where the stages say their shapes.
    """
    cfgs = validate(experiment, devices, planned=True)
    recipes: dict[str, Recipe] = {}
    found = []
    for stage in experiment.recipe:
        recipe = recipe_of(stage, cfgs[stage.name], recipes)
        if experiment.steps(stage):
            job = _job(experiment, stage, Shape(cfg=cfgs[stage.name], recipe=recipe), cfgs, recipes)
            found.append(job.changed(held=_held(stage, job, cfgs, recipes)))
        recipes[stage.name] = dataclasses.replace(recipe, packed=recipe.packed or stage.export)
    return [job.changed(devices=devices, platform=platform) for job in found]


def _held(stage: Stage, job: Job, cfgs: Mapping[str, ModelConfig], recipes: Mapping[str, Recipe]) -> tuple[Shape, ...]:
    """What a stage began from and keeps: its start, unless that is the teacher, and what it made of it. What is loaded or random becomes the state."""
    if stage.start is None:
        return ()
    start = Shape(cfg=cfgs[stage.start], recipe=recipes[stage.start])
    own = () if stage.distill is not None and stage.distill.teacher == stage.start else (start,)
    # Weights that nothing acted on are the start's own.
    made = stage.shrink is not None or (bool(stage.compress) and start.recipe.transforms != ())
    return (*own, Shape(cfg=job.cfg)) if made else own


def _job(
    experiment: Experiment,
    stage: Stage,
    student: Shape,
    cfgs: Mapping[str, ModelConfig],
    recipes: Mapping[str, Recipe],
) -> Job:
    train, taught = experiment.train, stage.distill
    teacher = None if taught is None else Shape(cfg=cfgs[taught.teacher], recipe=recipes[taught.teacher])
    return Job(
        name=stage.name,
        student=student,
        teacher=teacher,
        distill=taught,
        precision=experiment.precision,
        mesh=experiment.mesh,
        rows=train.batch,
        tokens=experiment.data.sequence,
        steps=experiment.steps(stage),
        accumulate=train.accumulate,
        remat=train.remat,
        optim=stage.optim or experiment.optim,
        reduce=train.reduce,
        local=train.local,
    )
