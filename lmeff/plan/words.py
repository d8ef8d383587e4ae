"""Why, in words: every sentence is computed from the numbers of a plan, and is left out where there is nothing to say."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from lmeff.parallel.devices import Topology
from lmeff.parallel.mesh import BATCH_AXES, ZERO_AXIS
from lmeff.parallel.schedules import SCHEDULES
from lmeff.plan.estimate import Estimate, Flow, Memory
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.roofline import format_of
from lmeff.plan.slices import ways
from lmeff.report.words import brief, number, size

MUCH = 1e12  # bytes: a collective that bandwidth decides, not hops


def notes(found: Estimate, chip: Chip, topology: Topology | None = None) -> tuple[str, ...]:
    """What binds a plan and what to change."""
    return (
        room(found),
        time(found),
        *tensor(found.job, chip, topology),
        *rows(found, chip, topology),
        *slices(found.job, chip, topology),
        *context(found.job, chip, topology),
        *pipeline(found),
    )


def room(found: Estimate) -> str:
    """Whether the fullest device has room, and what takes most of it."""
    peak, job = found.peak, found.job
    where = f" on stage {peak.stage} of the pipeline" if job.degrees["pipe"] > 1 else ""
    verdict = "fits" if found.fits else "does not fit"
    return f"{verdict}: {size(peak.total)} of {size(found.capacity)} on a device{where}; {largest(peak)}"


def largest(memory: Memory, how_many: int = 3) -> str:
    """The largest categories: "optimizer 7.5 GiB, gradients 3.7 GiB"."""
    parts = memory.parts
    top = sorted(parts, key=lambda name: -parts[name])[:how_many]
    return ", ".join(f"{name} {size(parts[name])}" for name in top if parts[name])


def time(found: Estimate) -> str:
    """Which part takes longest of a step, were nothing overlapped."""
    parts = {name: seconds for name, seconds in found.time.parts.items() if seconds > 0}
    top, whole = max(parts, key=lambda name: parts[name]), sum(parts.values())
    others = sorted((name for name in parts if name != top), key=lambda name: -parts[name])[:2]
    beside = "".join(f", {name} {brief(parts[name])}" for name in others)
    return (
        f"a step takes about {brief(found.time.middle)} ({brief(found.time.low)} to {brief(found.time.high)}), and {TOLD[top]} "
        f"the most of it: {brief(parts[top])} at full rate, {parts[top] / whole:.0%} of all parts laid end to end{beside}"
    )


TOLD = {
    "compute": "products take",
    "memory": "reading and writing memory takes",
    "network": "the network takes",
    "bubble": "waiting for other stages of the pipeline takes",
    "optimizer": "the optimizer's update takes",
    "host": "copies to the host's memory and back take",
}


class Link(NamedTuple):
    """What some axes of a mesh are joined by. bandwidth: bytes/s that a device sends in a gather. alpha: FLOPs that it could do for each of them."""

    network: str
    bandwidth: float
    alpha: float


def link(job: Job, chip: Chip, axes: tuple[str, ...], topology: Topology | None = None) -> Link:
    """Of axes that are wider than 1."""
    way = ways(job.degrees, chip, topology).along(axes)
    bandwidth = MUCH * (way.size - 1) / way.size / way.gather(MUCH)
    return Link(way.network, bandwidth, peak(job, chip) / bandwidth)


def peak(job: Job, chip: Chip) -> float:
    """FLOP/s of a device in the format that the job computes in."""
    return chip.rate(format_of(job.policy.compute)) * chip.chips(job.devices) / job.devices


def tensor(job: Job, chip: Chip, topology: Topology | None = None) -> Iterator[str]:
    """Above F / alpha, collectives of activations take longer than the products between them (Scaling Book, chapter on training)."""
    degree = job.degrees["tensor"]
    if degree == 1:
        return
    found, ffn = link(job, chip, ("tensor",), topology), job.cfg.ffn
    limit = ffn / found.alpha * 2 / _width(job)
    verdict = f"is network-bound: above {limit:,.1f}" if degree > limit else f"is within {limit:,.1f}, up to which"
    after = "collectives take longer than products" if degree > limit else "products take longer than collectives"
    yield f"tensor {degree} {verdict} {after} ({_alpha(job, chip, found)}, F = {ffn:,})"


def _alpha(job: Job, chip: Chip, found: Link) -> str:
    flops, sent = _whole(peak(job, chip) / 1e12), _whole(found.bandwidth / 1e9)
    return f"alpha {found.alpha:,.0f} = {flops} TFLOP/s / {sent} GB/s of {found.network}"


def _whole(value: float) -> str:
    """Of a CPU's rates nothing would be left without its digits."""
    return f"{value:,.0f}" if value >= 1 else number(value)


def _width(job: Job) -> int:
    return jnp.dtype(job.policy.compute).itemsize


def rows(found: Estimate, chip: Chip, topology: Topology | None = None) -> Iterator[str]:
    """Tokens of a device against those that hide the gathers of its weights; where these are gathered once a step, what that takes."""
    job = found.job
    degree = job.degrees[ZERO_AXIS]
    if degree == 1 or job.mesh.zero < 3:
        yield from _summed(found)
        return
    if job.accumulate > 1 or job.degrees["pipe"] > 1:
        took = _seconds(found.flows, ("all-gather",), (ZERO_AXIS,), "step")
        yield f"fsdp {degree}: weights are gathered once a step, before anything computes: {brief(took)} that nothing hides, and every device holds them whole"
        return
    joined = link(job, chip, (ZERO_AXIS,), topology)
    own, least = tokens_of_group(job), joined.alpha * _width(job) / 2
    verdict = "above the" if own >= least else "below the"
    hides = "that hide the gathers of weights" if own >= least else "that would hide the gathers of weights"
    yield f"fsdp {degree}: {own:,.0f} tokens for each gathered weight are {verdict} {least:,.0f} {hides} ({_alpha(job, chip, joined)})"


