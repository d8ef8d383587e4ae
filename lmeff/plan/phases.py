"""The phases of a train step, each as the bytes by category that a device holds at the phase's fullest moment (`lmeff.plan.temporaries` takes the fullest)."""

import jax.numpy as jnp

from lmeff.compress.config import Quantize
from lmeff.distill.objectives import CHUNK, rows_at_once, shared_axes
from lmeff.models.config import ModelConfig
from lmeff.parallel.mesh import ZERO_AXIS
from lmeff.parallel.stages import slice_layers
from lmeff.plan.device import Device, Part
from lmeff.plan.live import Live, arrives, attention_loop, ffn_backward, ffn_forward, loss_rows

Bytes = dict[str, float]
FLOAT = 4  # bytes of a float32


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
    own, one = _matrices(part)
    if device.region or part.elements(held=True) == part.elements(held=False):
        return {"gathered weights": device.narrow * part.layer}
    if arrives(device.layout):  # gradients go round as float32 parts, two at a time
        gathered = own if part.saved.everything else own + one
        parts = 2 * FLOAT * part.layer / device.job.degrees[ZERO_AXIS]
        return {"gathered weights": device.narrow * gathered + parts}
    ffn = sum(leaf.elements / leaf.layers for leaf in part.leaves if leaf.path.split("/")[1:2] in (["mlp"], ["moe"]))
    # Gradients of the ffn are whole until they are reduced.
    return {"gathered weights": device.narrow * own, "gradients": FLOAT * ffn}


def _matrices(part: Part) -> tuple[int, int]:
    """Elements of the matrices that are gathered though others are multiplied as they arrive: attention's last one, and one of the ffn."""
    return part.sizes["H"] * part.cfg.head_size * part.cfg.width, part.sizes["F"] * part.cfg.width


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
    return _sum(
        through,
        kept,
        {"block": student.bytes(ffn_forward(device.layout, student.cfg, everything=student.saved.everything))},
    )


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
    for part, name in ((device.student, "logits"), (device.teacher, TEACHING)):
        if part is None:
            continue
        layout, cfg = device.layout, part.cfg
        shared = () if device.region else shared_axes(layout, cfg)
        cut = layout.size((*shared, "tensor")) if cfg.vocab % layout.size((*shared, "tensor")) == 0 else 1
        rows = min(rows_at_once(CHUNK, layout, cfg, shared), part.sizes["B"] * part.sizes["T"]) * layout.size(shared)
        logits, heads = loss_rows(layout, name == TEACHING, device.teacher is not None)
        found[name] = FLOAT * cfg.vocab / cut * (logits * rows + heads * cfg.width) + device.narrow * rows * cfg.width
    return found


def teaching(device: Device) -> Bytes:
    """A layer of the teacher, going forward while the student's activations are kept.

    So XLA orders it at full depth; of four layers it may run the teacher first.
    """
    student, teacher = device.student, device.teacher
    if teacher is None:
        return {}
    kept = {"kept activations": student.layers * student.kept(device.remat)}
    block = teacher.bytes(ffn_forward(device.layout, teacher.cfg, everything=True))
    in_parts = device.layout.platform == "tpu" and teacher.cfg.moe is None and arrives(device.layout)
    weights = sum(_matrices(teacher)) if in_parts else teacher.layer
    return _sum(_through(device) if device.region else {}, kept, {TEACHING: block + device.narrow * weights})


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
    return slice_layers(device.student.cfg.layers, device.schedule.slices)


def pipelined_forward(device: Device) -> Bytes:
    """F: the stash as the branch got it and as it leaves it, and a layer going forward."""
    block = {"block": device.student.bytes(ffn_forward(device.layout, device.student.cfg, everything=True))}
    return _sum(_through(device), _layer_weights(device, device.student), stashes(device, pending=1), block)


def stashes(device: Device, pending: int = 2) -> Bytes:
    """The buffers of the executor: rows of `lmeff.parallel.program.SlotCounts`, and a spare one each.

    pending: how often there are those from B to W.
    """
    student, plan = device.student, device.job.mesh
    assert device.schedule is not None
    rows = device.schedule.slots
    layers = _slice_layers(device)
    stream = student.bytes({"BtD": (1, 0)}) * (
        1 if device.teacher is None else 1 + device.teacher.cfg.width / student.cfg.width
    )
    inputs, outputs = (layers * student.bytes(table) for table in (_inputs(student.cfg), _outputs(student.cfg)))
    if plan.stash == "input":
        stash, left = stream, inputs + outputs
    else:
        stash, left = stream + layers * student.kept(device.remat) + inputs, outputs
    arrived = (rows.activation + rows.gradient + 2) * stream
    return {"stash": 2 * (rows.stash + 1) * stash + pending * (rows.pending + 1) * left + arrived}


def _inputs(cfg: ModelConfig) -> Live:
    """What the products of a layer multiply, each array once; those of experts are their own."""
    ffn = {"BTD": (2, 0), "BTF": (1, 0)} if cfg.moe is None else {"BTD": (1, 0)}
    return {"BTHC": (1, 0), **ffn}


def _outputs(cfg: ModelConfig) -> Live:
    """What they give."""
    ffn = {"BTF": (1 + cfg.gated, 0), "BTD": (2, 0)} if cfg.moe is None else {"BTD": (1, 0)}
    return {"BTHC": (1, 0), "BTKC": (2, 0), **ffn}


TEACHING = "teacher's activations"  # its state is "teacher": a table of both keeps them apart
STRAIGHT = (forward, backward, loss, teaching, update)
PIPELINED = (pipelined_forward, pipelined_backward, update)
