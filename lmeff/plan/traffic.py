"""How long the bytes of a step are on their way: every collective of `lmeff.parallel.volume`, on the links that its mesh axes have.

What goes between a device and its host's memory (offloaded activations, offloaded moments) is a flow, too.
"""

from collections.abc import Iterable, Iterator

import jax.numpy as jnp

from lmeff.models.remat import parse
from lmeff.models.transformer import sites
from lmeff.parallel.activations import offloaded_bytes
from lmeff.parallel.collective import RING
from lmeff.parallel.devices import Topology
from lmeff.parallel.members import leaves_of
from lmeff.parallel.mesh import ZERO_AXIS, Layout
from lmeff.parallel.volume import Term, terms
from lmeff.parallel.workload import Step
from lmeff.plan.estimate import Flow
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.links import seconds
from lmeff.plan.slices import Ways, ways
from lmeff.plan.state import host_bytes

HOST, COPY = "host memory", "copy"


def flows(job: Job, chip: Chip, topology: Topology | None = None) -> tuple[Flow, ...]:
    """What a device of the pipeline's busiest stage sends in a step, by kind, axes and loop; nothing overlapped, links at full rate.

    topology: of TPUs; None takes `default_topology`. Raises `ConfigError` where the mesh cannot lie there.
    """
    found = ways(job.degrees, chip, topology)
    stages = sorted({0, 1, job.degrees["pipe"] - 1} & set(range(job.degrees["pipe"])))
    sent = max((_sent(job.step(stage), found) for stage in stages), key=total)
    return (*sent, *host_flows(job, chip))


def total(flows: Iterable[Flow]) -> float:
    """Seconds of all that goes between devices."""
    return sum(flow.seconds for flow in flows if flow.network != HOST)


def _sent(step: Step, found: Ways) -> tuple[Flow, ...]:
    summed: dict[tuple, Flow] = {}
    for row in terms(step).values():
        for term in row:
            flow = _flow(term, found)
            old = summed.get(flow[:4], flow._replace(bytes=0.0, seconds=0.0))
            summed[flow[:4]] = old._replace(bytes=old.bytes + flow.bytes, seconds=old.seconds + flow.seconds)
    return tuple(summed.values())


def _flow(term: Term, found: Ways) -> Flow:
    way = found.along(term.axes)
    data = term.elements * jnp.dtype(term.dtype).itemsize
    sent = term.times * data * RING[term.kind](way.size)
    return Flow(term.kind, term.axes, term.loop, way.network, sent, term.times * seconds(term.kind, way, data))


def host_flows(job: Job, chip: Chip) -> Iterator[Flow]:
    """What a device sends to its host's memory and takes back in a step."""
    each = chip.pcie / chip.cores
    if parse(job.policy_of_remat, sites(job.cfg)).kind == "offload":
        moved = 2.0 * job.accumulate * _offloaded(job)
        yield Flow(COPY, (), "layer", HOST, moved, moved / each)
    if job.optim.offload:
        moved = 2.0 * host_bytes(job)
        yield Flow(COPY, (), "step", HOST, moved, moved / each)


def _offloaded(job: Job) -> int:
    """Bytes of a microbatch that leave a device's memory."""
    rows = job.rows // job.accumulate
    return offloaded_bytes(job.policy_of_remat, job.cfg, job.layout, rows, job.tokens, job.policy.compute)


def owned(job: Job, layout: Layout) -> float:
    """Parameters that lie on a device: of the optimizer's layout those that it updates."""
    parts = job.degrees[ZERO_AXIS]
    return sum(leaf.part(parts) for leaf in leaves_of(job.cfg, layout))