def tokens_of_group(job: Job) -> float:
    """Tokens of a step that one whole copy of the weights multiplies: of devices that are no different parts of the model."""
    groups = math.prod(job.degrees[axis] for axis in (*BATCH_AXES, "context"))
    return job.rows * job.tokens / groups


def _summed(found: Estimate) -> Iterator[str]:
    ways_of_rows = {axis: n for axis, n in found.job.degrees.items() if axis in BATCH_AXES and n > 1}
    if not ways_of_rows:
        return
    codes = found.job.reduce is not None and found.job.reduce.method == "int8"
    took = sum(
        f.seconds
        for f in found.flows
        if set(f.axes) & set(ways_of_rows) and (f.kind in SUMS or (codes and (f.kind, f.loop) in CODES))
    )
    named = " x ".join(f"{axis} {n}" for axis, n in ways_of_rows.items())
    yield f"{named}: summing gradients takes {brief(took)} of the network"


SUMS = ("all-reduce", "reduce-scatter")
CODES = (("all-to-all", "step"), ("all-gather", "step"))  # of gradients in int8, to who sums them and back


def _seconds(flows: tuple[Flow, ...], kinds: tuple[str, ...], axes: tuple[str, ...], loop: str) -> float:
    return sum(flow.seconds for flow in flows if flow.kind in kinds and flow.axes == axes and flow.loop == loop)


def slices(job: Job, chip: Chip, topology: Topology | None = None) -> Iterator[str]:
    """Tokens of a slice against those that hide the sums of gradients between slices."""
    degree = job.degrees["dcn"]
    if degree == 1 or not chip.dcn or (topology is not None and topology.slices == 1):
        return
    hosts = job.devices / degree / (chip.host * chip.cores)
    least = peak(job, chip) * job.devices / degree / (hosts * chip.dcn) * 2
    own = job.rows * job.tokens / degree
    what = "the sums of float32 gradients"
    if job.local is not None and job.local.axis == "dcn":
        # Parameters meet instead, as many bytes once in so many steps.
        least, what = least / job.local.every, f"the meetings of parameters, one in {job.local.every} steps,"
    verdict = "above" if own >= least else "below"
    yield (
        f"dcn {degree}: {own:,.0f} tokens of a slice are {verdict} the {least:,.0f} that hide {what} between slices "
        f"({chip.dcn / 1e9:,.0f} GB/s a host)"
    )


def context(job: Job, chip: Chip, topology: Topology | None = None) -> Iterator[str]:
    """Keys and values go round while a device's queries attend: its FLOPs for each byte against alpha."""
    degree, cfg = job.degrees["context"], job.cfg
    if degree == 1 or job.mesh.sequence == "ulysses":
        return
    joined = link(job, chip, ("context",), topology)
    seen = sum(count * min(job.tokens, window or job.tokens) for window, count in cfg.windows) / cfg.layers
    # 4 H C FLOPs for each of a query's keys, half of them masked away; 2 K C numbers of each key, which a device gets of all other devices.
    intensity = seen / 2 * 4 * cfg.heads / (2 * cfg.kv_heads * _width(job)) / degree
    verdict = "hides" if intensity >= joined.alpha else "does not hide"
    yield (
        f"context {degree}: attention does {intensity:,.0f} FLOPs for each byte of keys and values that comes, which {verdict} them "
        f"({_alpha(job, chip, joined)})"
    )


def bubble(job: Job) -> tuple[str, float]:
    """The idle share of a pipeline's ticks, as a formula and a number; whatever lies between its ticks (`simulate` counts the same)."""
    stages, count = job.degrees["pipe"], job.accumulate
    chunks = 1 if job.pipeline is None else job.pipeline.chunks
    passes = 3 if job.mesh.schedule in SPLIT else 1
    formula = f"(p-1)/({'3' * (passes == 3)}{'v' * (chunks > 1)}m+p-1)"
    return formula, (stages - 1) / (passes * chunks * count + stages - 1)


SPLIT = ("zb-h1", "zb-h2", "zbv")  # W is apart from B: three passes fill the ticks


def pipeline(found: Estimate) -> Iterator[str]:
    """The bubble of a pipeline, as its schedule has it and as the step waits."""
    job = found.job
    if job.degrees["pipe"] == 1 or job.mesh.schedule not in SCHEDULES:
        return
    formula, share = bubble(job)
    waits = found.time.parts.get("bubble", 0.0)
    yield (
        f"pipe {job.degrees['pipe']}: of {job.mesh.schedule}'s ticks {formula} = {share:.0%} are idle; with ticks as long as their slowest stage, "
        f"stages wait {brief(waits)} of a step"
    )


def setting(job: Job) -> str:
    """A plan in a line: "fsdp 64 x tensor 4, ZeRO-3, remat full"."""
    cut = {axis for axis, n in job.degrees.items() if n > 1}
    parts = [job.layout.describe()]
    if "fsdp" in cut:
        parts.append(f"ZeRO-{job.mesh.zero}")
    if "context" in cut:
        parts.append(job.mesh.sequence)
    if "pipe" in cut:
        chunks = "" if job.mesh.chunks is None else f" with {job.mesh.chunks} chunks"
        parts.append(f"{job.mesh.schedule}{chunks} that keeps {job.mesh.stash}")
    if job.accumulate > 1:
        parts.append(f"{job.accumulate} microbatches")
    return ", ".join([*parts, f"remat {job.remat}"])
