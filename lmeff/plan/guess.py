"""Seconds and bytes of every plan at once, roughly: which plans are worth a closer look.

The same rules as `lmeff.plan.roofline` and `lmeff.parallel.volume`, with all that is small left out, on columns of numbers. Nobody sees these numbers; they
say in which order plans are predicted.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lmeff.core.specs import ParamSpec, count
from lmeff.core.tree import flatten
from lmeff.models.transformer import param_specs
from lmeff.parallel.activations import kept_bytes
from lmeff.parallel.devices import Topology
from lmeff.parallel.mesh import AXES, BATCH_AXES
from lmeff.parallel.workload import again_of
from lmeff.plan.hardware import Chip
from lmeff.plan.roofline import USUAL, elementwise, format_of
from lmeff.plan.slices import ways
from lmeff.plan.space import Plans, precisions
from lmeff.plan.work import work

Column = np.ndarray


class Sizes(NamedTuple):
    """Of a device. own: parameters, whole over fsdp; routed: those of experts among them; outer: of the embedding and head.

    tokens: of a microbatch. layers: that it runs forward in a step, all microbatches. parameters, compute, state: bytes of a number.
    """

    own: Column
    routed: Column
    outer: Column
    tokens: Column
    layers: Column
    parameters: Column
    compute: Column
    state: Column


def sizes(plans: Plans) -> Sizes:
    """Of every plan."""
    c, job = plans.columns, plans.job
    specs = flatten(param_specs(job.cfg)).values()
    experts = _count(spec for spec in specs if spec.is_expert)
    outer = _count(spec for spec in specs if not spec.stacked)
    dense = _count(specs) - experts - outer
    inner = (dense + experts / c["expert"]) / c["pipe"]
    rows = job.rows / (_ways(c, BATCH_AXES) * c["accumulate"])
    policies = [job.changed(precision=text).policy for text in precisions(job, plans.space)]
    widths = {
        role: np.array([jnp.dtype(getattr(policy, role)).itemsize for policy in policies])[c["precision"]]
        for role in ("params", "compute", "state")
    }
    return Sizes(
        own=(inner + outer) / c["tensor"],
        routed=experts / (c["expert"] * c["pipe"] * c["tensor"]),
        outer=outer / c["tensor"],
        tokens=rows * job.tokens / c["context"],
        layers=job.cfg.layers / c["pipe"] * c["accumulate"],
        parameters=widths["params"],
        compute=widths["compute"],
        state=widths["state"],
    )


def seconds(plans: Plans, chip: Chip, topology: Topology | None = None) -> Column:
    """Of a step, about."""
    c, s = plans.columns, sizes(plans)
    computing = _computing(plans, chip)
    hidden, late, waits = _network(plans, s, _links(plans, chip, topology))
    over = np.maximum(np.maximum(0, late - 2 / 3 * computing), hidden + late - computing)
    owned = s.own / np.where(c["zero"] > 0, c["fsdp"], 1)
    update = owned * (4 * s.parameters + 4 * s.state) * chip.cores / chip.bandwidth / USUAL.memory
    return computing + over + waits + update


def bytes_of(plans: Plans) -> Column:
    """On the fullest device, about: the larger of what lives in the backward pass and of what the optimizer's update takes."""
    c, s = plans.columns, sizes(plans)
    held = s.own / np.where(c["zero"] == 3, c["fsdp"], 1)
    state = held * s.parameters + 2 * s.state * s.own / np.where(c["zero"] > 0, c["fsdp"], 1)
    region = _region(c)
    copies = np.where((c["accumulate"] > 1) & (c["pipe"] == 1), 2, 1)
    gradients = s.parameters * np.where(region, copies * s.own, held)
    gathered = np.where(region & (c["zero"] == 3) & (c["fsdp"] > 1), s.own * s.parameters, 0)
    piped = c["pipe"] > 1
    kept = _kept(plans) * s.tokens * plans.job.cfg.layers / (c["pipe"] * c["chunks"])
    backward = gradients + gathered + kept + np.where(piped, _stash(plans, s, kept), 0)
    update = np.where(region, np.maximum(4 * s.own, held * s.parameters), held * s.parameters) + 4 * held
    return state + np.maximum(backward, update)


