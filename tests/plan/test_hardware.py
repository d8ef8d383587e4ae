"""Chips: published ratios, names, the CPU that is measured once, and what libtpu says of the memory of its chips."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from lmeff.core.errors import ConfigError
from lmeff.parallel.devices import FAMILIES, topology
from lmeff.plan import hardware
from lmeff.plan.hardware import CHIPS, FORMATS, chip
from lmeff.plan.limits import alpha
from tests.tpu.programs import needs_libtpu

# Scaling Book, FLOPs a byte over ICI, and over HBM.
INTENSITIES = {"v4": (3056, 229), "v5e": (2189, 241), "v5p": (2550, 166), "v6e": (5100, 560)}


@pytest.mark.parametrize("name", INTENSITIES)
def test_intensities_are_the_published_ones(name):
    found = chip(name)
    links, memory = INTENSITIES[name]
    assert alpha(found) == pytest.approx(links, rel=0.01)
    assert found.rate("bfloat16") / found.bandwidth == pytest.approx(memory, rel=0.01)


@pytest.mark.parametrize("name", CHIPS)
def test_a_row_is_complete_and_dense(name):
    found = CHIPS[name]
    assert found.name == name
    assert found.source.startswith("https://")
    assert {"float32", "bfloat16"} <= set(found.flops) <= set(FORMATS)
    assert (
        found.rate("float32") <= found.rate("bfloat16") <= found.rate("int8") <= 2.01 * found.rate("bfloat16")
    )  # sparse rates would be 4 times
    assert 0.9 * found.hbm < found.usable * found.cores < 1.01 * found.hbm
    assert min(found.bandwidth, found.dcn, found.pcie, found.power) > 0
    assert 90 < found.rate("bfloat16") / found.bandwidth < 600  # units: FLOP/s over bytes/s
    assert (found.ici > 0) == (found.platform == "tpu") == (found.nvlink == 0)
    assert hash(found) == hash(dataclasses.replace(found))


def test_tpus_are_the_families_that_can_be_compiled_for():
    tpus = {name: found for name, found in CHIPS.items() if found.platform == "tpu"}
    assert {name: (found.dims, found.cores) for name, found in tpus.items()} == {
        name: (family.dims, family.cores) for name, family in FAMILIES.items()
    }


def test_rings_close_as_the_slices_are_built():
    assert [chip("v5e").closes(side) for side in (4, 8, 16)] == [False, False, True]
    assert [chip("v5p").closes(side) for side in (2, 4, 6, 8)] == [False, True, False, True]


def test_simulated_devices_share_the_memory_of_a_cpu():
    machine = dataclasses.replace(chip("v5e"), platform="cpu", usable=16 * 2**30)
    assert [machine.room(n) for n in (1, 8)] == [16 * 2**30, 2 * 2**30]
    assert chip("v5e").room(8) == chip("v5e").usable


def test_an_unknown_chip_is_told_its_neighbours():
    with pytest.raises(ConfigError, match=r"chip: got 'V5P-8', expected one of v4, .*cpu; did you mean v5p"):
        chip("V5P-8")
    with pytest.raises(ConfigError, match="got 'int7', expected one of float32"):
        chip("v4").rate("int7")


def test_a_format_without_its_own_units_runs_as_bfloat16():
    assert chip("v4").rate("fp8") == chip("v4").rate("bfloat16")
    assert chip("a100").rate("fp8") == chip("a100").rate("bfloat16")
    assert chip("h100").rate("fp8") == pytest.approx(2 * chip("h100").rate("bfloat16"), rel=1e-3)


def test_the_cpu_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = chip("cpu")
    (cached,) = (tmp_path / "lmeff").iterdir()
    assert 1e9 < found.rate("float32") < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert found.chips(8) == 1
    monkeypatch.setattr(hardware, "measure_cpu", None)  # a second measurement would call it
    assert chip("cpu") == found
    cached.write_text("{}")
    monkeypatch.setattr(hardware, "measure_cpu", lambda: dataclasses.replace(found, power=1.0))
    assert chip("cpu").power == 1.0
    monkeypatch.setattr(hardware, "measure_cpu", lambda: dataclasses.replace(found, power=2.0))
    assert chip("cpu").power == 1.0
    monkeypatch.setattr("os.cpu_count", lambda: 10_000)  # another machine on the same home
    assert chip("cpu").power == 2.0


def test_a_home_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "lmeff").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "measure_cpu", lambda: CHIPS["v4"])
    assert chip("cpu") == CHIPS["v4"]


@pytest.mark.tpu_aot
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_usable_memory_is_what_libtpu_says(name):
    """A program of 1.6 TB names the memory that there is."""
    device = jax.sharding.SingleDeviceSharding(topology(name)[0])
    x = jax.ShapeDtypeStruct((400 * 2**20, 2048), jnp.bfloat16, sharding=device)
    with pytest.raises(jax.errors.JaxRuntimeError, match="HBM") as error:
        jax.jit(lambda x: x + 1, out_shardings=device).lower(x).compile()
    said = re.search(r"available HBM \((\d+\.\d+)G\)", str(error.value))
    assert said
    assert float(said[1]) * 2**30 == pytest.approx(chip(name.split(":")[0]).usable, rel=1e-6)
