"""Where tensors live: a `MeshPlan` maps letters to mesh axes, and a `Layout` applies it.

The model says only letters (`ops.place(x, "BTD")`). Here they become shardings: B over data and fsdp, heads, ffn and vocabulary over tensor (Shoeybi et al.
2019, https://arxiv.org/abs/1909.08053), D of the weights over fsdp (ZeRO-3: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054), and T over tensor where
no head or neuron uses it: norms and residuals are then sequence-parallel (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198).

This module alone knows axis types. Meshes are in Auto mode: constraints fix the layout, XLA inserts the collectives, and what must not be
left to it (attention, vocabulary-parallel embedding and loss, accumulated gradients) runs inside `jax.shard_map`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeff.core.batch import Batch
from lmeff.core.errors import ConfigError
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten, owner

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Which axes a letter is cut over, in order of precedence: an axis is used once a tensor, by the first letter here that wants it.
LETTER_AXES: dict[str, tuple[str, ...]] = {
    "B": BATCH_AXES,
    "H": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
    "D": ("fsdp",),
    "T": ("tensor",),
}
WHOLE = "_"  # in place of a letter: this dim is not cut


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """Degrees of parallelism. `data=None` takes the devices that the other axes leave."""

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1

    def degrees(self, devices: int) -> dict[str, int]:
        """The size of each axis on so many devices; raises `ConfigError` where the product does not fit."""
        fixed = {"fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in {**fixed, "data": self.data}.items():
            if size is not None and size < 1:
                raise ConfigError(f"mesh.{axis}: got {size}, expected at least 1")
        inner = math.prod(fixed.values())
        data = self.data if self.data is not None else devices // inner
        if data * inner != devices or data < 1:
            wanted = f"data {'*' if self.data is None else self.data} x fsdp {self.fsdp} x tensor {self.tensor}"
            raise ConfigError(
                f"mesh: got {wanted} on {devices} devices, expected a product of {devices}; "
                f"change the degrees or run with --devices {inner * (self.data or 1)}"
            )
        return {"data": data, **fixed}


def indivisible(specs: Tree, degrees: dict[str, int]) -> list[str]:
    """What a plan cannot cut evenly, one line for each letter: `["heads (H = 4) over tensor = 8"]`."""
    problems: dict[str, str] = {}
    for spec in flatten(specs).values():
        for letter, size in zip(spec.letters, spec.shape, strict=True):
            for axis in LETTER_AXES.get(letter, ()):
                if size % degrees[axis]:
                    problems[letter] = f"{letter} = {size} over {axis} = {degrees[axis]}"
    return list(problems.values())


@dataclass(frozen=True)
class Layout:
    """A mesh and how letters lie on it. One device is the same code with every constraint the identity."""

    mesh: Mesh
    reserved: tuple[str, ...] = ()

    def reserve(self, axes: tuple[str, ...]) -> "Layout":
        """The layout as seen inside a `vmap` whose mapped dim is cut over `axes`: they are taken."""
        return dataclasses.replace(self, reserved=axes)

    def size(self, axes: Sequence[str]) -> int:
        """The number of devices along these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def single(self) -> bool:
        """Whether there is nothing to place."""
        return self.mesh.size == 1

    def layers_at_once(self, remat: str) -> int:
        """How many layers a scan should run in one turn of its loop: one, or on a single CPU device up to eight.

        A turn's end copies all that the backward pass needs into a stack: a sixth of a CPU's step. Rematerialisation relies on the loop to keep
        XLA from merging it away, and on several devices the loop keeps programs small and their collectives once a layer.
        """
        alone = self.single and self.mesh.devices.flat[0].platform == "cpu"
        return 8 if alone and remat == "none" else 1

    def partition(self, letters: str, shape: Sequence[int] | None = None) -> P:
        """The partition of a tensor by its letters. With a shape, dims that do not divide stay whole."""
        free = {axis for axis, size in self.mesh.shape.items() if size > 1} - set(self.reserved)
        taken: dict[int, tuple[str, ...]] = {}
        order = list(LETTER_AXES)
        wanted = [i for i in range(len(letters)) if letters[i] in LETTER_AXES]
        for i in sorted(wanted, key=lambda i: order.index(letters[i])):
            axes = tuple(axis for axis in LETTER_AXES[letters[i]] if axis in free)
            if axes and (shape is None or shape[i] % math.prod(self.mesh.shape[a] for a in axes) == 0):
                taken[i] = axes
                free -= set(axes)
        return P(*(taken.get(i) for i in range(len(letters))))

    def sharding(self, letters: str, shape: Sequence[int] | None = None) -> NamedSharding:
        """The same as a `NamedSharding`, for arguments and results of a jitted function."""
        return NamedSharding(self.mesh, self.partition(letters, shape))

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds the whole."""
        return NamedSharding(self.mesh, P())

    def place(self, x: jax.Array, letters: str) -> jax.Array:
        """Fixes the sharding of an activation inside a jitted function."""
        if self.single:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(letters, x.shape))

    def on_shards(self, fn: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> Callable[..., Any]:
        """Runs `fn` on each device's shards: purely local code, or code that names its collectives.

        `inputs` are letters; `outputs` letters or a pytree of them. A sum inside `fn` that is to be differentiated must be right both with and
        without JAX's checks of what varies over the mesh: under `vmap` (reserved axes) they are off, because they do not know mapped axes.
        """
        names = {axis for axis, size in self.mesh.shape.items() if size > 1}
        if not names:
            return fn
        return jax.shard_map(
            fn,
            mesh=self.mesh,
            in_specs=jax.tree.map(self.partition, tuple(inputs)),
            out_specs=jax.tree.map(self.partition, outputs),
            axis_names=names,
            check_vma=not self.reserved,
        )

    def axes(self, letter: str) -> tuple[str, ...]:
        """The axes a letter is cut over here: those wider than 1 and not reserved."""
        return tuple(a for a in LETTER_AXES[letter] if self.mesh.shape[a] > 1 and a not in self.reserved)


def make_layout(plan: MeshPlan, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of a plan on these devices (default: all)."""
    devices = list(devices if devices is not None else jax.devices())
    degrees = plan.degrees(len(devices))
    mesh = jax.make_mesh(
        tuple(degrees[axis] for axis in AXES), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES)
    )
    return Layout(mesh)


