"""Devices to lay a mesh on: those of this machine, real or simulated on its CPU, and TPUs that are not here.

libtpu compiles for any TPU topology on a machine without TPUs, so memory and collectives of a pod's program are known before a pod is rented:
`make_layout(plan, topology("v5e:4x4"))`. Such devices compile and hold nothing.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

from lmeff.core.errors import ConfigError
from lmeff.core.extras import require

DCN = "dcn"  # the mesh axis that runs over slices

# libtpu would ask the cloud what machine this is, complain of what it does not learn, and refuse to be loaded where another process has it.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


class Family(NamedTuple):
    """A TPU generation: dims of its torus, devices a chip, and what libtpu must be told besides the name."""

    dims: int
    cores: int = 1
    options: Mapping[str, Any] = {}


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; a v4 chip is one device only in its megacore form.
FAMILIES: dict[str, Family] = {
    "v4": Family(3, options={"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}),
    "v5e": Family(2),
    "v5p": Family(3),
    "v6e": Family(2),
    "tpu7x": Family(3, cores=2),
}


class Topology(NamedTuple):
    """What a name such as "v5e:4x4:2" says: family, shape of a slice in chips, slices."""

    family: str
    shape: str
    slices: int = 1

    @property
    def chips(self) -> int:
        """How many chips a slice has."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def devices(self) -> int:
        """How many devices it has."""
        return self.chips * FAMILIES[self.family].cores * self.slices


def parse_topology(name: str) -> Topology:
    """`FAMILY:SHAPE[:SLICES]`, such as "v5p:4x4x4" or "v5e:16x16:2"; raises `ConfigError` for what is no such name. Needs no libtpu."""
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?::([1-9]\d*))?", name)
    family, shape, slices = match.groups() if match else ("", "", None)
    known = FAMILIES.get(family)
    if known is None or shape.count("x") != known.dims - 1:
        raise ConfigError(
            f"topology: got '{name}', expected FAMILY:SHAPE[:SLICES] with a family of {', '.join(FAMILIES)} and the shape of a slice in chips, "
            "two numbers for v5e and v6e and three for the others: v5e:4x4, v5p:4x4x4, v5e:16x16:2 (two slices)"
        )
    return Topology(family, shape, int(slices or 1))


def topology(name: str) -> list[Any]:
    """The devices of a TPU topology, to compile for; nothing runs on them.

    Raises `ConfigError` for a name that libtpu does not know, `MissingExtra` where libtpu is not installed.
    """
    wanted = parse_topology(name)
    require("libtpu", extra="tpu")
    if jax.default_backend() != "tpu":  # a machine with TPUs has told libtpu already
        for variable, value in LIBTPU_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    options = dict(FAMILIES[wanted.family].options)
    if wanted.slices > 1:
        options["num_slices"] = wanted.slices
    if wanted.chips == 1:  # a host of one chip; by default those of four are asked for
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(f"{wanted.family}:{wanted.shape}", "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"topology: got '{name}', expected a shape that this family is built in (multiples of 2, such as 4x4 or 4x4x4); libtpu says: {reason}"
        ) from error
    return list(found.devices)


def slices(devices: Sequence[Any]) -> int:
    """How many TPU slices these devices belong to; 1 for devices of other kinds."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def arrange(devices: Sequence[Any], degrees: Mapping[str, int]) -> np.ndarray:
    """Devices as an array with a dim for each axis of `degrees`, outermost first: inner axes join nearest neighbours of the torus.

    Several slices are joined by the axis "dcn" alone, which must have their number; raises `ConfigError` where it does not.
    """
    sizes, count = tuple(degrees.values()), slices(devices)
    try:
        if count == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        if degrees[DCN] != count:
            raise ConfigError(
                f"mesh.dcn: got {degrees[DCN]} on {count} slices, expected {count}: only this axis may run over the network between slices"
            )
        inner = tuple(1 if axis == DCN else size for axis, size in degrees.items())
        outer = tuple(size if axis == DCN else 1 for axis, size in degrees.items())
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"mesh: {' x '.join(f'{axis} {n}' for axis, n in degrees.items() if n > 1)} cannot be laid on these {len(devices)} "
            f"{devices[0].device_kind} devices, expected whole slices and degrees that factor their sides; {error}"
        ) from error
