"""What a device holds of a job: the sizes of letters, of weights, and of what its pipeline keeps in buffers. Needs no devices."""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import jax.numpy as jnp

from lmeff.models.config import ModelConfig
from lmeff.parallel.activations import layer_bytes, local_sizes, stored_sizes
from lmeff.parallel.members import Leaf, leaves_of
from lmeff.parallel.mesh import ZERO_AXIS, Layout
from lmeff.parallel.program import SlotCounts, slots
from lmeff.parallel.schedules import is_file, resolve
from lmeff.parallel.stages import slice_layers
from lmeff.parallel.stash import STASHES
from lmeff.parallel.workload import in_region
from lmeff.plan.job import Job, Shape
from lmeff.plan.live import Live, Saved, total


class Tables(NamedTuple):
    """What is asked of a schedule: slices of the model, how many of them on a stage, and rows of the executor's buffers."""

    slices: int
    chunks: int
    slots: SlotCounts


def _tables(name: str, stages: int, microbatches: int, chunks: int | None, until: Literal["B", "W"]) -> Tables:
    schedule = resolve(name, stages, microbatches, chunks)
    return Tables(schedule.slices, schedule.chunks, slots(schedule, until).counts)


_known_tables = functools.lru_cache(maxsize=4096)(_tables)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device has of a job: the sizes of letters, and of weights."""

    job: Job

    @cached_property
    def layout(self) -> Layout:
        """Without devices."""
        return self.job.layout

    @property
    def narrow(self) -> int:
        """Bytes of a number in the dtype of compute."""
        return jnp.dtype(self.job.policy.compute).itemsize

    @property
    def rows(self) -> int:
        """Of a microbatch, on all devices."""
        return self.job.rows // self.job.accumulate

    @cached_property
    def schedule(self) -> "Tables | None":
        """Of the pipeline."""
        plan, stages = self.job.mesh, self.job.degrees["pipe"]
        if stages == 1:
            return None
        tables = _tables if is_file(plan.schedule) else _known_tables  # a file may change
        return tables(plan.schedule, stages, self.job.accumulate, plan.chunks, STASHES[plan.stash].until)

    @property
    def region(self) -> bool:
        """Whether gradients are added up whole over fsdp, and reduced once."""
        return in_region(self.job.accumulate, self.job.degrees["pipe"], self.job.reduce)

    @cached_property
    def student(self) -> "Part":
        """The model that is trained."""
        return Part(device=self, shape=self.job.student)

    @cached_property
    def teacher(self) -> "Part | None":
        """The model that is imitated."""
        return None if self.job.teacher is None else Part(device=self, shape=self.job.teacher)

    @cached_property
    def remat(self) -> str:
        """The policy, a budget resolved."""
        return self.job.policy_of_remat


@dataclass(frozen=True, kw_only=True)
class Part:
    """A model's share of a device."""

    device: Device
    shape: Shape

    @property
    def cfg(self) -> ModelConfig:
        """Sizes of the whole model."""
        return self.shape.cfg

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By letter, for a microbatch."""
        return local_sizes(self.cfg, self.device.layout, self.device.rows, self.device.job.tokens)

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The parameters, sized whole over fsdp."""
        return leaves_of(self.cfg, self.device.layout)

    def elements(self, *, held: bool, stacked: bool | None = None) -> float:
        """Parameters, as the device holds them between steps (cut over fsdp) or whole over fsdp; of the stack of layers, of the rest, or all."""
        parts = self.device.job.degrees[ZERO_AXIS]
        return sum(
            leaf.part(parts) if held else leaf.elements
            for leaf in self.leaves
            if stacked is None or stacked == leaf.in_block
        )

    @property
    def layers(self) -> int:
        """Layers on the device; of a pipeline those of all its slices, with padding."""
        schedule = self.device.schedule
        return self.cfg.layers if schedule is None else schedule.chunks * slice_layers(self.cfg.layers, schedule.slices)

    @property
    def layer(self) -> float:
        """Parameters of one layer, whole over fsdp."""
        return self.elements(held=False, stacked=True) / max(leaf.layers for leaf in self.leaves)

    @property
    def experts(self) -> float:
        """Of these, those of experts."""
        return sum(leaf.elements / leaf.layers for leaf in self.leaves if leaf.routed and leaf.is_matmul)

    def bytes(self, live: Live) -> float:
        """Of the arrays of a table, of which only those of heads have the letter C, their last."""
        return total(live, stored_sizes(self.sizes, self.device.layout.platform), self.device.narrow)

    def kept(self, remat: str) -> float:
        """Bytes of one layer, from its forward to its backward pass."""
        device = self.device
        return layer_bytes(remat, self.cfg, device.layout, device.rows, device.job.tokens, device.job.policy.compute)

    @property
    def saved(self) -> Saved:
        """What the remat policy keeps, as the tables ask for it."""
        return Saved.of(self.device.remat, self.cfg)
