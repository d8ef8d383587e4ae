"""A train step as the formulas see it: the model, the mesh, the sizes, and what a device holds and runs of them. Needs no devices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.core.precision import Policy
from lmeff.core.tree import flatten
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.hlo import Conditional, Taken
from lmeff.parallel.mesh import ZERO_AXIS, Layout, MeshPlan, indivisible, names, plan_layout
from lmeff.parallel.schedules import build
from lmeff.parallel.stages import layer_table
from lmeff.parallel.tables import Schedule

TENSOR, PIPE = "tensor", "pipe"
EMBEDDING = "embed/table"


class Leaf(NamedTuple):
    """A parameter: elements that a device has when it is whole over fsdp, of all layers it holds; the axes that cut it; the layers."""

    path: str
    elements: float
    axes: tuple[str, ...]
    layers: int
    is_matmul: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """A train step of plain training.

    rows:   of the global batch, all microbatches. tokens: of a row. chunk: tokens whose logits exist at a time.
    stage:  of the pipeline, whose device is asked about: the first embeds, the last has the loss.
    """

    cfg: ModelConfig
    plan: MeshPlan
    devices: int
    rows: int
    tokens: int
    accumulate: int = 1
    remat: str = "none"
    policy: Policy = field(default_factory=Policy)
    chunk: int = 1024
    stage: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be cut, and what has no row in the table yet."""
        degrees = self.degrees
        missing = [axis for axis in ("expert", "context") if degrees[axis] > 1]
        if missing:
            raise ConfigError(
                f"volume: got a mesh with {' and '.join(missing)}, whose collectives have no formula yet; expected degree 1"
            )
        problems = indivisible(param_specs(self.cfg), degrees)
        if self.tokens % degrees[TENSOR]:
            problems.append(f"T = {self.tokens} over tensor = {degrees[TENSOR]}")
        if self.rows % (self.layout.size(self.layout.axes("B")) * self.accumulate):
            problems.append(f"B = {self.rows} over the batch axes and {self.accumulate} microbatches")
        if problems:
            raise ConfigError(f"volume: got {'; '.join(problems)}; expected sizes that divide")
        if not 0 <= self.stage < degrees[PIPE]:
            raise ConfigError(f"volume: got stage {self.stage}, expected 0 to {degrees[PIPE] - 1}")

    @cached_property
    def layout(self) -> Layout:
        """Without devices."""
        return plan_layout(self.plan, self.devices)

    @property
    def degrees(self) -> dict[str, int]:
        """The size of every axis."""
        return dict(self.layout.mesh.shape)

    @property
    def batch(self) -> tuple[str, ...]:
        """The axes that cut rows."""
        return self.layout.axes("B")

    @property
    def region(self) -> bool:
        """Whether gradients are reduced once, in a region."""
        return self.accumulate > 1 or self.degrees[PIPE] > 1

    @cached_property
    def schedule(self) -> Schedule | None:
        """Of the pipeline."""
        stages = self.degrees[PIPE]
        return build(self.plan.schedule, stages, self.accumulate, self.plan.chunks) if stages > 1 else None

    @property
    def activation(self) -> int:
        """Elements of a device's [B, T, D] of one microbatch, whole over tensor."""
        return self.rows // self.layout.size(self.batch) // self.accumulate * self.tokens * self.cfg.width

    @property
    def passes(self) -> float:
        """How often a device runs a layer forward, by layers and microbatches."""
        if self.schedule is None:
            return self.cfg.layers * self.accumulate
        table = layer_table(self.schedule, self.cfg.layers)
        return self.accumulate * self.schedule.chunks * table.shape[-1]  # padding is run, too

    @property
    def first(self) -> bool:
        """Whether the device embeds tokens."""
        return self.schedule is None or self.schedule.home(0)[0] == self.stage

    @property
    def last(self) -> bool:
        """Whether the device has the loss."""
        return self.schedule is None or self.schedule.home(self.schedule.slices - 1)[0] == self.stage

    @cached_property
    def leaves(self) -> list[Leaf]:
        """All parameters."""
        return leaves_of(self.cfg, self.layout)

    def is_head(self, leaf: Leaf) -> bool:
        """Whether the loss multiplies with it."""
        return leaf.path == (EMBEDDING if self.cfg.tied else "head/w")


def leaves_of(cfg: ModelConfig, layout: Layout) -> list[Leaf]:
    """The parameters of a model on a layout."""
    found = []
    for path, spec in flatten(param_specs(cfg)).items():
        axes = tuple(axis for entry in layout.partition(spec.letters, spec.shape) for axis in names(entry))
        size = math.prod(spec.shape) / layout.size([axis for axis in axes if axis != ZERO_AXIS])
        stages = layout.mesh.shape[PIPE] if PIPE in axes else 1
        found.append(Leaf(path, size, axes, spec.shape[0] // stages if spec.stacked else 1, spec.is_matmul))
    return found


def branch_counts(step: Step) -> Taken:
    """How often a device of `step.stage` takes the branches of a compiled pipeline, for `lmeff.parallel.hlo.collectives`; others are taken every time."""
    schedule = step.schedule

    def taken(found: Conditional) -> Sequence[float]:
        if schedule is None:
            return [found.times] * found.count
        if not found.around and found.count == 4:  # the executor's switch: idle, F, B, W
            runs = step.accumulate * schedule.chunks
            return schedule.ticks - 3 * runs, runs, runs, runs
        for scope, here in {"/embedding/cond": step.first, "/loss/cond": step.last}.items():
            if found.origin.endswith(scope):
                runs = step.accumulate * here
                return found.times - runs, runs
        return [found.times] * found.count

    return taken