def _stash(plans: Plans, s: Sizes, kept: Column) -> Column:
    """The buffers of a pipeline's executor, as `lmeff.plan.temporaries` has them, with rows from closed forms. kept: bytes of a slice's residuals."""
    c, cfg = plans.columns, plans.job.cfg
    heads, ffn = cfg.heads * cfg.head_size / c["tensor"], cfg.ffn / c["tensor"]
    layers = s.tokens * s.compute * cfg.layers / (c["pipe"] * c["chunks"])
    inputs = layers * (heads + 2 * cfg.width + ffn)
    outputs = layers * (heads + 2 * cfg.kv_heads * cfg.head_size / c["tensor"] + 2 * cfg.width + (1 + cfg.gated) * ffn)
    stream = s.tokens * s.compute * cfg.width / c["tensor"]
    flying = np.minimum(c["accumulate"] * c["chunks"], c["pipe"] * c["chunks"] + (c["chunks"] > 1) * (c["pipe"] - 1))
    waiting = np.where(_is(plans, "zb-h1"), flying, 1)
    first, second = np.where(_stashes_inputs(plans), [stream, inputs + outputs], [stream + kept + inputs, outputs])
    return 2 * ((flying + 1) * first + (waiting + 1) * second) + 4 * stream


def _is(plans: Plans, schedule: str) -> Column:
    """Where a pipeline has this schedule."""
    found = np.array([pipeline.schedule == schedule for pipeline in plans.space.pipelines] + [False])
    return found[plans.columns["pipeline"]]


