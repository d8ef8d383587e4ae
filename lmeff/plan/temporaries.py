"""Bytes of temporaries that one device holds at the peak of a train step, by category.

A step is a few phases that follow each other: layers forward, the loss in chunks, layers backward, the optimizer; of a pipeline, the ops of a tick. Each
holds what goes from phase to phase (kept activations, gradients, weights that were gathered) and what lives at its own worst moment. The peak is the
largest sum of a phase. What lives at the worst moment of a block is a table of letters (`lmeff.plan.live`): which arrays exist is a matter of the code and
of the order that XLA runs it in, how large they are follows from the model and the mesh.
"""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import jax.numpy as jnp

from lmeff.compress.config import Quantize
from lmeff.distill.objectives import CHUNK, rows_at_once, shared_axes
from lmeff.models.config import ModelConfig
from lmeff.parallel.activations import layer_bytes, local_sizes
from lmeff.parallel.mesh import ZERO_AXIS, Layout
from lmeff.parallel.program import SlotCounts, slots
from lmeff.parallel.schedules import resolve
from lmeff.parallel.stash import STASHES
from lmeff.parallel.workload import Leaf, leaves_of
from lmeff.plan.job import Job, Shape
from lmeff.plan.live import (
    VECTOR_MEMORY,
    Live,
    Saved,
    arrives,
    attention_loop,
    ffn_backward,
    ffn_forward,
    loss_rows,
    total,
)

Bytes = dict[str, float]
FLOAT = 4  # bytes of a float32
SCRATCH = 64 * 2**20  # libtpu's `scoped_hbm_for_all_reduce`, 65,536 KiB in every program that was dumped (0.0.42.1)


def temporary_bytes(job: Job, stage: int = 0, *, family: str | None = None) -> dict[str, int]:
    """Bytes of temporaries on a device of that stage of the pipeline, at the step's peak, by category. All stages run one program and reserve alike.

    family: of TPUs (`lmeff.parallel.devices.FAMILIES`), whose chips keep so much of a block in their vector memory; None counts on none.
    """
    peak = max(_phases(job, family), key=_size)
    if job.platform == "tpu" and job.devices > 1:
        peak["scratch"] = SCRATCH
    return {name: round(size) for name, size in peak.items() if round(size)}


def reported_bytes(job: Job, *, family: str | None = None) -> int:
    """What `memory_analysis().temp_size_in_bytes` is to say of the step.

    On the CPU the sum of `temporary_bytes`. For TPUs it counts the holes of the block of temporaries once more, and takes for holes what the fullest of
    the program's other phases leaves free. A chip reserves the block once: this number is for comparison alone.
    """
    *others, peak = sorted(_size(phase) for phase in _phases(job, family))
    return round(2 * peak - others[-1] if job.platform == "tpu" else peak)


def _phases(job: Job, family: str | None) -> list[Bytes]:
    """Every phase by category; on TPUs less what is in the chip's vector memory, of what lives shortest."""
    device = Device(job=job)
    made = [phase(device) for phase in (STRAIGHT if device.schedule is None else PIPELINED)]
    for phase in made if job.platform == "tpu" else []:
        room = VECTOR_MEMORY.get(family or "", 0) * 2**20
        for name in [name for name in ("block", "logits", "teacher") if name in phase]:
            inside = min(room, phase[name])
            phase[name], room = phase[name] - inside, room - inside
    return made


def _size(phase: Bytes) -> float:
    return sum(phase.values())


class Tables(NamedTuple):
    """What is asked of a schedule: slices of the model, how many of them on a stage, and rows of the executor's buffers."""

    slices: int
    chunks: int
    slots: SlotCounts


