"""Times of collectives against closed forms of rings, and where the axes of a mesh lie."""

import dataclasses
import math

import numpy as np
import pytest

from lmeff.core.errors import ConfigError
from lmeff.parallel.devices import Topology, arrange, parse_topology, topology
from lmeff.parallel.mesh import AXES
from lmeff.parallel.volume import volume
from lmeff.plan.hardware import chip
from lmeff.plan.links import DCN_HOP, ICI_HOP, Side, Torus, seconds
from lmeff.plan.slices import default_topology, ways
from lmeff.plan.state import host_bytes
from lmeff.plan.traffic import HOST, flows, host_flows, total
from lmeff.train.optim import OptimConfig
from tests.plan.llama import SMALL, job_of
from tests.tpu.programs import needs_libtpu

GB = 1e9
RING = Torus((Side(16, 45 * GB, True),))
LINE = Torus((Side(16, 45 * GB, False),))


def degrees(**sizes):
    return dict.fromkeys(AXES, 1) | sizes


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 15 / 16 / 90),
        ("reduce-scatter", 15 / 16 / 90),
        ("all-reduce", 2 * 15 / 16 / 90),
        ("all-to-all", 16 / (4 * 90)),  # of what a device holds: a quarter of a gather of all of it
        ("collective-permute", 1 / 45 + ICI_HOP),
    ],
)
def test_a_gigabyte_on_a_ring(kind, expected):
    assert seconds(kind, RING, GB) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "all-to-all"])
def test_a_line_takes_twice_as_long_as_a_ring(kind):
    assert seconds(kind, LINE, GB) == pytest.approx(2 * seconds(kind, RING, GB))


def test_two_devices_exchange_half_of_what_they_have():
    pair = Torus((Side(2, 45 * GB, False),))
    assert seconds("all-to-all", pair, GB) == pytest.approx(0.5 / 45)
    assert seconds("all-gather", pair, GB) == pytest.approx(0.5 / 45)


def test_small_collectives_take_as_long_as_their_hops():
    assert seconds("all-gather", RING, 4096) == 8 * ICI_HOP
    assert seconds("all-gather", LINE, 4096) == 15 * ICI_HOP
    # The book's turning point: 45 kB a hop and direction, 90 kB a device of the ring in both.
    turn = 8 * ICI_HOP * 90 * GB * 16 / 15
    assert seconds("all-gather", RING, turn) == pytest.approx(seconds("all-gather", RING, 1))
    assert seconds("all-gather", RING, 2 * turn) == pytest.approx(2 * seconds("all-gather", RING, 1))


def test_a_torus_adds_its_axes_and_exchanges_along_the_longest():
    torus = Torus((Side(4, 90 * GB, True), Side(8, 90 * GB, True)))
    assert seconds("all-gather", torus, GB) == pytest.approx(31 / 32 / 360)
    assert seconds("all-to-all", torus, GB) == pytest.approx(8 / (4 * 180))


@pytest.mark.parametrize(
    ("name", "devices", "slices", "shape"),
    [
        ("v5e", 8, 1, "2x4"),
        ("v5e", 128, 1, "8x16"),
        ("v5e", 512, 2, "16x16"),
        ("v5p", 64, 1, "4x4x4"),
        ("v5p", 128, 1, "4x4x8"),
        ("v5p", 192, 1, "4x4x12"),
        ("v5p", 512, 1, "8x8x8"),
        ("v4", 8, 1, "2x2x2"),
        ("tpu7x", 128, 1, "4x4x4"),
    ],
)
def test_default_slices(name, devices, slices, shape):
    found = default_topology(chip(name), devices, slices)
    assert found == Topology(name, shape, slices)
    assert found.devices == devices
    assert parse_topology(f"{name}:{shape}:{slices}") == found


