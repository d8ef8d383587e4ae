"""Energy by operation and byte, against what is measured of chips and what runs report."""

import dataclasses

import pytest

from lmeff.plan.energy import ASSUMPTIONS, chip_hours, energy
from lmeff.plan.estimate import StepTime
from lmeff.plan.hardware import chip
from lmeff.plan.roofline import step_time
from lmeff.plan.traffic import flows
from tests.plan.llama import SMALL, job_of, work_of


def run(job, name):
    on, work = chip(name), work_of(job)
    sent = flows(job, on)
    time = step_time(job, on, work, sent)
    return energy(job, on, work, time, sent), time


def test_the_parts_are_counts_times_energies():
    job = job_of(SMALL, 16, 32, 2048, "full", fsdp=16, steps=100)
    found, time = run(job, "v5e")
    joules = found.joules
    assert joules["arithmetic"] == pytest.approx(work_of(job).hardware * 0.295e-12)
    moved = sum(site.bytes for site in time.sites) * 16 + time.parts["optimizer"] * 819e9 * 16
    assert joules["memory"] == pytest.approx(moved * 43.75e-12)
    assert joules["network"] == pytest.approx(16 * 80e-12 * sum(flow.bytes for flow in flows(job, chip("v5e"))))
    assert joules["static"] == pytest.approx(16 * 145 * 90 / 192 * time.middle)
    assert joules["cooling"] == pytest.approx(0.1 * sum(joules.values()) / 1.1)
    assert found.kwh == pytest.approx(100 * sum(joules.values()) / 3.6e6)
    assert found.assumptions.keys() > ASSUMPTIONS.keys()


def test_a_v4_takes_the_power_that_was_measured():
    """Google measured 170 W in the mean and 192 W at most (https://cloud.google.com/tpu/docs/v4)."""
    job = job_of(SMALL, 16, 128, 2048, "full", fsdp=16)
    found, time = run(job, "v4")
    watts = sum(value for name, value in found.joules.items() if name != "cooling") / time.middle / 16
    assert watts == pytest.approx(170, rel=0.15)
    assert found.kwh < found.ceiling


def test_chip_hours_at_full_power_are_what_bloom_reports():
    """1,082,990 hours of A100s at 400 W: 433,196 kWh without cooling (Luccioni et al. 2022, https://arxiv.org/abs/2211.02001)."""
    hours, devices = 1_082_990, 384
    job = job_of(SMALL, devices, devices, 2048, fsdp=devices, steps=1000, platform="gpu")
    seconds = hours * 3600 / devices / 1000
    time = StepTime(seconds, seconds, seconds, (), {}, devices * 2048 / seconds, 0.5, 0.5, 0.5)
    found = energy(job, chip("a100"), work_of(job), time, ())
    assert found.chip_hours == pytest.approx(hours)
    assert found.ceiling / ASSUMPTIONS["PUE"] == pytest.approx(433_196, rel=1e-4)


def test_hours_are_those_of_chips_and_grow_with_tokens():
    job = job_of(SMALL, 32, 32, 2048, fsdp=32, steps=10)
    _, time = run(job, "tpu7x")
    assert chip_hours(job, chip("tpu7x"), time) == pytest.approx(10 * time.middle * 16 / 3600)  # two devices a chip
    assert chip_hours(job, chip("tpu7x"), time, tokens=2 * 10 * 32 * 2048) == pytest.approx(
        2 * chip_hours(job, chip("tpu7x"), time)
    )


def test_integers_multiply_for_less():
    job = job_of(SMALL, 1, 4, 512)
    work = work_of(job)
    integers = work._replace(sites=tuple(site._replace(format="int8") for site in work.sites))
    on, time = chip("v5e"), run(job, "v5e")[1]
    plain, cheap = (energy(job, on, w, time, ()).joules["arithmetic"] for w in (work, integers))
    assert cheap == pytest.approx(plain * 0.05 / 0.295)
    updated = dataclasses.replace(job, steps=2)
    assert energy(updated, on, work, time, ()).kwh == pytest.approx(2 * energy(job, on, work, time, ()).kwh)
