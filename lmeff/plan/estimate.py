"""What a plan answers: the values that counting, memory, traffic and time give, and that tables, JSON and pages show."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lmeff.plan.job import Job


class Site(NamedTuple):
    """One product (or another kind of work) of a forward pass over the whole global batch, all layers and microbatches, on all devices together.

    name:     of the site, such as "attn.q", "mlp.up", "head", "attention", "embed".
    kind:     "product" (activations times weights), "attention" (scores and values), "lookup", "elementwise".
    equation: of the einsum; "" where there is none.
    layers:   in how many layers it runs.
    flops:    of the forward pass, dense; attention is counted full (every query with every key), experts with a capacity by slots.
    visible:  share of `flops` that is not masked away: the causal (windowed) part of attention, 1 for others.
    dense:    share of the weight that is not pruned, 1 where nothing is.
    reads:    bytes of operands that a forward pass reads once, {"activation": n, "weight": n}; of the weights of all layers, once a microbatch.
    writes:   bytes of the result.
    format:   of the arithmetic: "float32", "bfloat16", "int8", "fp8".
    """

    name: str
    kind: str
    equation: str
    layers: int
    flops: float
    visible: float
    dense: float
    reads: dict[str, float]
    writes: float
    format: str


class Work(NamedTuple):
    """FLOPs of one train step, all devices together.

    sites:      of the student's forward pass.
    teacher:    of the teacher's.
    parts:      everything that runs, adding up to `hardware`: "forward", "backward", "recompute", "attention forward", "attention backward", "teacher",
                "compression", "optimizer", and "padding" where a pipeline runs layers that are none. Attention is counted causal here: kernels skip masked
               blocks.
    model_full: FLOPs of forward and backward without recomputation, attention full (PaLM's convention for MFU).
    model_causal: the same with the causal part of attention alone.
    hardware:   FLOPs that run: with recomputation, teacher, compression and optimizer (HFU).
    effective:  model_causal without what pruned weights multiply.
    six_nd:     6 x active parameters x tokens (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361).
    """

    sites: tuple[Site, ...]
    teacher: tuple[Site, ...]
    parts: dict[str, float]
    model_full: float
    model_causal: float
    hardware: float
    effective: float
    six_nd: float


class Memory(NamedTuple):
    """Bytes on one device of a pipeline's stage (of 0 where there is no pipeline), by category.

    state:       what the step is given and keeps: "parameters", "optimizer", "average", "masks", "scales", "reducer", "teacher", "batch", ...
    temporaries: what lives at the step's peak besides: "gradients", "gathered weights", "kept activations", "block", "logits", "stash", "optimizer update", ...
    host:        bytes in the host's memory (offload).
    held:        what lies there beside the step while it runs: "start", the weights that the stage began from, where they are another artifact's.
    """

    stage: int
    state: dict[str, int]
    temporaries: dict[str, int]
    host: int = 0
    held: Mapping[str, int] = MappingProxyType({})

    @property
    def parts(self) -> dict[str, int]:
        """All categories on the device, what stays first."""
        return {**self.state, **self.held, **self.temporaries}

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())

    @property
    def of_step(self) -> int:
        """Those of the step alone."""
        return self.total - sum(self.held.values())


class Flow(NamedTuple):
    """Bytes that a device sends in one step.

    kind:    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", or "copy" to and from the host's memory.
    axes:    of the mesh. loop: "step", "microbatch", "layer" or "tick".
    network: "ici", "dcn", "nvlink" or "host memory": the slowest that these axes cross.
    seconds: of all of them, nothing overlapped.
    """

    kind: str
    axes: tuple[str, ...]
    loop: str
    network: str
    bytes: float
    seconds: float


class SiteTime(NamedTuple):
    """Seconds a device spends at a site in one step, forward, backward and recomputed together: bounds of the roofline.

    bound: "compute", "memory" or "network": the largest of the three.
    """

    name: str
    flops: float
    bytes: float
    compute: float
    memory: float
    bound: str


class StepTime(NamedTuple):
    """Seconds of one step: `low` overlaps everything at full rates, `high` overlaps nothing at the rates that programs reach; `middle` is the guess.

    parts:  seconds by cause: "compute", "memory", "network", "bubble", "optimizer", "host".
    """

    low: float
    middle: float
    high: float
    sites: tuple[SiteTime, ...]
    parts: dict[str, float]
    tokens_per_second: float
    mfu_full: float
    mfu_causal: float
    hfu: float


class Energy(NamedTuple):
    """Of the whole run. joules: by cause, of one step; kwh: of all steps, with the assumptions that were used; ceiling: kWh at full power all the time."""

    joules: dict[str, float]
    kwh: float
    chip_hours: float
    assumptions: dict[str, float]
    ceiling: float = float("inf")


class Estimate(NamedTuple):
    """Everything about one job on one kind of chip.

    chip:     its name in `lmeff.plan.hardware`.
    memory:   of the first, a middle and the last stage of the pipeline, one without a pipeline.
    capacity: bytes of a device that programs can use.
    notes:    in words: what binds, what to change.
    """

    job: Job
    chip: str
    parameters: int
    active_parameters: int
    work: Work
    memory: tuple[Memory, ...]
    capacity: int
    flows: tuple[Flow, ...]
    time: StepTime
    energy: Energy
    notes: tuple[str, ...]

    @property
    def peak(self) -> Memory:
        """Of the fullest device."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """Whether the fullest device has room."""
        return self.peak.total <= self.capacity

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; the keys that `lmeff plan --json` promises."""
        return {
            "stage": self.job.name,
            "chip": self.chip,
            "devices": self.job.devices,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "flops_per_step": {
                **self.work.parts,
                "model_full": self.work.model_full,
                "model_causal": self.work.model_causal,
            },
            "bytes_per_device": {**self.peak.parts, "total": self.peak.total},
            "capacity": self.capacity,
            "collective_bytes": collective_bytes(self.flows),
            "step_seconds": {"low": self.time.low, "middle": self.time.middle, "high": self.time.high},
            "energy_kwh": self.energy.kwh,
            "fits": self.fits,
            "notes": list(self.notes),
        }


def collective_bytes(flows: tuple[Flow, ...]) -> dict[str, dict[str, float]]:
    """`{kind: {axes: bytes}}` of a step, between devices."""
    found: dict[str, dict[str, float]] = {}
    for flow in flows:
        if flow.network == "host memory":
            continue
        row = found.setdefault(flow.kind, {})
        axes = "+".join(flow.axes)
        row[axes] = row.get(axes, 0) + flow.bytes
    return found
