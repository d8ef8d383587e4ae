"""Seconds of a step: for every site the time of its arithmetic and of its bytes, then what the network, the pipeline and the optimizer add.

Three answers. `low`: the longest of computing, memory, network and host at full rates, the others hidden behind it. `high`: one after the other, at the rates
of `SLOW`. `middle`: the rates of `USUAL`, with these rules:

- a product reads its operands while it computes: the longer of the two counts (in `low` and `high`, too);
- weights gathered inside the loop over layers arrive while other layers compute;
- gradients reduced inside that loop leave during the backward pass, two thirds of the time;
- keys that go round a ring arrive while a block of attention computes;
- all else waits: collectives of activations over tensor and expert, whatever runs once a step or once a microbatch, and permutes between the ticks of a
  pipeline;
- activations on their way to the host and back overlap with computing, moments of the optimizer do not.

A pipeline's tick lasts as long as its slowest stage (`lmeff.plan.ticks`). The optimizer, and norms and gates between products, only move bytes.
Operands are taken to come from HBM: a model so small that activations stay on the chip can be faster than `low` where memory binds.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lmeff.core.dims import split_einsum
from lmeff.parallel.devices import Topology
from lmeff.parallel.mesh import BATCH_AXES, ZERO_AXIS
from lmeff.parallel.workload import PIPE, TENSOR
from lmeff.plan.estimate import Flow, Site, SiteTime, StepTime, Work
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.slices import ways
from lmeff.plan.state import optimizer_bytes
from lmeff.plan.ticks import Passes, schedule_seconds
from lmeff.plan.traffic import COPY, HOST, owned, total


class Rates(NamedTuple):
    """Shares of the peak rates that programs reach."""

    compute: float
    memory: float
    network: float


FULL = Rates(1.0, 1.0, 1.0)
# Published dense runs: MFU of 65% (MaxText, Llama 2 70B on 512 v5p), 58% and 52% (TorchTitan, 8B and 70B on 64 A100), 50% and 45% (MaxText, 70B and 8B on
# 256 v6e), 54% (Korthikanti et al. 2022, 530B on 2240 A100). `USUAL` is fitted to the first five, not measured: it puts them within a fifth
# (tests/plan/test_roofline.py). The slowest that is known, TorchTitan's 8B without a compiler on H100s held at 500 W, reaches 36%: `SLOW` is below it.
USUAL = Rates(0.7, 0.8, 0.8)
SLOW = Rates(0.4, 0.5, 0.5)


class Cost(NamedTuple):
    """What a device does at a site in a step. runs: forward passes' worth of it, forward, backward and recomputed."""

    site: Site
    flops: float
    bytes: float
    runs: float
    compute: float
    memory: float

    def seconds(self, rates: Rates) -> float:
        """The longer of the two bounds."""
        return max(self.compute / rates.compute, self.memory / rates.memory)


def step_time(job: Job, chip: Chip, work: Work, flows: Sequence[Flow], topology: Topology | None = None) -> StepTime:
    """Of a job whose FLOPs and flows are known; a topology is checked, for the flows must be of the same one.

    `parts` are seconds at full rates, nothing overlapped; "bubble" is what stages of a pipeline wait.
    """
    ways(job.degrees, chip, topology)
    costs, between = costs_of(job, chip, work), elementwise(job, chip, work)
    update = update_seconds(job, chip)
    low, middle, high = (_total(job, costs, between, update, flows, rates) for rates in (FULL, USUAL, SLOW))
    parts = {
        "compute": sum(cost.compute for cost in costs),
        "memory": sum(cost.memory for cost in (*costs, between)),
        "network": total(flows),
        "bubble": _bubble(job, costs),
        "optimizer": update,
        "host": _sum(f for f in flows if f.network == HOST),
    }
    # The peak of the sheet for the format that the job computes in: MFU's convention.
    peak = chip.chips(job.devices) * chip.rate(format_of(job.policy.compute))
    shares = (count / (middle * peak) for count in (work.model_full, work.model_causal, work.hardware))
    rate = job.rows * job.tokens / middle
    return StepTime(low, middle, high, _site_times(costs, between, flows), parts, rate, *shares)


