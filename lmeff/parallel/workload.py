"""A train step as the formulas see it: the models, the mesh, the sizes, and what a device holds and runs of them. Needs no devices."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lmeff.core.errors import ConfigError
from lmeff.core.precision import Policy
from lmeff.models.config import ModelConfig
from lmeff.models.remat import parse
from lmeff.models.transformer import sites
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.hlo import Conditional, Taken
from lmeff.parallel.members import PIPE, Leaf, Member, again_of, leaves_of, specs_of
from lmeff.parallel.mesh import BATCH_AXES, ZERO_AXIS, Layout, MeshPlan, indivisible, plan_layout
from lmeff.parallel.order import check_tokens
from lmeff.parallel.schedules import resolve
from lmeff.parallel.stages import slice_layers
from lmeff.parallel.tables import Schedule

CONTEXT, EXPERT, TENSOR = "context", "expert", "tensor"


class Local(NamedTuple):
    """Workers along an axis that train apart and meet every so many steps, in so many fragments (`train.local_updates`)."""

    axis: str
    every: int
    fragments: int = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """A train step.

    rows:    of the global batch, all microbatches. tokens: of a row. chunk: tokens whose logits exist at a time.
    remat:   as `models.remat` reads it; a budget has to be resolved first (`parallel.activations.choose`).
    stage:   of the pipeline, whose device is asked about: the first embeds, the last has the loss.
    teacher: the model whose logits are matched; its weights are stored as the policy says of parameters.
    reduce:  how gradients are compressed where they cross the batch axes.
    local:   workers that train apart; what they say to each other counts as spread evenly over steps.
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
    teacher: ModelConfig | None = None
    reduce: Reduce | None = None
    local: Local | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be cut, in one line."""
        degrees = self.degrees
        problems = [problem for cfg in self.models for problem in _indivisible(cfg, self.plan, self.devices)]
        check_tokens("volume", self.plan.sequence, self.tokens, degrees[CONTEXT])
        if self.tokens // degrees[CONTEXT] % degrees[TENSOR]:
            cut = " x ".join(f"{axis}" for axis in (CONTEXT, TENSOR) if degrees[axis] > 1)
            problems.append(f"T = {self.tokens} over {cut} = {degrees[CONTEXT] * degrees[TENSOR]}")
        if self.rows % (self.rows_cut * self.accumulate):
            problems.append(f"B = {self.rows} over the batch axes and {self.accumulate} microbatches")
        heads = degrees[CONTEXT] * degrees[TENSOR]
        if self.plan.sequence == "ulysses" and any(cfg.heads % heads for cfg in self.models):
            problems.append(f"H = {[cfg.heads for cfg in self.models]} over context x tensor = {heads} for ulysses")
        if problems:
            raise ConfigError(f"volume: got {'; '.join(problems)}; expected sizes that divide")
        self._check_choices()

    def _check_choices(self) -> None:
        """Refuses stages, slices, workers and policies that there are none of."""
        stages = self.degrees[PIPE]
        if not 0 <= self.stage < stages:
            raise ConfigError(f"volume: got stage {self.stage}, expected 0 to {stages - 1}")
        if self.schedule is not None and min(cfg.layers for cfg in self.models) < self.schedule.slices:
            fewest = min(cfg.layers for cfg in self.models)
            raise ConfigError(
                f"volume: got {fewest} layers, expected at least a layer in each of {self.schedule.slices} slices"
            )
        if self.local is not None and (self.local.axis not in ("dcn", "data") or self.degrees[self.local.axis] == 1):
            raise ConfigError(
                f"volume: got workers along '{self.local.axis}', expected dcn or data, and at least two of them"
            )
        if self.teacher is not None and self.teacher.vocab != self.cfg.vocab:
            raise ConfigError(
                f"volume: got a teacher with V = {self.teacher.vocab}, expected the student's {self.cfg.vocab}"
            )
        if parse(self.remat, sites(self.cfg)).kind == "budget":
            raise ConfigError(
                f"volume: got remat '{self.remat}', expected the policy it means here; see parallel.activations.choose"
            )

    @property
    def models(self) -> list[ModelConfig]:
        """The student, and the teacher where there is one."""
        return [self.cfg] if self.teacher is None else [self.cfg, self.teacher]

    @cached_property
    def layout(self) -> Layout:
        """Without devices; of workers that train apart, as each of them sees it."""
        return _layout(self.plan, self.devices, () if self.local is None else (self.local.axis,))

    @cached_property
    def degrees(self) -> dict[str, int]:
        """The size of every axis."""
        return dict(self.layout.mesh.shape)

    @property
    def batch(self) -> tuple[str, ...]:
        """The axes that cut rows, and that gradients are summed over: not that of workers who train apart."""
        return self.layout.axes("B")

    @property
    def rows_cut(self) -> int:
        """In how many parts rows are cut."""
        return self.layout.size(BATCH_AXES)

    @property
    def region(self) -> bool:
        """Whether gradients are reduced once, in a region."""
        return in_region(self.accumulate, self.degrees[PIPE], self.reduce)

    @property
    def nested(self) -> bool:
        """Whether models run inside a `jax.shard_map` over some axes, of a region or of workers: there JAX does not check what varies over the others."""
        return self.local is not None or (self.region and bool(self.layout.axes("BL")))

    @cached_property
    def schedule(self) -> Schedule | None:
        """Of the pipeline."""
        stages = self.degrees[PIPE]
        if stages == 1:
            return None
        return resolve(self.plan.schedule, stages, self.accumulate, self.plan.chunks)

    @property
    def tokens_here(self) -> int:
        """A device's tokens of one microbatch, all of those that tensor cuts further."""
        return self.rows // self.rows_cut // self.accumulate * (self.tokens // self.degrees[CONTEXT])

    @property
    def rows_here(self) -> int:
        """A device's rows of one microbatch."""
        return self.rows // self.rows_cut // self.accumulate

    @property
    def activation(self) -> int:
        """Elements of a device's [B, T, D] of one microbatch, whole over tensor."""
        return self.tokens_here * self.cfg.width

    @property
    def first(self) -> bool:
        """Whether the device embeds tokens."""
        return self.schedule is None or self.schedule.home(0)[0] == self.stage

    @property
    def last(self) -> bool:
        """Whether the device has the loss."""
        return self.schedule is None or self.schedule.home(self.schedule.slices - 1)[0] == self.stage

    @cached_property
    def student(self) -> Member:
        """What is trained."""
        passes, size = self._passes(self.cfg)
        twice = self.schedule is not None and self.plan.stash == "input"
        return Member(
            self.cfg,
            leaves_of(self.cfg, self.layout),
            passes * (1 + twice),
            passes,
            size,
            again_of(self.remat, self.cfg),
        )

    @cached_property
    def members(self) -> list[Member]:
        """All models. A teacher's slices run beside the student's; where F keeps inputs, the last one runs again for the loss."""
        if self.teacher is None:
            return [self.student]
        passes, size = self._passes(self.teacher)
        if self.schedule is not None and self.plan.stash == "input" and self.last:
            passes += self.accumulate * size
        return [self.student, Member(self.teacher, leaves_of(self.teacher, self.layout), passes, 0, size)]

    def _passes(self, cfg: ModelConfig) -> tuple[float, int]:
        """How often a device runs a layer, by layers and microbatches, and the layers of a slice; padding is run, too."""
        if self.schedule is None:
            return cfg.layers * self.accumulate, cfg.layers
        size = slice_layers(cfg.layers, self.schedule.slices)
        return self.accumulate * self.schedule.chunks * size, size

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All parameters that are trained."""
        return self.student.leaves

    @property
    def stored(self) -> tuple[Leaf, ...]:
        """Parameters as XLA keeps them through a step: where workers train apart at stages 1 and 2 of ZeRO, cut like the optimizer's state."""
        cut = self.local is not None and self.plan.zero in (1, 2)
        return leaves_of(self.cfg, self.layout.of_optimizer) if cut else self.leaves

    @property
    def turns_head(self) -> bool:
        """Whether the loss cuts the vocabulary over fsdp too: the head turns from parts of D to parts of V, and rows are gathered in its place."""
        cut = self.layout.size((ZERO_AXIS, TENSOR))
        return not self.region and self.plan.zero == 3 and self.degrees[ZERO_AXIS] > 1 and self.cfg.vocab % cut == 0


