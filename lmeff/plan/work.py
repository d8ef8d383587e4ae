"""FLOPs of one train step, all devices together: what the model needs, and what runs.

The forward pass is counted (`plan.count`), what is computed again is counted (`plan.recompute`), and so is what is no product (`plan.overhead`). What is
said here is how they make a step: how often each runs.
"""

from collections.abc import Callable

import jax.numpy as jnp

from lmeff.models.cost import active_parameters
from lmeff.parallel.stages import slice_layers
from lmeff.plan.count import filled, sites
from lmeff.plan.estimate import Site, Work
from lmeff.plan.job import Job, Shape
from lmeff.plan.overhead import activation_flops, copies, optimizer_flops, seen_paths, view_flops
from lmeff.plan.recompute import again, attention_backward

BACKWARD = 2  # products of a backward pass for each of the forward pass: the gradients of its input and of its weight


def work(job: Job) -> Work:
    """The FLOPs of a step, by `CONVENTIONS`; raises `ConfigError` where `train.remat` is a budget that nothing fits."""
    student = _sites(job, job.student)
    teacher = () if job.teacher is None else _sites(job, job.teacher)
    parts = _parts(job, student, teacher)
    products = [(site, site.flops * filled(job.cfg, site.name, job.tokens)) for site in student if site.equation]
    attention = [site for site in student if site.kind == "attention"]
    useful, full = sum(flops for _, flops in products), sum(site.flops for site in attention)
    causal = sum(site.flops * site.visible for site in attention)
    kept = sum(flops * site.dense for site, flops in products)
    return Work(
        sites=student,
        teacher=teacher,
        parts=parts,
        model_full=(1 + BACKWARD) * (useful + full),
        model_causal=(1 + BACKWARD) * (useful + causal),
        hardware=sum(parts.values()),
        effective=(1 + BACKWARD) * (kept + causal),
        six_nd=6.0 * active_parameters(job.cfg) * job.rows * job.tokens,
    )


def _sites(job: Job, shape: Shape) -> tuple[Site, ...]:
    return sites(shape, job.rows, job.tokens, policy=job.policy, accumulate=job.accumulate)


