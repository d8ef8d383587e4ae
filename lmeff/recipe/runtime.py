"""What is static of a stage's train step, and the shapes of what it reads: the recipe trains with it, the planner counts and compiles it."""

from typing import Protocol

from lmeff.core.precision import Policy
from lmeff.distill.objectives import Distill, Projection, head_objective
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.activations import choose
from lmeff.parallel.compressed import make_reducer
from lmeff.parallel.mesh import Layout
from lmeff.recipe.artifact import Recipe, abstract_effective, abstract_ranges
from lmeff.train.loop import TrainConfig
from lmeff.train.optim import OptimConfig, make_optimizer
from lmeff.train.runtime import Frozen, Model, Runtime


class Described(Protocol):
    """What knows a model's sizes and its recipe: an artifact, the start of a stage, or the shape of either before it exists."""

    @property
    def cfg(self) -> ModelConfig: ...

    @property
    def recipe(self) -> Recipe: ...


def make_runtime(
    student: Described,
    teacher: Described | None,
    *,
    train: TrainConfig,
    optim: OptimConfig,
    distill: Distill | None,
    steps: int,
    tokens: int,
    policy: Policy,
    layout: Layout,
) -> Runtime:
    """Everything static of a train step.

    train: whose batch, accumulate, remat, reduce and local count. steps: of the stage. tokens: of a row.
    Raises `ConfigError` for a budget of activations that no remat policy keeps on this layout.
    """
    specs = param_specs(student.cfg)
    compression = student.recipe.compression
    projection = Projection(student.cfg, student.recipe.numerics)
    rows = train.batch // train.accumulate
    teacher_model = None if teacher is None else Model(teacher.cfg, teacher.recipe.numerics)
    teacher_head = None if teacher is None else Projection(teacher.cfg, teacher.recipe.numerics)
    return Runtime(
        student=Model(student.cfg, student.recipe.numerics, compression.apply),
        teacher=teacher_model,
        specs=specs,
        compression=compression,
        objective=head_objective(projection, teacher_head, distill),
        tx=make_optimizer(optim, steps, policy=policy, specs=specs),
        layout=layout,
        policy=policy,
        accumulate=train.accumulate,
        remat=choose(train.remat, student.cfg, layout, rows, tokens, policy.compute),
        ema=optim.ema,
        reducer=make_reducer(train.reduce, specs),
        local=train.local,
        steps=steps,
        offload=optim.offload,
    )


def abstract_frozen(student: Described, teacher: Described | None, layout: Layout, policy: Policy) -> Frozen:
    """What a train step reads and never changes, as shapes with shardings."""
    frozen = Frozen(ranges=abstract_ranges(student.cfg, student.recipe, layout) or None)
    if teacher is None:
        return frozen
    effective = abstract_effective(teacher.cfg, teacher.recipe, layout, policy.params)
    return frozen._replace(
        teacher=effective, teacher_ranges=abstract_ranges(teacher.cfg, teacher.recipe, layout) or None
    )
