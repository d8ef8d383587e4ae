"""A plan as plain JSON: what `lmeff plan --json` prints and what the page is made of, with the keys that are promised first."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lmeff.core.specs import count
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.leaves import Leaf, leaf_table
from lmeff.parallel.schedule_csv import to_csv
from lmeff.parallel.schedules import resolve
from lmeff.plan.budget import Option, budget
from lmeff.plan.estimate import Estimate, Memory, SiteTime
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.search import Search
from lmeff.plan.serving import Serving, serving, table
from lmeff.plan.sizing import by_ratio, compute_optimal
from lmeff.plan.words import setting
from lmeff.plan.work import CONVENTIONS

Json = dict[str, Any]
BATCHES = (1, 32)  # rows that are served at a time
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
        "sizing": sizing_json(job, work.six_nd),
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
        "words": setting(job),
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


def sizing_json(job: Job, six_nd: float) -> Json:
    """How many tokens the whole run sees, and what its FLOPs would be best spent on."""
    flops, tokens = six_nd * job.steps, job.rows * job.tokens * job.steps
    best = {"Besiroglu et al. 2024": compute_optimal(flops), "20 tokens a parameter": by_ratio(flops)}
    return {
        "flops": flops,
        "tokens": tokens,
        "tokens_per_parameter": 6 * tokens**2 / flops,
        "compute_optimal": {law: size._asdict() for law, size in best.items()},
    }


def memory_json(memory: Memory) -> Json:
    """One device of a stage of the pipeline."""
    return {**memory._asdict(), "held": dict(memory.held), "total": memory.total}


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


def search_json(found: Search) -> Json:
    """What a search found: the best plans and those beside which they are best, each once, with its names."""
    named: dict[Job, tuple[list[str], Estimate]] = {}
    groups = {
        "": found.best,
        "about as fast, simpler": (found.simple,),
        "best without a pipeline": (found.plain,),
        "best with a pipeline": (found.piped,),
        "least memory of those predicted": (found.least,),
        "the config's": (found.own,),
    }
    for name, estimates in groups.items():
        for estimate in estimates:
            if estimate is not None:
                names, _ = named.setdefault(estimate.job, ([], estimate))
                names += [name] if name else []
    return {
        "looked": found.looked,
        "legal": found.legal,
        "predicted": found.close,
        "fit": found.fit,
        "plans": [row_json(estimate, names) for names, estimate in named.values()],
        "reasons": list(found.reasons),
        "refused": {reason: refused._asdict() for reason, refused in found.refused.items()},
    }


def row_json(estimate: Estimate, names: Sequence[str]) -> Json:
    """A plan among others."""
    job, time = estimate.job, estimate.time
    return {
        "names": list(names),
        "mesh": job.degrees,
        "words": setting(job),
        "accumulate": job.accumulate,
        "remat": job.remat,
        "step_seconds": {"low": time.low, "middle": time.middle, "high": time.high},
        "tokens_per_second": time.tokens_per_second,
        "mfu_full": time.mfu_full,
        "bytes": estimate.peak.total,
        "fits": estimate.fits,
        "notes": list(estimate.notes),
    }


def budget_json(job: Job, chip: Chip, *, bytes: int | None, ms: float | None) -> Json:
    """The gentlest compressions of a stage's model that meet a target, decoded on as few devices as hold it in bfloat16."""
    devices = replica(job.cfg, chip, job.tokens)
    dtype = jnp.dtype(job.policy.params).name
    where = {"devices": devices, "context": job.tokens}
    found = budget(job.cfg, chip, bytes=bytes, latency_ms=ms, teacher=job.name, dtype=dtype, **where)
    return {"bytes": bytes, "ms": ms, **where, "options": [_option(option) for option in found]}


def _option(option: Option) -> Json:
    plain = {key: value for key, value in option._asdict().items() if key not in ("stage", "cfg")}
    return {**plain, "parameters": count(param_specs(option.cfg))}


def serving_json(cfg: ModelConfig, chip: Chip, context: int) -> Json:
    """The model on as few devices as hold it in bfloat16, one row and many, in every pair of formats."""
    devices = replica(cfg, chip, context)
    rows = [row for batch in BATCHES for row in table(cfg, chip, devices=devices, batch=batch, context=context)]
    return {"devices": devices, "context": context, "rows": [_served(row) for row in rows]}


def replica(cfg: ModelConfig, chip: Chip, context: int) -> int:
    """How many devices hold the model in bfloat16 with the cache of one row; the most that its heads can be cut over where none do."""
    ways = [n for n in range(1, cfg.heads + 1) if cfg.heads % n == 0 and cfg.ffn % n == 0]
    fits = (n for n in ways if serving(cfg, chip, devices=n, context=context).fits)
    return next(fits, ways[-1])


def _served(row: Serving) -> Json:
    return {
        **row._asdict(),
        "prefill": row.prefill._asdict() | {"seconds": row.prefill.seconds, "bound": row.prefill.bound},
        "decode": row.decode._asdict() | {"seconds": row.decode.seconds, "bound": row.decode.bound},
        "prefill_ms": row.prefill_ms,
        "decode_ms": row.decode_ms,
    }


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
