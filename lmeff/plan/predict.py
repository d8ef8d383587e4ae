"""Everything about a job on one kind of chip: what counting, memory, traffic, time and energy say of it. Arithmetic alone; nothing is compiled."""

from lmeff.core.specs import count
from lmeff.models.cost import active_parameters
from lmeff.models.transformer import param_specs
from lmeff.parallel.devices import Topology
from lmeff.plan.energy import energy
from lmeff.plan.estimate import Estimate, Memory, StepTime
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.roofline import step_time
from lmeff.plan.state import held_bytes, host_bytes, state_bytes
from lmeff.plan.temporaries import temporary_bytes
from lmeff.plan.traffic import flows
from lmeff.plan.words import notes
from lmeff.plan.work import work


def predict(job: Job, chip: Chip, topology: Topology | None = None) -> Estimate:
    """What a job takes and costs.

    topology: of TPUs; None takes the one that so many devices are most likely rented as. Raises `ConfigError` for a job that cannot train.
    """
    done, sent = work(job), flows(job, chip, topology)
    time = step_time(job, chip, done, sent, topology)
    found = Estimate(
        job=job,
        chip=chip.name,
        parameters=count(param_specs(job.cfg)),
        active_parameters=active_parameters(job.cfg),
        work=done,
        memory=memory(job),
        capacity=chip.room(job.devices),
        flows=sent,
        time=time,
        energy=energy(job, chip, done, time, sent),
        notes=(),
    )
    return found._replace(notes=notes(found, chip, topology))


def memory(job: Job) -> tuple[Memory, ...]:
    """Bytes on a device of the first, a middle and the last stage; one without a pipeline."""
    last = job.degrees["pipe"] - 1
    temporaries, host, held = temporary_bytes(job), host_bytes(job), held_bytes(job)
    return tuple(Memory(s, state_bytes(job, s), temporaries, host, held) for s in sorted({0, last // 2, last}))


def fullest(job: Job) -> int:
    """Bytes on a device of the first stage: all stages run one program and hold as much (`lmeff.plan.state`, `lmeff.plan.temporaries`)."""
    return sum(sum(part.values()) for part in (state_bytes(job), held_bytes(job), temporary_bytes(job)))


def seconds(job: Job, chip: Chip, topology: Topology | None = None) -> StepTime:
    """The time of a step alone."""
    return step_time(job, chip, work(job), flows(job, chip, topology), topology)
