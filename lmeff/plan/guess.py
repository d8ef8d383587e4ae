"""Seconds and bytes of every plan at once, roughly: which plans are worth a closer look.

The same rules as `lmeff.plan.roofline` and `lmeff.parallel.volume`, with all that is small left out, on columns of numbers. Nobody sees these numbers; they
say in which order plans are predicted.
"""

import math

import numpy as np

from lmeff.parallel.activations import kept_bytes
from lmeff.parallel.devices import Topology
from lmeff.parallel.mesh import BATCH_AXES
from lmeff.plan.columns import Column, Sizes, has_schedule, region, sizes, stashes_inputs
from lmeff.plan.guess_network import links_of, network
from lmeff.plan.hardware import Chip
from lmeff.plan.roofline import USUAL, elementwise, format_of
from lmeff.plan.space import Plans
from lmeff.plan.work import work


def seconds(plans: Plans, chip: Chip, topology: Topology | None = None) -> Column:
    """Of a step, about."""
    c, s = plans.columns, sizes(plans)
    computing = _computing(plans, chip)
    hidden, late, waits = network(plans, s, links_of(plans, chip, topology))
    over = np.maximum(np.maximum(0, late - 2 / 3 * computing), hidden + late - computing)
    owned = s.own / np.where(c["zero"] > 0, c["fsdp"], 1)
    update = owned * (4 * s.parameters + 4 * s.state) * chip.cores / chip.bandwidth / USUAL.memory
    return computing + over + waits + update


def bytes_of(plans: Plans) -> Column:
    """On the fullest device, about: the larger of what lives in the backward pass and of what the optimizer's update takes."""
    c, s = plans.columns, sizes(plans)
    held = s.own / np.where(c["zero"] == 3, c["fsdp"], 1)
    state = held * s.parameters + 2 * s.state * s.own / np.where(c["zero"] > 0, c["fsdp"], 1)
    now = region(plans)
    copies = np.where((c["accumulate"] > 1) & (c["pipe"] == 1), 2, 1)
    short = 0 if plans.job.platform != "tpu" or plans.job.cfg.tied else 0.5 * s.outer / s.own
    gradients = s.parameters * np.where(now, copies * s.own, (1 - short) * held)
    gathered = np.where(now & (c["zero"] == 3) & (c["fsdp"] > 1), s.own * s.parameters, 0)
    piped = c["pipe"] > 1
    kept = _kept(plans) * s.tokens * plans.job.cfg.layers / (c["pipe"] * c["chunks"])
    backward = gradients + gathered + kept + np.where(piped, _stash(plans, s, kept), 0)
    # A TPU adds updates as it makes them, and has the table's gradient no longer than it needs.
    update = np.where(
        now, s.parameters * s.own, (1 - short) * held * (s.parameters + 4 * (plans.job.platform != "tpu"))
    )
    return state + np.maximum(backward, update)


def _stash(plans: Plans, s: Sizes, kept: Column) -> Column:
    """The buffers of a pipeline's executor, as `lmeff.plan.temporaries` has them, with rows from closed forms. kept: bytes of a slice's residuals."""
    c, cfg = plans.columns, plans.job.cfg
    dense = cfg.moe is None  # products of experts are their own
    heads, ffn = cfg.heads * cfg.head_size / c["tensor"], dense * cfg.ffn / c["tensor"]
    streams = (1 + dense) * cfg.width
    layers = s.tokens * s.compute * cfg.layers / (c["pipe"] * c["chunks"])
    inputs = layers * (heads + streams + ffn)
    outputs = layers * (heads + 2 * cfg.kv_heads * cfg.head_size / c["tensor"] + streams + (1 + cfg.gated) * ffn)
    stream = s.tokens * s.compute * cfg.width / c["tensor"]
    most = np.where(
        has_schedule(plans, "gpipe"), c["accumulate"], c["pipe"] * c["chunks"] + (c["chunks"] > 1) * (c["pipe"] - 1)
    )
    flying = np.minimum(c["accumulate"] * c["chunks"], most)
    waiting = np.where(has_schedule(plans, "zb-h1"), flying, 1)
    first, second = np.where(stashes_inputs(plans), [stream, inputs + outputs], [stream + kept + inputs, outputs])
    return 2 * ((flying + 1) * first + (waiting + 1) * second) + 4 * stream


def _kept(plans: Plans) -> Column:
    """Bytes that a layer keeps of a token of its own: exactly, but for buffers of experts, which are padded to whole blocks."""
    c = plans.columns
    kinds = (((c["remat"] * 64 + c["precision"]) * 4096 + c["tensor"]) * 4096 + c["expert"]) * 2 + (c["context"] > 1)
    _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
    found = []
    for job in (plans.at(int(row)) for row in first):
        ways = math.prod(job.degrees[axis] for axis in (*BATCH_AXES, "context"))
        layers, rows = -(-job.cfg.layers // job.degrees["pipe"]), job.rows // job.accumulate
        size = kept_bytes(job.remat, job.cfg, job.layout, rows, job.tokens, job.policy.compute)
        found.append(size * ways / (layers * rows * job.tokens))
    return np.array(found)[inverse]


def _computing(plans: Plans, chip: Chip) -> Column:
    """Products, attention and what lies between them, with the bubble: a tick of a pipeline lasts as long as the longest pass in it, of GPipe's all alike."""
    c, job = plans.columns, plans.job
    kinds = ((c["remat"] * 64 + c["precision"]) * 2 + (c["pipe"] > 1)) * 2 + stashes_inputs(plans)
    _, first, inverse = np.unique(kinds, return_index=True, return_inverse=True)
    each = np.array([_passes(plans, int(row), chip) for row in first]).reshape(len(first), 4)[inverse]
    whole, once, longest, ends = each.T
    ramp = (c["pipe"] - 1) * np.where(has_schedule(plans, "zb-h1"), 1, 3)
    slices = c["accumulate"] * c["chunks"]
    layers = -(-job.cfg.layers // (c["pipe"] * c["chunks"])) * c["pipe"] * c["chunks"] / job.cfg.layers
    mixed = (3 * slices + ramp) / slices * longest
    alike = (c["accumulate"] + c["pipe"] - 1) / c["accumulate"] * once
    piped = np.where(has_schedule(plans, "gpipe"), alike, mixed) * layers + ends * c["pipe"]
    return np.where(c["pipe"] > 1, piped, whole)


def _passes(plans: Plans, row: int, chip: Chip) -> tuple[float, float, float, float]:
    """Seconds of computing of a device: all together, of its layers, of the longest of their three passes, and of the head, for which all stages wait."""
    job = plans.at(row)
    found = work(job)
    flops = sum(part for name, part in found.parts.items() if name not in ("optimizer", "padding"))
    rate = chip.chips(job.devices) * chip.rate(format_of(job.policy.compute)) * USUAL.compute
    between = elementwise(job, chip, found).memory / USUAL.memory
    ends = 3 * sum(site.flops for site in found.sites if site.layers <= 1) / rate
    forward = sum(site.flops * site.visible for site in found.sites if site.layers > 1) / rate
    weights = sum(site.flops for site in found.sites if site.layers > 1 and site.kind == "product") / rate
    layers = flops / rate - ends
    return flops / rate + between, layers, max(forward, layers - forward - weights), ends