def test_no_slice_is_larger_than_a_pod():
    with pytest.raises(ConfigError, match=r"got 512 devices of v5e in 1 slice.*mesh\.dcn"):
        default_topology(chip("v5e"), 512)
    with pytest.raises(ConfigError, match="got 3 devices of tpu7x"):
        default_topology(chip("tpu7x"), 3)


def test_an_axis_of_16_has_two_sides_of_a_cube():
    found = ways(degrees(fsdp=4, tensor=16), chip("v5p"))
    assert [side.length for side in found.sides["tensor"]] == [4, 4]
    assert found.along(("tensor",)).gather(GB) == pytest.approx(15 / 16 / 360)
    assert found.along(("fsdp",)).gather(GB) == pytest.approx(3 / 4 / 180)
    assert found.along(("fsdp", "tensor")).gather(GB) == pytest.approx(63 / 64 / 540)


def test_a_part_of_a_side_is_a_line_and_what_lies_across_it_shares_its_links():
    found = ways(degrees(fsdp=64, tensor=4), chip("v5e"))
    (inner,) = found.sides["tensor"]
    assert (inner.length, inner.ring, inner.one_way) == (4, False, 45 * GB)
    assert sorted((side.length, side.one_way / GB) for side in found.sides["fsdp"]) == [(4, 45 / 4), (16, 45.0)]


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8, "tensor": 8}, {"data": 2, "fsdp": 4, "pipe": 2, "tensor": 4}, {"fsdp": 64}]
)
def test_axes_take_all_devices_of_the_slice(sizes):
    found = ways(degrees(**sizes), chip("v5p"))
    for axis, size in sizes.items():
        assert math.prod(side.length for side in found.sides[axis]) == size


def test_two_devices_of_a_chip_share_its_links():
    found = ways(degrees(fsdp=64, tensor=2), chip("tpu7x"))
    assert found.sides["tensor"][0].one_way == chip("tpu7x").die
    assert {side.one_way for side in found.sides["fsdp"]} == {45 * GB}


def test_between_slices_every_device_has_its_part_of_the_hosts_link():
    found = ways(degrees(dcn=2, fsdp=256), chip("v5e"))
    over = found.along(("dcn",))
    assert over.network == "dcn"
    assert over.gather(GB) == pytest.approx(0.5 / (25 / 8))
    assert over.gather(1) == DCN_HOP
    both = found.along(("dcn", "fsdp"))  # first within slices, then each device a 256th
    assert both.gather(256 * GB) == pytest.approx(over.gather(GB) + found.along(("fsdp",)).gather(256 * GB))


def test_gpus_gather_over_nvlink_and_beyond_it_over_all_links_of_a_node():
    found = ways(degrees(fsdp=4, tensor=8), chip("h100"))
    assert found.along(("tensor",)).network == "nvlink"
    assert found.along(("tensor",)).gather(GB) == pytest.approx(7 / 8 / 450)
    assert found.along(("fsdp",)).gather(GB) == pytest.approx(3 / 4 / 50)
    both = found.along(("fsdp", "tensor")).gather(GB)
    assert both == pytest.approx(max(3 / 4 / 400, 7 / 8 / 450))  # over 8 links of a node, then within it
    assert found.along(("fsdp",)).network == "dcn"


def test_a_topology_must_have_the_devices():
    with pytest.raises(ConfigError, match="with 16 devices, expected 64 devices of v5p"):
        ways(degrees(fsdp=64), chip("v5p"), Topology("v5p", "2x2x4"))
    with pytest.raises(ConfigError, match=r"mesh\.dcn: got 1 on 2 slices"):
        ways(degrees(fsdp=8), chip("v5e"), Topology("v5e", "2x2", 2))