@functools.cache
def _tables(name: str, stages: int, microbatches: int, chunks: int | None, until: Literal["B", "W"]) -> Tables:
    schedule = resolve(name, stages, microbatches, chunks)
    return Tables(schedule.slices, schedule.chunks, slots(schedule, until).counts)


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
        return _tables(plan.schedule, stages, self.job.accumulate, plan.chunks, STASHES[plan.stash].until)

    @property
    def region(self) -> bool:
        """Whether gradients are added up whole over fsdp, and reduced once."""
        return self.job.accumulate > 1 or self.schedule is not None or self.job.reduce is not None

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
    def leaves(self) -> list[Leaf]:
        """The parameters, sized whole over fsdp."""
        return leaves_of(self.cfg, self.device.layout)

    def elements(self, *, held: bool, stacked: bool | None = None) -> float:
        """Parameters, as the device holds them between steps (cut over fsdp) or whole over fsdp; of the stack of layers, of the rest, or all."""
        parts = self.device.job.degrees[ZERO_AXIS]
        return sum(
            leaf.elements / (parts if held and ZERO_AXIS in leaf.axes else 1)
            for leaf in self.leaves
            if stacked is None or stacked == leaf.path.startswith("blocks/")
        )

    @property
    def layers(self) -> int:
        """Layers on the device; of a pipeline those of all its slices, with padding."""
        schedule = self.device.schedule
        return self.cfg.layers if schedule is None else schedule.chunks * -(-self.cfg.layers // schedule.slices)

    @property
    def layer(self) -> float:
        """Parameters of one layer, whole over fsdp."""
        return self.elements(held=False, stacked=True) / max(leaf.layers for leaf in self.leaves)

    @property
    def experts(self) -> float:
        """Of these, those of experts."""
        own = [leaf for leaf in self.leaves if "/moe/" in leaf.path and "shared" not in leaf.path and leaf.is_matmul]
        return sum(leaf.elements / leaf.layers for leaf in own)

    def bytes(self, live: Live) -> float:
        """Of the arrays of a table."""
        return total(live, self.sizes, self.device.narrow)

    def kept(self, remat: str) -> float:
        """Bytes of one layer, from its forward to its backward pass."""
        device = self.device
        return layer_bytes(remat, self.cfg, device.layout, device.rows, device.job.tokens, device.job.policy.compute)

    @property
    def saved(self) -> Saved:
        """What the remat policy keeps, as the tables ask for it."""
        return Saved.of(self.device.remat, self.cfg)


# ---- what goes from phase to phase


def _through(device: Device, copies: int = 2) -> Bytes:
    """From the first layer's forward pass to the last one's backward pass: gradients, and in a region weights that are whole.

    copies: of gradients while microbatches are added up: the sum so far, and what a microbatch adds.
    """
    student, wide = device.student, jnp.dtype(device.job.policy.params).itemsize
    if not device.region and device.layout.platform == "tpu":
        return {"gradients": wide * (student.elements(held=True, stacked=True) + _heads(device))}
    if not device.region:
        return {"gradients": wide * student.elements(held=True)}
    copies = copies if device.job.accumulate > 1 and device.schedule is None else 1
    whole = student.elements(held=False)
    gathered = device.job.mesh.zero == 3 and device.job.degrees[ZERO_AXIS] > 1
    return {"gradients": copies * wide * whole, "gathered weights": wide * whole * gathered}


def _heads(device: Device) -> float:
    """Of TPUs, elements of the head's gradient, and where the loss turns the head, of its parameter and moments in the order of that gradient.

    The embedding's gradient is made last, where nothing else is left. On the CPU it is zeroed before the layers begin.
    """
    cfg = device.student.cfg
    turned = bool(shared_axes(device.layout, cfg)) and not cfg.tied
    vocabulary = cfg.vocab // device.layout.size(("tensor",)) * cfg.width
    return vocabulary / (device.job.degrees[ZERO_AXIS] if device.job.mesh.zero == 3 else 1) * (3 if turned else 1)


def _layer_weights(device: Device, part: Part) -> Bytes:
    """One layer as its products want it: whole over fsdp, cast, transposed. A TPU fetches the next one meanwhile."""
    if device.layout.platform != "tpu":
        # A loop over blocks of rows adds up the gradients of experts, all of them, in float32.
        more = part.experts * FLOAT if part.cfg.moe is not None and part.cfg.moe.capacity is None else 0
        return {"gathered weights": device.narrow * part.layer, "block": more}
    own = part.sizes["H"] * part.cfg.head_size * part.cfg.width  # attention's last matrix, gathered
    if device.region or part.elements(held=True) == part.elements(held=False):
        return {"gathered weights": device.narrow * part.layer}
    if arrives(device.layout):  # gradients go round as float32 parts, two at a time
        return {"gathered weights": device.narrow * own + 2 * FLOAT * part.layer / device.job.degrees[ZERO_AXIS]}
    ffn = sum(leaf.elements / leaf.layers for leaf in part.leaves if leaf.path.split("/")[1:2] in (["mlp"], ["moe"]))
    return {
        "gathered weights": device.narrow * own,
        "gradients": FLOAT * ffn,
    }  # of the ffn, whole until they are reduced


def _compression(device: Device) -> Bytes:
    """Learned scales are repeated to the shape of a layer's weights, and their gradients come from arrays of that shape."""
    learned = any(isinstance(t, Quantize) and t.method == "lsq" for t in device.job.student.recipe.transforms)
    return {"compression": 2 * FLOAT * device.student.layer * learned}


def _sum(*parts: Bytes) -> Bytes:
    return {
        name: sum(part.get(name, 0) for part in parts)
        for name in dict.fromkeys(name for part in parts for name in part)
    }


# ---- phases without a pipeline


def backward(device: Device) -> Bytes:
    """The ffn of the last layer, going back: all layers' activations are still kept."""
    student = device.student
    block = max(map(student.bytes, ffn_backward(device.layout, student.cfg, student.saved)))
    kept = {"kept activations": student.layers * student.kept(device.remat)}
    own = {"block": block + student.bytes(attention_loop(device.layout))}
    return _sum(_through(device), _layer_weights(device, student), _compression(device), kept, own)


def forward(device: Device) -> Bytes:
    """The ffn of the last layer, going forward."""
    student = device.student
    kept = {"kept activations": student.layers * student.kept(device.remat)}
    through = _through(device, copies=1) if device.region else {}
    return _sum(through, kept, {"block": student.bytes(ffn_forward(device.layout, student.cfg))})


def loss(device: Device) -> Bytes:
    """A chunk of tokens: logits and what becomes of them, the head's gradient, hidden states; a teacher's beside the student's.

    XLA makes room for gradients when the backward pass begins; of a region those of earlier microbatches are there.
    """
    student = device.student
    kept = {"kept activations": student.layers * student.kept(device.remat)}
    through = _through(device, copies=1) if device.region else {}
    return _sum(through, kept, {"logits": student.bytes({"BtD": (2, 0)})}, _chunk(device))


def _chunk(device: Device) -> Bytes:
    """Of a chunk: N rows of V logits, the head in float32 and its gradient so far and of the chunk."""
    found: Bytes = {}
    for part, name in ((device.student, "logits"), (device.teacher, "teacher")):
        if part is None:
            continue
        layout, cfg = device.layout, part.cfg
        shared = () if device.region else shared_axes(layout, cfg)
        cut = layout.size((*shared, "tensor")) if cfg.vocab % layout.size((*shared, "tensor")) == 0 else 1
        rows = min(rows_at_once(CHUNK, layout, cfg, shared), part.sizes["B"] * part.sizes["T"]) * layout.size(shared)
        logits, heads = loss_rows(layout, name == "teacher", device.teacher is not None)
        found[name] = FLOAT * cfg.vocab / cut * (logits * rows + heads * cfg.width) + device.narrow * rows * cfg.width
    return found


def teaching(device: Device) -> Bytes:
    """A layer of the teacher, going forward while the student's activations are kept."""
    student, teacher = device.student, device.teacher
    if teacher is None:
        return {}
    kept = {"kept activations": student.layers * student.kept(device.remat)}
    own = {"teacher": teacher.bytes(ffn_forward(device.layout, teacher.cfg)) + device.narrow * teacher.layer}
    return _sum(_through(device) if device.region else {}, kept, own)


def update(device: Device) -> Bytes:
    """The optimizer: clipping by the global norm has it wait for all gradients. On the CPU updates are as large; a TPU adds them as it makes them."""
    student, wide = device.student, jnp.dtype(device.job.policy.params).itemsize
    if device.region:  # whole until they are reduced
        return {"gradients": wide * student.elements(held=False)}
    if device.layout.platform == "tpu":
        return _through(device)
    held = student.elements(held=True)
    return {"gradients": wide * held, "optimizer update": FLOAT * held}


# ---- phases of a pipeline


def pipelined_backward(device: Device) -> Bytes:
    """B with the loss: a slice's residuals and the stash and pending buffers, which a branch of the tick has twice: as it got them and as it leaves them."""
    student = device.student
    kept = {"kept activations": _slice_layers(device) * student.kept(device.remat)}
    return _sum(_through(device), _layer_weights(device, student), kept, stashes(device), _chunk(device))


def _slice_layers(device: Device) -> int:
    assert device.schedule is not None
    return -(-device.student.cfg.layers // device.schedule.slices)


def stashes(device: Device) -> Bytes:
    """The buffers of the executor: rows of `lmeff.parallel.program.SlotCounts`, and a spare one each."""
    student, plan = device.student, device.job.mesh
    assert device.schedule is not None
    rows = device.schedule.slots
    layers = _slice_layers(device)
    stream = student.bytes({"BtD": (1, 0)}) * (
        1 if device.teacher is None else 1 + device.teacher.cfg.width / student.cfg.width
    )
    inputs, outputs = (layers * student.bytes(table) for table in (_inputs(student.cfg), _outputs(student.cfg)))
    if plan.stash == "input":
        stash, pending = stream, inputs + outputs
    else:
        stash, pending = stream + layers * student.kept(device.remat) + inputs, outputs
    twice = 2 * ((rows.stash + 1) * stash + (rows.pending + 1) * pending)
    return {"stash": twice + (rows.activation + rows.gradient + 2) * stream}


def _inputs(cfg: ModelConfig) -> Live:
    """What the products of a layer multiply, each array once; those of experts are their own."""
    ffn = {"BTD": (2, 0), "BTF": (1, 0)} if cfg.moe is None else {"BTD": (1, 0)}
    return {"BTHC": (1, 0), **ffn}


def _outputs(cfg: ModelConfig) -> Live:
    """What they give."""
    ffn = {"BTF": (1 + cfg.gated, 0), "BTD": (2, 0)} if cfg.moe is None else {"BTD": (1, 0)}
    return {"BTHC": (1, 0), "BTKC": (2, 0), **ffn}


STRAIGHT = (forward, backward, loss, teaching, update)
PIPELINED = (pipelined_backward, update)