def place_batch(batch: Batch, layout: Layout, total: int | None = None) -> Batch:
    """A host batch on the mesh: rows over the batch axes, tokens whole.

    total: where `batch` holds only `own_rows(layout, total)` of a global batch of so many rows; None where it holds all of them.
    """
    if not layout.mesh.is_multi_process:
        return jax.device_put(batch, jax.tree.map(lambda x: layout.sharding("B_", x.shape), batch))

    rows = np.arange(len(batch.tokens)) if total is None else own_rows(layout, total)

    def placed(x: np.ndarray) -> jax.Array:
        shape = (total or len(x), *x.shape[1:])

        def shard(at: Any) -> np.ndarray:
            return x[np.isin(rows, np.arange(shape[0])[at[0]])]

        return jax.make_array_from_callback(shape, layout.sharding("B_", shape), shard)

    return jax.tree.map(placed, batch)


def own_rows(layout: Layout, total: int, devices: Sequence[Any] | None = None) -> np.ndarray:
    """The rows of a global batch of `total` that these devices hold (default: those of this process), ascending.

    Processes share rows where an axis that does not cut them goes across processes.
    """
    here = set(layout.mesh.local_devices if devices is None else devices)
    held = layout.sharding("B_", (total, 1)).devices_indices_map((total, 1))
    return np.unique(np.concatenate([np.arange(total)[at[0]] for device, at in held.items() if device in here]))


def parameter_shardings(specs: Tree, layout: Layout) -> dict[str, NamedSharding]:
    """`{path: sharding}` of every parameter."""
    return {path: layout.sharding(spec.letters, spec.shape) for path, spec in flatten(specs).items()}


def shardings(tree: Any, specs: Tree, layout: Layout) -> Any:
    """Shardings for any state that mirrors the parameters: moments, masks, scales, packed leaves, averages.

    A leaf below the dict keys of a parameter is laid out by that parameter's letters, in the dims where it has the parameter's size;
    everything else (counters, loss scales) is replicated.
    """
    flat: dict[str, ParamSpec] = flatten(specs)

    def leaf(path: Any, x: Any) -> NamedSharding:
        spec = flat.get(owner(path, flat) or "")
        if spec is None or len(x.shape) != len(spec.letters):
            return layout.replicated
        letters = "".join(
            letter if size == own else WHOLE
            for letter, size, own in zip(spec.letters, x.shape, spec.shape, strict=True)
        )
        return layout.sharding(letters, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)
