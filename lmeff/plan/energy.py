"""What a run takes in energy and chip-hours: an estimate from below by what moves and multiplies, beside what the chips would take at full power.

Energy of arithmetic and of memory is counted by operation and byte. The rest of a chip (leakage, clocks, on-chip memories, fans' share) is a constant part of
its power, as measured on the one chip whose maker tells it. All numbers but the peak powers are in `ASSUMPTIONS`; they are right to a factor of two at best.
"""

from collections.abc import Sequence

from lmeff.plan.estimate import Energy, Flow, StepTime, Work
from lmeff.plan.hardware import Chip
from lmeff.plan.job import Job
from lmeff.plan.roofline import costs_of, elementwise, format_of, update_seconds

HOUR, KWH = 3600.0, 3.6e6


def energy(job: Job, chip: Chip, work: Work, time: StepTime, flows: Sequence[Flow]) -> Energy:
    """Of a job whose step takes `time.middle`. `ceiling` in kWh is all chips at full power all the time: what a bill can be compared with."""
    joules = {
        "arithmetic": _arithmetic(job, chip, work),
        "memory": _memory(job, chip, work) * PICOJOULE * ASSUMPTIONS["pJ per byte of HBM"],
        "network": job.devices * sum(flow.bytes * PER_BYTE[flow.network] * PICOJOULE for flow in flows),
        "static": ASSUMPTIONS["static share of a chip's power"] * chip.power * chip.chips(job.devices) * time.middle,
    }
    joules["cooling"] = (ASSUMPTIONS["PUE"] - 1) * sum(joules.values())
    hours = chip_hours(job, chip, time)
    return Energy(
        joules=joules,
        kwh=sum(joules.values()) * job.steps / KWH,
        chip_hours=hours,
        assumptions={**ASSUMPTIONS, "W of a chip at most": chip.power},
        ceiling=hours * chip.power * ASSUMPTIONS["PUE"] / 1000,
    )


def chip_hours(job: Job, chip: Chip, time: StepTime, tokens: float | None = None) -> float:
    """Hours of one chip for so many tokens; None takes those of the run."""
    tokens = job.steps * job.rows * job.tokens if tokens is None else tokens
    return tokens / time.tokens_per_second * chip.chips(job.devices) / HOUR


def _arithmetic(job: Job, chip: Chip, work: Work) -> float:
    """Products by their format; whatever is left of the FLOPs (updates, fake quantization) in float32, padding as the model computes."""
    products = sum(
        cost.flops * job.devices * PER_FLOP[format_of(cost.site.format)] for cost in costs_of(job, chip, work)
    )
    others = sum(work.parts.get(name, 0.0) for name in ("optimizer", "compression")) * PER_FLOP["float32"]
    padding = work.parts.get("padding", 0.0) * PER_FLOP[format_of(job.policy.compute)]
    return (products + others + padding) * PICOJOULE


def _memory(job: Job, chip: Chip, work: Work) -> float:
    """Bytes of all devices."""
    sites = sum(cost.bytes for cost in (*costs_of(job, chip, work), elementwise(job, chip, work)))
    return sites * job.devices + update_seconds(job, chip) * chip.bandwidth * chip.chips(job.devices)


PICOJOULE = 1e-12

# Arithmetic: Jouppi et al. 2021 (https://doi.org/10.1109/ISCA52012.2021.00010), table 2, 7 nm, after Horowitz 2014
# (https://doi.org/10.1109/ISSCC.2014.6757323; 45 nm: 3.7 + 0.9 pJ for float32): a product and an addition are two FLOPs, sums are float32 or int32.
#   float32 (1.31 + 0.38) / 2, bfloat16 (0.21 + 0.38) / 2, int8 (0.07 + 0.03) / 2; fp8 is taken as a product of int8's size and a sum in float32.
# HBM: the same table, 250 to 450 pJ for 64 bits. Links and host: orders of magnitude of electrical and optical links with their ends (10 pJ a bit near, 60 pJ
# through switches), DDR4 at 1300 pJ for 64 bits. Static: TPU v4 takes 90 W idle of 192 W at most (https://cloud.google.com/tpu/docs/v4).
# PUE: https://www.google.com/about/datacenters/efficiency, fleet average.
ASSUMPTIONS: dict[str, float] = {
    "pJ per FLOP in float32": 0.845,
    "pJ per FLOP in bfloat16": 0.295,
    "pJ per FLOP in int8": 0.05,
    "pJ per FLOP in fp8": 0.225,
    "pJ per byte of HBM": 350 / 8,
    "pJ per byte over ICI": 80.0,
    "pJ per byte over NVLink": 80.0,
    "pJ per byte over DCN": 480.0,
    "pJ per byte to the host": 80.0 + 1300 / 8,
    "static share of a chip's power": 90 / 192,
    "PUE": 1.1,
}
PER_FLOP = {name: ASSUMPTIONS[f"pJ per FLOP in {name}"] for name in ("float32", "bfloat16", "int8", "fp8")}
PER_BYTE = {
    "ici": ASSUMPTIONS["pJ per byte over ICI"],
    "nvlink": ASSUMPTIONS["pJ per byte over NVLink"],
    "dcn": ASSUMPTIONS["pJ per byte over DCN"],
    "host memory": ASSUMPTIONS["pJ per byte to the host"],
}