def _kept(plans: Plans) -> Column:
    """Bytes that a layer keeps of a token of its own, by remat policy, exactly."""
    c = plans.columns
    kinds = ((c["remat"] * 64 + c["precision"]) * 4096 + c["tensor"]) * 2 + (c["context"] > 1)
    _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
    found = []
    for job in (plans.at(int(row)) for row in first):
        ways, layers = (
            math.prod(job.degrees[axis] for axis in (*BATCH_AXES, "context")),
            -(-job.cfg.layers // job.degrees["pipe"]),
        )
        rows = job.rows // job.accumulate
        size = kept_bytes(job.remat, job.cfg, job.layout, rows, job.tokens, job.policy.compute)
        found.append(size * ways / (layers * rows * job.tokens))
    return np.array(found)[inverse]


def _count(specs: Iterable[ParamSpec]) -> float:
    return float(count({str(i): spec for i, spec in enumerate(specs)}))


def _ways(c: dict[str, Column], axes: tuple[str, ...]) -> Column:
    return np.prod([c[axis] for axis in axes], axis=0)


def _region(c: dict[str, Column]) -> Column:
    """Where gradients are reduced once a step, and weights gathered once."""
    return (c["accumulate"] > 1) | (c["pipe"] > 1)


def _stashes_inputs(plans: Plans) -> Column:
    """Where a pipeline's stage keeps inputs alone and runs forward again."""
    stash = np.array([pipeline.stash == "input" for pipeline in plans.space.pipelines] + [False])
    return stash[plans.columns["pipeline"]]


def _computing(plans: Plans, chip: Chip) -> Column:
    """Products, attention and what lies between them, with the bubble: in a pipeline a tick lasts as long as the longest of its passes."""
    c, job = plans.columns, plans.job
    kinds = ((c["remat"] * 64 + c["precision"]) * 2 + (c["pipe"] > 1)) * 2 + _stashes_inputs(plans)
    _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
    each = np.array([_passes(plans, int(row), chip) for row in first]).reshape(len(first), 3)[inverse]
    whole, longest, ends = each.T
    ramp = (c["pipe"] - 1) * np.where(_is(plans, "zb-h1"), 1, 3)
    slices = c["accumulate"] * c["chunks"]
    layers = -(-job.cfg.layers // (c["pipe"] * c["chunks"])) * c["pipe"] * c["chunks"] / job.cfg.layers
    return np.where(c["pipe"] > 1, (3 * slices + ramp) / slices * longest * layers + ends * c["pipe"], whole)


def _passes(plans: Plans, row: int, chip: Chip) -> tuple[float, float, float]:
    """Seconds of computing of a device: all together, of the longest of the three passes of its layers, and of the head, for which all stages wait."""
    job = plans.at(row)
    found = work(job)
    flops = sum(part for name, part in found.parts.items() if name not in ("optimizer", "padding"))
    rate = chip.chips(job.devices) * chip.rate(format_of(job.policy.compute)) * USUAL.compute
    between = elementwise(job, chip, found).memory / USUAL.memory
    ends = 3 * sum(site.flops for site in found.sites if site.layers <= 1) / rate
    forward = sum(site.flops * site.visible for site in found.sites if site.layers > 1) / rate
    weights = sum(site.flops for site in found.sites if site.layers > 1 and site.kind == "product") / rate
    return flops / rate + between, max(forward, flops / rate - ends - forward - weights), ends


class Links(NamedTuple):
    """Seconds a byte along the axes of each plan: of a gather, of an exchange, of a permute."""

    gather: dict[str, Column]
    exchange: dict[str, Column]
    send: dict[str, Column]


GROUPS = {
    "fsdp": ("fsdp",), "tensor": ("tensor",), "context": ("context",), "expert": ("expert",), "pipe": ("pipe",),
    "rows": ("dcn", "data", "expert"), "rows and fsdp": BATCH_AXES, "copies": ("dcn", "data"), "copies and fsdp": ("dcn", "data", "fsdp"),
}  # fmt: skip
MUCH = 1e9


def _links(plans: Plans, chip: Chip, topology: Topology | None) -> Links:
    _, first, inverse = np.unique(plans.columns["mesh"], return_index=True, return_inverse=True)
    table = np.zeros((3, len(GROUPS), len(first)))
    for at, row in enumerate(first):
        degrees = {axis: int(plans.columns[axis][row]) for axis in AXES}
        found = ways(degrees, chip, topology)
        for group, axes in enumerate(GROUPS.values()):
            wide = tuple(axis for axis in axes if degrees[axis] > 1)
            if wide:
                way = found.along(wide)
                table[:, group, at] = way.gather(MUCH), way.exchange(MUCH), way.send(MUCH)
    spread = table[:, :, inverse] / MUCH / USUAL.network
    return Links(*(dict(zip(GROUPS, rows, strict=True)) for rows in spread))


def _network(plans: Plans, s: Sizes, links: Links) -> tuple[Column, Column, Column]:
    """Seconds that computing hides, that the backward pass hides, and that nothing hides."""
    gather, reduce, wait = _weights(plans, s, links)
    for part in (_tensor, _sequence, _experts, _stages):
        more = part(plans, s, links)
        gather, reduce, wait = gather + more[0], reduce + more[1], wait + more[2]
    return gather, reduce, wait


Three = tuple[Column | float, Column | float, Column | float]


def _weights(plans: Plans, s: Sizes, links: Links) -> tuple[Column, Column, Column]:
    """Gathers of parameters and sums of gradients."""
    c, zero, region = plans.columns, plans.columns["zero"], _region(plans.columns)
    own, fsdp = s.own, links.gather["fsdp"]
    gather = np.where(~region & (zero == 3), 2 * own * s.compute * fsdp, 0)
    scattered = np.where(region, zero == 3, zero >= 2)
    width = np.where(region, s.parameters, 4)
    parts = np.where(scattered, 1 / c["fsdp"], 1)
    over = {
        what: np.where(scattered, links.gather[what], links.gather[f"{what} and fsdp"]) for what in ("rows", "copies")
    }
    others = 2 * parts * ((own - s.routed) * over["rows"] + s.routed * over["copies"])
    sums = width * (np.where(scattered, own * fsdp, 0) + others)
    once = np.where((zero < 3), own * s.parameters * fsdp, 0) + np.where(
        region & (zero == 3), own * s.parameters * fsdp, 0
    )
    dense = np.where(region | ~scattered, own - s.routed, (own - s.routed) / c["fsdp"])
    inner = 2 * (4 * dense + np.where(region, s.compute * s.routed, 0)) * c["accumulate"] * links.gather["context"]
    head = 2 * s.outer * 4 * np.where(c["fsdp"] > 1, 1 / c["fsdp"], 1) * links.gather["rows"]
    return gather, np.where(region, 0, sums) + inner, np.where(region, sums, head) + once


def _again(plans: Plans) -> tuple[Column, Column, Column]:
    """By remat policy: gathers and sums over tensor that run again, and whether attention does."""
    found = [again_of(name, plans.job.cfg) for name in plans.space.remat]
    rows = np.array([(again.gathers, again.reductions, again.attention) for again in found])[plans.columns["remat"]]
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _tensor(plans: Plans, s: Sizes, links: Links) -> Three:
    cfg, piped = plans.job.cfg, plans.columns["pipe"] > 1
    gathers, sums, _ = _again(plans)
    forward = 1 + _stashes_inputs(plans)
    numbers = s.tokens * cfg.width
    moved = (2 * forward + 2 + gathers + 2 * piped) * s.compute + (2 * forward + 4 + cfg.gated + sums) * 4
    ends = numbers * plans.columns["accumulate"] * 4 * s.compute
    return 0.0, 0.0, (numbers * s.layers * moved + ends) * links.gather["tensor"]


def _sequence(plans: Plans, s: Sizes, links: Links) -> Three:
    c, cfg = plans.columns, plans.job.cfg
    _, _, again = _again(plans)
    forward, ways = 1 + _stashes_inputs(plans), c["context"]
    keys = 2 * s.tokens * cfg.kv_heads * cfg.head_size / c["tensor"] * s.layers
    heads = s.tokens * cfg.head_size * (2 * cfg.heads + 2 * cfg.kv_heads) / c["tensor"] * s.layers
    form = np.array(plans.space.sequence)[c["sequence"]]
    ring = keys * (ways - 1) * ((forward + 1 + again) * s.compute + 4) * links.send["context"]
    gather = keys * ways * (forward + 1) * s.compute * links.gather["context"]
    scatter = keys * ways * 4 * links.gather["context"]
    exchange = heads * (forward + 1 + again) * s.compute * links.exchange["context"]
    here = ways > 1
    return (
        np.where(here & (form == "ring"), ring, 0),
        np.where(here & (form == "gather"), scatter, 0),
        np.where(here, np.select([form == "gather", form == "ulysses"], [gather, exchange], 0), 0),
    )


def _experts(plans: Plans, s: Sizes, links: Links) -> Three:
    cfg, c = plans.job.cfg, plans.columns
    if cfg.moe is None:
        return 0.0, 0.0, 0.0
    _, _, again = _again(plans)
    passes = 2 + _stashes_inputs(plans) + again
    numbers = s.tokens * cfg.width * s.layers
    if cfg.moe.capacity is None:
        return 0.0, 0.0, numbers * c["expert"] * 2 * passes * s.compute * links.gather["expert"]
    slots = numbers * cfg.moe.top_k * cfg.moe.capacity
    return 0.0, 0.0, slots * 2 * passes * s.compute * links.exchange["expert"]


def _stages(plans: Plans, s: Sizes, links: Links) -> Three:
    """Permutes in every tick; layers that are brought to their stages where there are several chunks."""
    c = plans.columns
    ticks = 3 * (c["accumulate"] * c["chunks"] + c["pipe"] - 1)
    payload = s.tokens * plans.job.cfg.width / c["tensor"] * s.compute
    moved = np.where(c["chunks"] > 1, 2 * (s.own - s.outer) * s.parameters * links.exchange["pipe"], 0)
    return 0.0, 0.0, np.where(c["pipe"] > 1, 2 * ticks * payload * links.send["pipe"] + moved, 0)