def in_region(accumulate: int, stages: int, reduce: Reduce | None) -> bool:
    """Whether a step of so many microbatches and stages of a pipeline gathers weights and reduces gradients once, in a region (`train.step.gradients`)."""
    return accumulate > 1 or stages > 1 or reduce is not None


@functools.lru_cache(maxsize=1024)
def _layout(plan: MeshPlan, devices: int, manual: tuple[str, ...]) -> Layout:
    layout = plan_layout(plan, devices)
    return layout.within(manual) if manual else layout


@functools.lru_cache(maxsize=1024)
def _indivisible(cfg: ModelConfig, plan: MeshPlan, devices: int) -> tuple[str, ...]:
    return tuple(indivisible(specs_of(cfg), plan.degrees(devices)))


def branch_counts(step: Step) -> Taken:
    """How often a device of `step.stage` takes the branches of a compiled step, for `lmeff.parallel.hlo.collectives`: those of a pipeline, and as a mean
    over steps those in which workers meet. Others are taken every time."""
    schedule, local = step.schedule, step.local

    def taken(found: Conditional) -> Sequence[float]:
        if local is not None and found.origin.endswith("shard_map/cond") and "while" not in found.origin:
            meets = [1 / local.every] * local.fragments
            # The last, after a run's last step, is there for several fragments.
            return [1 - sum(meets), *meets, 0][: found.count]
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
