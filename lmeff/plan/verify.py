"""The compiler's word: the job's own train step compiled for real devices or a TPU topology, its memory and collectives beside the prediction.

What a TPU's compiler checks against a chip's memory is arguments + constants + temporaries of HLO + scratch of fused collectives + the program's code. It tells
that sum only where it is too much. `memory_analysis()` gives numbers around it: `temp_size_in_bytes` is the block of temporaries, and the same block's
holes once more, and the scratch; `peak_memory_in_bytes` leaves the holes and the scratch out, and counts the chip's vector memory (at most 128 MiB) in.
So a program that compiles fits, whatever the sum of these numbers, and one that does not fit is refused here by `DoesNotFit`.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lmeff.core.errors import ConfigError, DoesNotFit
from lmeff.parallel.collective import Collective, volumes
from lmeff.parallel.devices import topology
from lmeff.parallel.hlo import Taken, collectives
from lmeff.parallel.mesh import make_layout
from lmeff.parallel.workload import branch_counts
from lmeff.plan.entry import arguments_of
from lmeff.plan.estimate import Memory
from lmeff.plan.job import Job
from lmeff.plan.program import compiled
from lmeff.plan.state import CATEGORIES, OTHER, category_of, host_bytes, state_bytes
from lmeff.plan.temporaries import reported_bytes
from lmeff.report import words

NEEDED = re.compile(
    r"Used ([\d.]+\w) of ([\d.]+\w) hbm|temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)"
)
LARGEST = re.compile(r"1\. Size: ([\d.]+\w+)\s+(?:Operator: op_name=\"([^\"]*)\"|XLA label: (\S+))")


class Row(NamedTuple):
    """A quantity as predicted and as compiled, in bytes on one device. difference: (predicted - compiled) / compiled; 0 where both are nothing."""

    name: str
    predicted: int
    compiled: int

    @property
    def difference(self) -> float:
        return (self.predicted - self.compiled) / max(self.compiled, 1)


class Verification(NamedTuple):
    """What the compiler says of a job's step, in bytes on one device, and what was predicted.

    where:       the topology, or the kind and number of devices.
    argument:    the state, the batch and what is frozen; arguments: the same by category, as `state_bytes` has them.
    output, alias: results, and how much of them lies where an argument lay.
    temp:        besides; on TPUs with the holes in the block of temporaries counted twice (see the module).
    reported:    what `temp` was predicted to be; less than that is reserved (`lmeff.plan.temporaries`).
    peak:        the largest sum of live buffers; None where the backend does not tell it, as a CPU's, which leaves temporaries out.
    host:        arguments and temporaries in the host's memory. code: of the program.
    seconds:     of compilation, tracing included.
    collectives: `{kind: {"axis+axis": bytes}}` that a device sends in a step, read off the program. On TPUs XLA turns gathers around a product into permutes.
    unknown:     collectives in loops that do not tell how often they run; they are counted once.
    """

    where: str
    argument: int
    arguments: dict[str, int]
    output: int
    alias: int
    temp: int
    reported: int
    peak: int | None
    host: int
    code: int
    seconds: float
    collectives: dict[str, dict[str, float]]
    unknown: int
    predicted: Memory

    @property
    def total(self) -> int:
        """Arguments, results that lie nowhere else, and temporaries."""
        return self.argument + self.output - self.alias + self.temp

    @property
    def rows(self) -> tuple[Row, ...]:
        """Each category of arguments, then arguments, temporaries and their total on the device; what is live at the peak, with no hole counted twice; and
        what lies on the host. Without those of which there is nothing."""
        state = sum(self.predicted.state.values())
        categories = [name for name in (*CATEGORIES, OTHER) if name in self.predicted.state or name in self.arguments]
        rows = (
            *(Row(name, self.predicted.state.get(name, 0), self.arguments.get(name, 0)) for name in categories),
            Row("arguments", state, self.argument),
            Row("temporaries", self.reported, self.total - self.argument),
            Row("total", state + self.reported, self.total),
            *([] if self.peak is None else [Row("live at the peak", self.predicted.of_step, self.peak)]),
            Row("in the host's memory", self.predicted.host, self.host),
        )
        return tuple(row for row in rows if row.predicted or row.compiled)

    def to_json(self) -> dict[str, Any]:
        """`{"compiled": ...}`, to be laid beside what `Estimate.to_json` gives."""
        numbers = ("argument", "output", "alias", "temp", "reported", "total", "peak", "host", "code")
        return {
            "compiled": {
                "where": self.where,
                **{f"{name}_bytes": getattr(self, name) for name in numbers},
                "arguments": self.arguments,
                "seconds": round(self.seconds, 1),
                "collective_bytes": self.collectives,
                "collectives_of_unknown_count": self.unknown,
                "compared": [{**row._asdict(), "difference": row.difference} for row in self.rows],
            }
        }


def verify(job: Job, where: str | Sequence[Any], predicted: Memory | None = None) -> Verification:
    """Compiles the job's train step for a TPU topology by name ("v5e:4x4"), or for devices, and reads off what it takes.

    predicted: what to blame where it does not fit; where None, the state alone, which is exact.
    Raises `DoesNotFit` where the compiler finds too little memory, `ConfigError` for what cannot be cut over these devices. Nothing is allocated.
    """
    devices = topology(where) if isinstance(where, str) else list(where)
    job = job.changed(devices=len(devices), platform=devices[0].platform)
    name = where if isinstance(where, str) else f"{len(devices)} x {devices[0].device_kind}"
    layout = make_layout(job.mesh, devices)
    predicted = predicted or Memory(0, state_bytes(job), {}, host_bytes(job))
    began = time.perf_counter()
    try:
        program = compiled(job, layout)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(refusal(str(error), name, predicted)) from error
    seconds = time.perf_counter() - began
    memory, text = program.memory_analysis(), program.as_text()
    sent, unknown = _sent(collectives(text, _branches(job, predicted.stage)), layout.mesh.shape)
    return Verification(
        where=name,
        argument=memory.argument_size_in_bytes,
        arguments=_by_category(text),
        output=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        reported=reported_bytes(job, family=where.split(":")[0] if isinstance(where, str) else None),
        peak=None if job.platform == "cpu" else getattr(memory, "peak_memory_in_bytes", None),
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        seconds=seconds,
        collectives=sent,
        unknown=unknown,
        predicted=predicted,
    )


def _by_category(text: str) -> dict[str, int]:
    """Bytes of the arguments on the device."""
    found: dict[str, int] = {}
    for argument in arguments_of(text):
        if not argument.host:
            category = category_of(argument.name, argument.dtype == "pred", math.prod(argument.shape) == 1)
            found[category] = found.get(category, 0) + argument.bytes
    return found


def _branches(job: Job, stage: int) -> Taken | None:
    """How often a device of this stage takes the branches of a pipeline; None, every branch always, where no formula says so."""
    try:
        return branch_counts(job.step(stage)) if job.degrees["pipe"] > 1 else None
    except ConfigError:
        return None


def _sent(found: Sequence[Collective], mesh: Mapping[str, int]) -> tuple[dict[str, dict[str, float]], int]:
    """(bytes that a device sends by kind and axes, how many collectives are in loops that do not tell how often they run)."""
    unknown = sum(bool(np.isnan(c.times)) for c in found)
    counted = [dataclasses.replace(c, times=1) if np.isnan(c.times) else c for c in found]
    table: dict[str, dict[str, float]] = {}
    for (kind, axes), sent in sorted(volumes(counted, mesh).items()):
        table.setdefault(kind, {})["+".join(axes)] = sent
    return table, unknown


def refusal(message: str, where: str, predicted: Memory) -> str:
    """What the compiler says when it runs out of memory, as one paragraph: how much is missing, what is to blame, what to change."""
    told, largest = NEEDED.search(message), LARGEST.search(message)
    needed, capacity = [part for part in told.groups() if part] if told else ("more", "what there is")
    parts = predicted.parts
    category, size = max(parts.items(), key=lambda item: item[1])
    allocation = f"; the compiler's largest allocation is {largest[1]} ({largest[2] or largest[3]})" if largest else ""
    return (
        f"{where}: the step needs {needed} of a device's {capacity}, expected it to fit. The largest part, as predicted, is '{category}' with "
        f"{words.size(size)}{allocation}. {REMEDIES.get(category, ACTIVATIONS)}"
    )


ACTIVATIONS = (
    "Set train.remat to full, lower train.batch, or raise mesh.context or mesh.tensor; train.accumulate helps where a device has room for whole "
    "weights and gradients."
)
REMEDIES = {
    "parameters": "Cut them over more devices (mesh.fsdp at mesh.zero = 3, mesh.tensor, mesh.pipe), or store them in bfloat16 (precision).",
    "optimizer": "Cut it over more devices (mesh.fsdp), set optim.offload or precision state=bfloat16, or take an optimizer with less state.",
    "average": "Cut it over more devices (mesh.fsdp), or do without optim.ema.",
    "masks": "Cut them over more devices (mesh.fsdp, mesh.tensor, mesh.pipe).",
    "scales": "Let more weights share a scale (compress), or cut them over more devices (mesh.tensor, mesh.pipe).",
    "reducer": "Use train.reduce of method int8, which keeps nothing, or cut the model over mesh.tensor or mesh.pipe.",
    "outer": "Cut the model over more devices (mesh.fsdp), with fewer workers.",
    "teacher": "Take an exported (packed) teacher, or cut it over more devices (mesh.fsdp at mesh.zero = 3, mesh.tensor).",
    "start": "Let the stage load the model itself (load in place of start), or cut the model over more devices (mesh.fsdp at mesh.zero = 3).",
    "gradients": "Cut them over more devices (mesh.fsdp at mesh.zero = 2 or 3, mesh.tensor, mesh.pipe).",
    "gathered weights": "Cut the model over mesh.tensor or mesh.pipe, and not over mesh.fsdp alone.",
}
