"""Seconds of what every plan at once sends, roughly: the rules of `lmeff.parallel.volume`, with all that is small left out, on columns of numbers."""

from typing import NamedTuple

import numpy as np

from lmeff.parallel.devices import Topology
from lmeff.parallel.mesh import AXES, BATCH_AXES
from lmeff.parallel.workload import again_of
from lmeff.plan.columns import Column, Sizes, region, stashes_inputs
from lmeff.plan.hardware import Chip
from lmeff.plan.roofline import USUAL
from lmeff.plan.slices import ways
from lmeff.plan.space import Plans

# Seconds that computing hides, that the backward pass hides, and that nothing hides.
Three = tuple[Column | float, Column | float, Column | float]


class Links(NamedTuple):
    """Seconds a byte along the axes of each plan: of a gather, of an exchange, of a permute."""

    gather: dict[str, Column]
    exchange: dict[str, Column]
    send: dict[str, Column]


GROUPS = {
    "fsdp": ("fsdp",), "tensor": ("tensor",), "context": ("context",), "expert": ("expert",), "pipe": ("pipe",),
    "rows": ("dcn", "data", "expert"), "rows and fsdp": BATCH_AXES, "rows and context": ("dcn", "data", "expert", "context"),
    "copies": ("dcn", "data"), "copies and fsdp": ("dcn", "data", "fsdp"), "copies and context": ("dcn", "data", "context"),
    "all copies": ("dcn", "data", "fsdp", "context"),
}  # fmt: skip
MUCH = 1e9


def links_of(plans: Plans, chip: Chip, topology: Topology | None) -> Links:
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


def network(plans: Plans, s: Sizes, links: Links) -> Three:
    """Seconds that computing hides, that the backward pass hides, and that nothing hides."""
    gather, reduce, wait = _weights(plans, s, links)
    for part in (_tensor, _sequence, _experts, _stages):
        more = part(plans, s, links)
        gather, reduce, wait = gather + more[0], reduce + more[1], wait + more[2]
    return gather, reduce, wait


def _weights(plans: Plans, s: Sizes, links: Links) -> Three:
    """Gathers of parameters and sums of gradients; those of experts go by rules of their own."""
    c, now, fsdp = plans.columns, region(plans), links.gather["fsdp"]
    dense, again = s.own - s.routed, _again(plans).any
    whole = c["zero"] == 3
    gather = np.where(~now & whole, (2 * dense + (1 + again) * s.routed) * s.compute * fsdp, 0)
    once = np.where(~whole | now, s.own * s.parameters * fsdp, 0)
    inner = 2 * s.compute * _in_microbatches(plans, s, dense) * c["accumulate"] * links.gather["context"]
    head = 2 * s.outer * s.compute / c["fsdp"] * links.gather["rows"]
    late = np.where(now, 0, _placed_sums(c, s, dense, links)) + inner
    return gather, late, np.where(now, _region_sums(plans, s, dense, links), head) + once


def _placed_sums(c: dict[str, Column], s: Sizes, dense: Column, links: Links) -> Column:
    """Of gradients in an automatic step. What is scattered is float32; experts are summed whole and then scattered."""
    over, apart = links.gather, c["fsdp"] > 1
    scattered = 4 * dense * over["fsdp"] + 2 * s.compute * dense / c["fsdp"] * over["rows and context"]
    layers = np.where(apart & (c["zero"] >= 2), scattered, 2 * s.compute * dense * over["rows and fsdp"])
    cut = 2 * over["copies and context"] + over["fsdp"]
    return layers + s.compute * s.routed * np.where(apart & (c["zero"] == 3), cut, 2 * over["all copies"])


def _region_sums(plans: Plans, s: Sizes, dense: Column, links: Links) -> Column:
    """Of gradients in a region, in the dtype of the parameters, or as codes of a byte; of PowerSGD's factors nothing counts."""
    c, reduce = plans.columns, plans.job.reduce
    width = s.parameters if reduce is None else {"int8": 1, "powersgd": 0}[reduce.method]
    over, found = links.gather, 2 * s.outer * links.gather["pipe"]
    for own, axes in ((dense, "rows"), (s.routed, "copies")):
        scattered = own * over["fsdp"] + 2 * own / c["fsdp"] * over[axes]
        found = found + np.where(c["zero"] == 3, scattered, 2 * own * over[f"{axes} and fsdp"])
    return width * found


def _in_microbatches(plans: Plans, s: Sizes, dense: Column) -> Column:
    """Gradients that are summed over context in every microbatch: of layers, and in a region of experts and ends; a pipeline has one end on a stage."""
    c, cfg = plans.columns, plans.job.cfg
    scattered = (c["zero"] >= 2) & (c["fsdp"] > 1)
    ends = s.outer * (2 if cfg.tied else 1) / np.where(c["pipe"] > 1, 2, 1)
    return np.where(region(plans), dense - s.outer + s.routed + ends, np.where(scattered, 0, dense - s.outer))


class _Again(NamedTuple):
    """What runs again, by remat policy: gathers and sums over tensor, attention, and anything at all."""

    gathers: Column
    sums: Column
    attention: Column
    any: Column


def _again(plans: Plans) -> _Again:
    found = [again_of(name, plans.job.cfg) for name in plans.space.remat]
    rows = np.array([(a.gathers, a.reductions, a.attention, a.any) for a in found])[plans.columns["remat"]]
    return _Again(*rows.T)


def _tensor(plans: Plans, s: Sizes, links: Links) -> Three:
    cfg, piped = plans.job.cfg, plans.columns["pipe"] > 1
    gathers, sums, _, _ = _again(plans)
    forward = 1 + stashes_inputs(plans)
    numbers = s.tokens * cfg.width
    moved = (2 * forward + 2 + gathers + 2 * piped) * s.compute + (2 * forward + 4 + cfg.gated + sums) * 4
    ends = numbers * plans.columns["accumulate"] * 4 * s.compute
    return 0.0, 0.0, (numbers * s.layers * moved + ends) * links.gather["tensor"]


def _sequence(plans: Plans, s: Sizes, links: Links) -> Three:
    c, cfg = plans.columns, plans.job.cfg
    again = _again(plans).attention
    forward, ways = 1 + stashes_inputs(plans), c["context"]
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
    again = _again(plans).attention
    passes = 2 + stashes_inputs(plans) + again
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