MESHES = {
    "fsdp": {"fsdp": 16},
    "fsdp x tensor": {"fsdp": 4, "tensor": 4},
    "pipe": {"fsdp": 4, "pipe": 4, "accumulate": 4},
    "slices": {"dcn": 2, "fsdp": 8},
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_bytes_are_those_of_the_formulas_and_times_fall_with_bandwidth(mesh):
    job = job_of(SMALL, 16, 16, 2048, "full", **mesh)
    found = flows(job, chip("v5e"))
    sent = {}
    for flow in found:
        sent[flow.kind, flow.axes] = sent.get((flow.kind, flow.axes), 0) + flow.bytes
    last = job.degrees["pipe"] - 1
    assert any(sent == pytest.approx(volume(job.step(stage))) for stage in {0, min(1, last), last})
    faster = dataclasses.replace(chip("v5e"), ici=180 * GB, dcn=50 * GB)
    assert total(flows(job, faster)) < total(found)
    assert total(found) > total(flows(job, faster)) > 0.49 * total(found)
    assert all(flow.seconds > 0 for flow in found)
    assert {flow.network for flow in found if "dcn" in flow.axes} <= {"dcn"}


def test_offloaded_moments_go_to_the_host_and_back():
    job = job_of(SMALL, 16, 16, 2048, "full", fsdp=16)
    away = job.changed(optim=OptimConfig(offload=True))
    (copy,) = [flow for flow in flows(away, chip("v5e")) if flow.network == HOST]
    parameters = 1_235_814_400  # of Llama 3.2 1B
    assert host_bytes(away) == pytest.approx(8 * parameters / 16, rel=1e-3)
    assert copy.bytes == pytest.approx(2 * host_bytes(away))
    assert copy.seconds == pytest.approx(copy.bytes / 15e9)
    assert not [flow for flow in flows(job, chip("v5e")) if flow.network == HOST]


def test_offloaded_activations_go_there_once_a_microbatch():
    job = job_of(SMALL, 16, 32, 2048, "offload:mlp_hidden", fsdp=16, accumulate=2)
    (copy,) = host_flows(job, chip("v5e"))
    hidden = 2 * 16 * 32 * 2048 * 8192 / 16  # bytes x layers x rows x tokens x ffn, a device
    assert copy.bytes == pytest.approx(2 * hidden, rel=1e-6)
    assert copy.loop == "layer"


PLACES = {
    "v5p:4x4x4": [{"fsdp": 4, "tensor": 16}, {"fsdp": 8, "tensor": 8}, {"data": 2, "fsdp": 2, "pipe": 4, "tensor": 4}],
    "v5p:4x8x8": [{"fsdp": 16, "pipe": 2, "tensor": 8}],
    "v5e:16x16": [{"fsdp": 32, "tensor": 8}, {"fsdp": 64, "tensor": 4}, {"fsdp": 16, "tensor": 16}],
    "v5e:4x8": [{"fsdp": 2, "pipe": 2, "tensor": 8}, {"fsdp": 8, "tensor": 4}],
    "v5e:4x4:2": [{"dcn": 2, "fsdp": 4, "tensor": 4}],
    "tpu7x:4x4x4": [{"fsdp": 16, "tensor": 8}, {"fsdp": 32, "tensor": 4}, {"fsdp": 8, "tensor": 16}],
}


@pytest.mark.tpu_aot
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", PLACES)
def test_axes_lie_where_jax_puts_them(name):
    """Along every axis of the mesh that JAX makes: how many devices differ in each coordinate, and by how much."""
    on, shape = chip(name.split(":")[0]), parse_topology(name)
    link = on.ici / 2 / on.cores
    for sizes in PLACES[name]:
        mesh, found = arrange(topology(name), degrees(**sizes)), ways(degrees(**sizes), on, shape).sides
        for axis in sizes.keys() - {"dcn"}:
            line = np.moveaxis(mesh, AXES.index(axis), 0).reshape(sizes[axis], -1)[:, 0]
            places = np.array([(*device.coords, device.core_on_chip) for device in line])
            values = [sorted(set(column)) for column in places.T]
            real = sorted((len(at), at[1] - at[0]) for at in values if len(at) > 1)
            assert sorted((s.length, (on.die if s.one_way > link else link) / s.one_way) for s in found[axis]) == real
