"""Bytes of temporaries that one device holds at the peak of a train step, by category.

A step is a few phases that follow each other: layers forward, the loss in chunks, layers backward, the optimizer; of a pipeline, the ops of a tick. Each
holds what goes from phase to phase (kept activations, gradients, weights that were gathered) and what lives at its own worst moment. The peak is the
largest sum of a phase. What lives at the worst moment of a block is a table of letters (`lmeff.plan.live`): which arrays exist is a matter of the code and
of the order that XLA runs it in, how large they are follows from the model and the mesh.
"""

from lmeff.plan.device import Device
from lmeff.plan.job import Job
from lmeff.plan.live import VECTOR_MEMORY
from lmeff.plan.phases import PIPELINED, STRAIGHT, TEACHING, Bytes

SCRATCH = 64 * 2**20  # libtpu's `scoped_hbm_for_all_reduce`, 65,536 KiB in every program that was dumped (0.0.42.1)


def temporary_bytes(job: Job, *, family: str | None = None) -> dict[str, int]:
    """Bytes of temporaries on a device at the step's peak, by category. All stages of a pipeline run one program and reserve alike.

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
        for name in [name for name in ("block", "logits", TEACHING) if name in phase]:
            inside = min(room, phase[name])
            phase[name], room = phase[name] - inside, room - inside
    return made


def _size(phase: Bytes) -> float:
    return sum(phase.values())
