"""Names of topologies, and devices of TPUs that are not here in the order of a mesh."""

import sys

import jax
import numpy as np
import pytest

from lmeff.core.errors import ConfigError, MissingExtra
from lmeff.parallel.devices import Topology, arrange, parse_topology, slices, topology
from lmeff.parallel.mesh import MeshPlan, make_layout
from tests.tpu.programs import needs_libtpu


def test_names():
    assert parse_topology("v5e:4x4") == Topology("v5e", "4x4")
    assert parse_topology("v5p:4x4x8:2") == Topology("v5p", "4x4x8", 2)
    assert parse_topology("tpu7x:2x2x4").devices == 32, "two devices a chip"


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v9:4x4", "v5e:4x4:0", "v5e:4x0", "v5e-16", ""]
)
def test_names_of_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=f"topology: got '{name}', expected FAMILY:SHAPE"):
        parse_topology(name)


def test_without_libtpu_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lmeff\[tpu\]'"):
        topology("v5e:4x4")


def test_devices_of_the_host_keep_their_order():
    found = arrange(jax.devices(), {"dcn": 2, "data": 1, "tensor": 4})
    assert found.shape == (2, 1, 4)
    assert list(found.flat) == jax.devices()


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x4", "v5e:4x4", "v5e:4x4:2", "v5p:4x4x4", "v6e:4x4", "v6e:1x1", "tpu7x:2x2x4"])
def test_devices_of_a_topology(name):
    devices, wanted = topology(name), parse_topology(name)
    assert len(devices) == wanted.devices
    assert slices(devices) == wanted.slices
    assert {device.platform for device in devices} == {"tpu"}
    assert jax.default_backend() == "cpu"


@pytest.mark.tpu_aot
@needs_libtpu
def test_shapes_that_are_not_built_are_refused():
    with pytest.raises(ConfigError, match=r"topology: got 'v5e:3x5', expected a shape .* libtpu says"):
        topology("v5e:3x5")


def hops(devices):
    """Steps on the grid from each device to the next."""
    coords = np.array([device.coords for device in devices])
    return np.abs(np.diff(coords, axis=0)).sum(-1)


@pytest.mark.tpu_aot
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("v5e:4x4", MeshPlan(fsdp=4, tensor=4)),
        ("v5e:16x16", MeshPlan(fsdp=64, tensor=4)),
        ("v5p:4x4x4", MeshPlan(pipe=2, fsdp=8, tensor=4)),
        ("v6e:4x4", MeshPlan(context=4, tensor=4)),
    ],
)
def test_inner_axes_join_neighbours(name, plan):
    layout = make_layout(plan, topology(name))
    assert layout.platform == "tpu"
    lines = layout.mesh.devices.reshape(-1, plan.tensor)
    assert len({device.id for device in lines.flat}) == lines.size
    assert all((hops(line) == 1).all() for line in lines)


@pytest.mark.tpu_aot
@needs_libtpu
def test_slices_are_joined_by_dcn_alone():
    layout = make_layout(MeshPlan(dcn=2, fsdp=4, tensor=4), topology("v5e:4x4:2"))
    found = [{device.slice_index for device in part.flat} for part in layout.mesh.devices]
    assert found == [{0}, {1}]
    with pytest.raises(ConfigError, match=r"mesh\.dcn: got 1 on 2 slices, expected 2"):
        make_layout(MeshPlan(fsdp=32), topology("v5e:4x4:2"))