def _total(job: Job, costs: Sequence[Cost], between: Cost, update: float, flows: Sequence[Flow], rates: Rates) -> float:
    passes = _passes(costs, rates)
    computing = schedule_seconds(job, passes)
    network, host = total(flows), _sum(f for f in flows if f.network == HOST)
    if rates is FULL:  # norms and gates may all be fused into products
        return max(computing, sum(cost.memory for cost in costs) + update, network, host)
    computing += between.memory / rates.memory
    waits = network / rates.network + host if rates is SLOW else exposed(flows, computing, rates)
    return computing + update / rates.memory + waits


def _bubble(job: Job, costs: Sequence[Cost]) -> float:
    """Seconds at full rates that stages of a pipeline wait."""
    if job.degrees[PIPE] == 1:
        return 0.0
    return max(0.0, schedule_seconds(job, _passes(costs, FULL)) - sum(cost.seconds(FULL) for cost in costs))


def exposed(flows: Iterable[Flow], computing: float, rates: Rates) -> float:
    """Seconds of flows that nothing hides, by the rules above."""
    found: dict[str, float] = dict.fromkeys(("gather", "reduce", "copy", "wait"), 0.0)
    for flow in flows:
        found[_hides(flow)] += flow.seconds if flow.network == HOST else flow.seconds / rates.network
    late = max(0.0, found["reduce"] - BACKWARD_SHARE * computing)
    over = max(late, found["gather"] + found["reduce"] - computing)
    return found["wait"] + over + max(0.0, found["copy"] - computing)


def _hides(flow: Flow) -> str:
    """What a flow can hide behind: "gather" and "copy" behind all computing, "reduce" behind the backward pass, "wait" behind nothing."""
    if flow.loop != "layer":
        return "wait"
    if flow.kind == COPY:
        return "copy"
    if flow.kind in ("all-gather", "all-to-all") and flow.axes == (ZERO_AXIS,):
        return "gather"
    if flow.kind == "collective-permute":
        return "gather"
    reduces = flow.kind in ("reduce-scatter", "all-reduce") and set(flow.axes) <= {*BATCH_AXES, "context"}
    return "reduce" if reduces else "wait"


def costs_of(job: Job, chip: Chip, work: Work) -> list[Cost]:
    """Every site of the student's step, and of the teacher's forward pass."""
    student = _runs(work)
    found = [
        _cost(job, chip, site, student["attention" if site.kind == "attention" else "product"]) for site in work.sites
    ]
    return found + [_cost(job, chip, site._replace(name=f"teacher {site.name}"), 1.0) for site in work.teacher]


def _runs(work: Work) -> dict[str, float]:
    """How many forward passes' worth a step runs. What is recomputed is spread over all that could be."""
    parts = work.parts
    forward, attention = parts["forward"], parts.get("attention forward", 0.0)
    again = parts.get("recompute", 0.0) / (forward + attention) if forward else 0.0
    behind = parts.get("attention backward", 0.0) / attention if attention else 0.0
    return {"product": 1 + parts["backward"] / forward + again if forward else 0.0, "attention": 1 + behind + again}


def _cost(job: Job, chip: Chip, site: Site, runs: float) -> Cost:
    chips = chip.chips(job.devices)
    flops = runs * site.flops * site.visible / job.devices
    moved = runs * local_bytes(site, job)
    rate = chip.rate(format_of(site.format))
    share = job.devices / chips  # devices that share a chip
    return Cost(site, flops, moved, runs, flops * share / rate, moved * share / chip.bandwidth)


def local_bytes(site: Site, job: Job) -> float:
    """Bytes that a device reads and writes at a site in a forward pass.

    Activations are cut over all devices, but tensor cuts only what has one of its letters. Weights are read whole by every device that shares neither
    heads, neurons, layers nor experts with others.
    """
    degrees = job.degrees
    left, right, out = split_einsum(site.equation) if site.equation else ("H", "H", "H")
    each = {letters: degrees[TENSOR] if not set(letters) & set("HKFV") else 1 for letters in (left, out)}
    activations = (site.reads.get("activation", 0.0) * each[left] + site.writes * each[out]) / job.devices
    cuts = degrees[TENSOR] if set(right) & set("HKFV") else 1
    cuts *= degrees["expert"] if "E" in right else 1
    cuts *= degrees[PIPE] if site.layers > 1 else 1
    weights = site.reads.get("weight", 0.0)
    return activations + (weights / job.devices if site.kind == "lookup" else weights / cuts)


