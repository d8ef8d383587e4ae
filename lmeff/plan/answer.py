"""A plan as plain JSON: what `lmeff plan --json` prints and what the page is made of, with the keys that are promised first."""

import math
from collections.abc import Sequence
from typing import Any

from lmeff.models.transformer import param_specs
from lmeff.parallel.leaves import Leaf, leaf_table
from lmeff.parallel.schedule_csv import to_csv
from lmeff.parallel.schedules import resolve
from lmeff.plan.estimate import Estimate, Memory, SiteTime
from lmeff.plan.job import Job
from lmeff.plan.work import CONVENTIONS

Json = dict[str, Any]
PROMISED = (
    "parameters", "flops_per_step", "bytes_per_device", "collective_bytes", "step_seconds", "energy_kwh", "fits", "compiled",
)  # fmt: skip


def leaves(job: Job) -> list[Leaf]:
    """Where every parameter lies."""
    return leaf_table(param_specs(job.cfg), job.layout, job.policy.params)


def estimate_json(estimate: Estimate) -> Json:
    """Everything about one stage. Bytes, seconds, joules and FLOPs without prefixes."""
    job, work, time = estimate.job, estimate.work, estimate.time
    return estimate.to_json() | {
        "job": job_json(job),
        "tokens_per_step": job.rows * job.tokens,
        "tokens_per_second": time.tokens_per_second,
        "utilization": {"mfu_full": time.mfu_full, "mfu_causal": time.mfu_causal, "hfu": time.hfu},
        "flops": {"hardware": work.hardware, "effective": work.effective, "six_nd": work.six_nd},
        "conventions": dict(CONVENTIONS),
        "memory": [memory_json(memory) for memory in estimate.memory],
        "collectives": [flow._asdict() for flow in estimate.flows],
        "sites": [site_json(site) for site in time.sites],
        "time_parts": dict(time.parts),
        "energy": estimate.energy._asdict(),
        "leaves": [leaf._asdict() for leaf in leaves(job)],
        "schedule": schedule_json(job),
    }


def job_json(job: Job) -> Json:
    """What was planned, in the config's own words."""
    return {
        "mesh": job.degrees,
        "zero": job.mesh.zero,
        "sequence": job.mesh.sequence,
        "precision": job.precision,
        "remat": job.remat,
        "remat_policy": job.policy_of_remat,
        "optimizer": job.optim.name,
        "rows": job.rows,
        "tokens": job.tokens,
        "steps": job.steps,
        "accumulate": job.accumulate,
        "teacher": job.teacher is not None,
    }


def memory_json(memory: Memory) -> Json:
    """One device of a stage of the pipeline."""
    return {**memory._asdict(), "total": memory.total}


def site_json(site: SiteTime) -> Json:
    """A site's seconds; its intensity in FLOPs a byte places it on the roofline."""
    return {**site._asdict(), "intensity": site.flops / site.bytes if site.bytes else None}


def schedule_json(job: Job) -> Json | None:
    """The pipeline's table; None without a pipeline."""
    stages = job.degrees["pipe"]
    if stages == 1:
        return None
    schedule = resolve(job.mesh.schedule, stages, job.accumulate, job.mesh.chunks)
    return {"name": schedule.name, "table": to_csv(schedule)}


def join(name: str, stages: Sequence[Json], chosen: Json) -> Json:
    """One stage alone, or all of them with the promised keys of the chosen one beside them; numbers that are none become null."""
    if len(stages) == 1:
        return finite({"experiment": name, **chosen})
    top = {key: chosen[key] for key in ("stage", *PROMISED) if key in chosen}
    return finite({"experiment": name, **top, "stages": list(stages)})


def finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