def _parts(job: Job, student: tuple[Site, ...], teacher: tuple[Site, ...]) -> dict[str, float]:
    """By cause. A pipeline that keeps inputs runs the forward pass of its layers again before their backward pass."""
    degrees = job.degrees
    local = (job.tokens, job.cfg.heads // degrees["tensor"], job.cfg.kv_heads // degrees["tensor"], job.cfg.head_size)
    remat = job.policy_of_remat
    rerun = again(job.cfg, remat, job.tokens, job.policy.compute)
    times = degrees["pipe"] > 1 and job.mesh.stash == "input"
    products, layers = _flops(student, lambda site: bool(site.equation)), _flops(student, _is_in_layer)
    attention = _attention(student)
    parts = {
        "forward": products,
        "backward": BACKWARD * products,
        "recompute": (rerun.products * job.cfg.layers * job.rows + times * layers)
        + (rerun.attention + times) * attention,
        "attention forward": attention,
        "attention backward": _backward_of_attention(job, local) * attention,
        "teacher": _teacher(job, teacher),
        "compression": _compression(job, student, teacher, rerun=remat != "none"),
        "optimizer": optimizer_flops(job.student, job.optim, job.precision)
        * copies(job.layout.of_optimizer, job.student),
    }
    run_by_layers = sum(parts[name] for name in ("recompute", "attention forward", "attention backward"))
    padding = _padding(job, job.student) * ((1 + BACKWARD) * layers + run_by_layers)
    if job.teacher is not None:
        padding += _padding(job, job.teacher) * (_flops(teacher, _is_in_layer) + _attention(teacher))
    return parts | {"padding": padding} if padding else parts


def _flops(found: tuple[Site, ...], chosen: Callable[[Site], bool]) -> float:
    return sum(site.flops for site in found if chosen(site))


def _is_in_layer(site: Site) -> bool:
    return bool(site.equation) and site.name != "head"


def _attention(found: tuple[Site, ...]) -> float:
    return sum(site.flops * site.visible for site in found if site.kind == "attention")


def _backward_of_attention(job: Job, local: tuple[int, int, int, int]) -> float:
    """Over its forward pass. Rows that are cut over devices go through the model's own loops over tiles, whatever the platform."""
    return attention_backward("cpu" if job.degrees["context"] > 1 else job.platform, *local, job.cfg.mixed)


def _teacher(job: Job, found: tuple[Site, ...]) -> float:
    """A forward pass. In a pipeline that keeps inputs, the last slice of the teacher runs again before the loss."""
    once = _flops(found, lambda site: bool(site.equation)) + _attention(found)
    if job.pipeline is None or job.mesh.stash != "input" or not found:
        return once
    return once + (_flops(found, _is_in_layer) + _attention(found)) / job.pipeline.slices


def _padding(job: Job, shape: Shape) -> float:
    """How many layers a pipeline runs that are none, over those that are: slices are equally long, so the shorter ones are filled up."""
    if job.pipeline is None:
        return 0.0
    slices, layers = job.pipeline.slices, shape.cfg.layers
    return slices * slice_layers(layers, slices) / layers - 1


def _compression(job: Job, student: tuple[Site, ...], teacher: tuple[Site, ...], *, rerun: bool) -> float:
    """Weights seen through their transforms, and activations put on their grids.

    Weights are seen in the scanned layer, once a microbatch and again where the layer is computed again; in a pipeline once a step, before it.
    """
    piped = job.degrees["pipe"] > 1
    forward, backward = view_flops(job.student, job.precision)
    times = (1, 1) if piped else (job.accumulate * (1 + rerun), job.accumulate)
    weights = (forward * times[0] + backward * times[1]) * copies(job.layout, job.student, seen_paths(job.student))
    found = weights + _activations(student, job.student, rerun + (piped and job.mesh.stash == "input"), backward=True)
    return found if job.teacher is None else found + _activations(teacher, job.teacher, 0, backward=False)


def _activations(found: tuple[Site, ...], shape: Shape, rerun: int, *, backward: bool) -> float:
    """Put on their grids once, `rerun` times more in layers, and with gradients or without."""
    flops = 0.0
    for site in found:
        format = shape.recipe.numerics.at(site.name)
        if format is not None:
            forward, pull = activation_flops(format)
            times = 1 if site.name == "head" else 1 + rerun  # no policy reaches the loss
            numbers = site.reads["activation"] / jnp.dtype(site.format).itemsize
            flops += numbers * (forward * times + pull * backward)
    return flops


CONVENTIONS: dict[str, str] = {
    "forward": (
        "products of activations and weights: 2 FLOPs for each multiplication with its addition; embedding lookups, norms, rotations, softmax and gates "
        "are not counted. Of experts, the rows of every token's top_k; with a capacity all slots, filled or not."
    ),
    "backward": "twice the forward products: the gradients of the input and of the weight; none for the embedding's lookup.",
    "recompute": (
        "forward products and attention that run again in the backward pass: what the traced gradient has under the remat policy beyond one without it, and "
        "in a pipeline that keeps inputs the whole forward pass of the layers."
    ),
    "attention forward": (
        "scores and values, 4 x tokens x tokens seen x heads x head width: the causal (windowed) part, as if every row were one document; the masked part "
        "of tiles on the diagonal is not counted."
    ),
    "attention backward": (
        "as many times the forward pass as its kernel has products for the two of the forward pass: 2.5 where one pass makes the scores again, 3.5 on TPUs, "
        "whose kernel makes them once for queries and once for keys."
    ),
    "teacher": "its forward pass, attention causal; no backward pass. Turning packed weights back into numbers is not counted.",
    "compression": (
        "elementwise FLOPs of weights seen through masks and grids (forward and backward, every microbatch, again where layers are computed again, on every "
        "device that holds a copy), and of activations put on grids, the teacher's too. New masks, made now and then, are not counted."
    ),
    "optimizer": (
        "elementwise FLOPs of the update with clipping and moving average, on every device that holds a copy, and products where the optimizer has some. "
        "The outer step of local updates, taken now and then, is not counted."
    ),
    "padding": "layers that are none, which a pipeline runs where its slices do not divide the layers; left out where there are none.",
    "model_full": (
        "3 x the forward pass with attention counted full, every query with every key; nothing that is computed twice, no teacher, no empty expert slots "
        "(Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B). MFU (full) divides it by time and peak."
    ),
    "model_causal": "the same with the part of attention that is not masked. MFU (causal) divides it by time and peak.",
    "hardware": "all that runs: the sum of the parts. HFU divides it by time and peak.",
    "effective": "model_causal without what pruned weights multiply at the end of training; no hardware here skips them.",
    "six_nd": (
        "6 x parameters that act on a token (the embedding's too) x tokens, without attention (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, who "
        "leave embeddings out)."
    ),
}