def elementwise(job: Job, chip: Chip, work: Work) -> Cost:
    """What norms, residuals, rotations and gates move where nothing is fused into products; and transforms of weights, where there are any.

    A layer's forward pass reads and writes the stream four times over, rotates queries and keys, and reads and writes the hidden states of the ffn.
    """
    cfg = job.cfg
    wide = cfg.ffn * (cfg.moe.top_k + cfg.moe.shared if cfg.moe else 1) * (3 if cfg.gated else 2)
    numbers = cfg.layers * (8 * cfg.width + 2 * (cfg.heads + cfg.kv_heads) * cfg.head_size + wide)
    width = jnp.dtype(job.policy.compute).itemsize
    runs = _runs(work)["product"]
    moved = runs * numbers * width * job.rows * job.tokens / job.devices
    if work.parts.get("compression"):
        weights = sum(site.reads.get("weight", 0.0) for site in work.sites if site.kind == "product")
        moved += 2 * runs * weights / (job.degrees[TENSOR] * job.degrees[PIPE])
    site = Site("elementwise", "elementwise", "", cfg.layers, 0.0, 1.0, 1.0, {}, 0.0, format_of(job.policy.compute))
    seconds = moved * job.devices / chip.chips(job.devices) / chip.bandwidth
    return Cost(site, 0.0, moved, runs, 0.0, seconds)


def update_seconds(job: Job, chip: Chip) -> float:
    """The optimizer's update at full rate: gradients are read twice (once for their norm), parameters and moments read and written."""
    own = owned(job, job.layout.of_optimizer)
    width = jnp.dtype(job.policy.params).itemsize
    moved = own * width * (4 if job.optim.clip_norm else 3) + 2 * optimizer_bytes(job)
    moved += 2 * own * width * (job.optim.ema is not None)
    return moved * job.devices / chip.chips(job.devices) / chip.bandwidth


def _passes(costs: Sequence[Cost], rates: Rates) -> Passes:
    """Seconds of a device by pass. Gradients of weights take as long as a forward pass; attention, and what has no weight, has none."""
    layers = [cost for cost in costs if cost.site.layers > 1]
    forward = sum(cost.seconds(rates) / cost.runs for cost in layers)
    weights = sum(cost.seconds(rates) / cost.runs for cost in layers if cost.site.kind == "product" and cost.runs > 1)
    outer = sum(cost.seconds(rates) for cost in costs if cost.site.layers <= 1)
    whole = sum(cost.seconds(rates) for cost in layers)
    return Passes(forward, whole - forward - weights, weights, outer)


def _site_times(costs: Sequence[Cost], between: Cost, flows: Sequence[Flow]) -> tuple[SiteTime, ...]:
    """Sites in layers are bound by the network where collectives of the loop over layers take longer than all of them."""
    loop = _sum(f for f in flows if f.loop == "layer" and f.network != HOST)
    slow = loop > sum(cost.seconds(FULL) for cost in costs if cost.site.layers > 1)

    def timed(cost: Cost) -> SiteTime:
        bound = "compute" if cost.compute >= cost.memory else "memory"
        bound = "network" if slow and cost.site.layers > 1 else bound
        return SiteTime(cost.site.name, cost.flops, cost.bytes, cost.compute, cost.memory, bound)

    return tuple(timed(cost) for cost in (*costs, between))


def format_of(dtype: Any) -> str:
    """The format of arithmetic in a dtype or by its name, as `lmeff.plan.hardware.FORMATS` has it."""
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    return {"float16": "bfloat16", "int4": "int8"}.get(name, "fp8" if name.startswith("float8") else name)


def _sum(flows: Iterable[Flow]) -> float:
    return sum(flow.seconds for flow in flows)


BACKWARD_SHARE = 2 / 3
