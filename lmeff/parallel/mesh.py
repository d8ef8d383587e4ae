"""Where tensors live: a `MeshPlan` maps letters to mesh axes, and a `Layout` applies it.

The model says only letters (`ops.place(x, "BTD")`). Here they become shardings: B over the batch axes, heads, ffn and vocabulary over tensor (Shoeybi et al.
2019, https://arxiv.org/abs/1909.08053), D of the weights over fsdp (ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054), layers over pipe, experts
over expert, and T over context and, where no head or neuron uses it, over tensor: norms and residuals are then sequence-parallel (Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198).

This module alone knows axis types. Meshes are in Auto mode: constraints fix the layout, XLA inserts the collectives, and what must not be
left to it (attention, vocabulary-parallel embedding and loss, accumulated gradients) runs inside `jax.shard_map`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmeff.core.errors import ConfigError
from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten, owner
from lmeff.parallel.devices import arrange
from lmeff.parallel.order import CHUNKS, token_order

AXES = ("dcn", "data", "fsdp", "pipe", "expert", "context", "tensor")  # outermost first
BATCH_AXES = ("dcn", "data", "fsdp", "expert")
ZERO_AXIS = "fsdp"

# Which axes a letter is cut over, in order of precedence: an axis is used once a tensor, by the first letter here that wants it.
LETTER_AXES: dict[str, tuple[str, ...]] = {
    "B": BATCH_AXES,
    "L": ("pipe",),
    "E": ("expert",),
    "H": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
    "D": (ZERO_AXIS,),
    "S": ("context",),
    "T": ("context", "tensor"),
}
WHOLE = "_"  # in place of a letter: this dim is not cut


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """Degrees of parallelism. `data=None` takes the devices that the other axes leave.

    dcn:     slices of a pod, joined by the data-center network; each trains on its own rows.
    data:    replicas of the model, each on its own rows.
    fsdp:    the same, with the model's state cut over them as `zero` says.
    pipe:    pipeline stages, each with its own layers.
    expert:  groups of experts; for all other layers one more axis of rows.
    context: parts of the sequence.
    tensor:  parts of every matrix.
    zero:    what fsdp cuts: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters (Rajbhandari et al. 2020).
    schedule: of the pipeline, by name or as a .csv file, whose microbatches are those of `train.accumulate`.
    chunks:  slices of the model on a stage; None takes the schedule's own number.
    stash:   what a stage keeps of a microbatch for its backward pass: its "input", or all "residuals".
    sequence: how attention works over `context`: "ring" (keys go round), "gather" (keys are gathered) or "ulysses" (heads against tokens).
    """

    dcn: int = 1
    data: int | None = None
    fsdp: int = 1
    pipe: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    zero: int = 3
    schedule: str = "1f1b"
    chunks: int | None = None
    stash: str = "input"
    sequence: str = "ring"

    def __post_init__(self) -> None:
        """Refuses degrees that are none."""
        for axis in AXES:
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ConfigError(f"mesh.{axis}: got {size}, expected at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError(f"mesh.zero: got {self.zero}, expected a stage of ZeRO: 0, 1, 2 or 3")
        if self.sequence not in CHUNKS:
            raise ConfigError(f"mesh.sequence: got '{self.sequence}', expected one of {sorted(CHUNKS)}")
        if self.sequence == "ring" and min(self.pipe, self.context) > 1:
            # XLA's collective permute has no groups of devices. On CPUs it then gives wrong numbers, without a word.
            raise ConfigError(
                f"mesh.sequence: got 'ring' on pipe {self.pipe} x context {self.context}, expected 'gather' or 'ulysses': stages of a pipeline do "
                "different things at a time, and keys can only be sent round where all devices send. Set mesh.sequence."
            )

    @property
    def devices(self) -> int:
        """How many devices the plan asks for; where `data` is free, any multiple will do."""
        return math.prod(getattr(self, axis) or 1 for axis in AXES)

    def degrees(self, devices: int) -> dict[str, int]:
        """The size of each axis on so many devices; raises `ConfigError` where the product does not fit."""
        fixed = {axis: getattr(self, axis) for axis in AXES if axis != "data"}
        inner = math.prod(fixed.values())
        data = self.data if self.data is not None else devices // inner
        if data * inner != devices or data < 1:
            named = {"data": "*" if self.data is None else self.data, **{a: n for a, n in fixed.items() if n > 1}}
            wanted = " x ".join(f"{axis} {size}" for axis, size in named.items())
            raise ConfigError(
                f"mesh: got {wanted} on {devices} devices, expected a product of {devices}; "
                f"change the degrees or run with --devices {inner * (self.data or 1)}"
            )
        return {axis: fixed.get(axis, data) for axis in AXES}


def indivisible(specs: Tree, degrees: dict[str, int]) -> list[str]:
    """What a plan cannot cut evenly, one line for each letter: `["heads (H = 4) over tensor = 8"]`. Layers may be uneven: stages are padded."""
    problems: dict[str, str] = {}
    for spec in flatten(specs).values():
        for letter, size in zip(spec.letters, spec.shape, strict=True):
            for axis in LETTER_AXES.get(letter, ()) if letter != "L" else ():
                if size % degrees[axis]:
                    problems[letter] = f"{letter} = {size} over {axis} = {degrees[axis]}"
    return list(problems.values())


@dataclass(frozen=True)
class Layout:
    """A mesh and how letters lie on it. One device is the same code with every constraint the identity.

    manual: axes of an outer `jax.shard_map`: here every device has its own part already, and letters are not cut over them.
    kind:   of the devices of an abstract mesh, which knows none; None asks the mesh's own.
    """

    mesh: Mesh
    plan: MeshPlan = MeshPlan()
    manual: tuple[str, ...] = ()
    kind: str | None = None

    def within(self, axes: tuple[str, ...]) -> "Layout":
        """The layout as seen inside a `jax.shard_map` over `axes`, which may itself be inside another."""
        return dataclasses.replace(self, manual=(*self.manual, *axes))

    @property
    def of_optimizer(self) -> "Layout":
        """How the optimizer's state lies: as the parameters, but cut over fsdp already at stages 1 and 2 of ZeRO."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, zero=3)) if self.plan.zero else self

    def _letter_axes(self, letter: str) -> tuple[str, ...]:
        """The axes that a letter is cut over: those wider than 1, not manual, and for weights those of the ZeRO stage."""
        if letter == "D" and self.plan.zero < 3:
            return ()
        return tuple(a for a in LETTER_AXES.get(letter, ()) if self.mesh.shape[a] > 1 and a not in self.manual)

    def size(self, axes: Sequence[str]) -> int:
        """The number of devices along these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def single(self) -> bool:
        """Whether there is nothing to place."""
        return self.mesh.size == 1

    @property
    def platform(self) -> str:
        """The kind of the devices: "cpu", "gpu" or "tpu". Of those that are compiled for, which need not be of this machine."""
        return self.kind or self.mesh.devices.flat[0].platform

    def layers_at_once(self, remat: str) -> int:
        """How many layers a scan should run in one turn of its loop: one, or on a single CPU device up to eight.

        A turn's end copies all that the backward pass needs into a stack: a sixth of a CPU's step. Rematerialisation relies on the loop to keep
        XLA from merging it away, and on several devices the loop keeps programs small and their collectives once a layer.
        """
        alone = self.single and self.platform == "cpu"
        return 8 if alone and remat == "none" else 1

    def describe(self, between: str = " x ") -> str:
        """The axes that cut anything: "pipe 2 x fsdp 4"."""
        return between.join(f"{axis} {n}" for axis, n in self.mesh.shape.items() if n > 1) or "one device"

    def partition(self, letters: str, shape: Sequence[int] | None = None) -> P:
        """The partition of a tensor by its letters. With a shape, a dim is cut over as many of its axes as divide it."""
        taken: dict[int, tuple[str, ...]] = {}
        used: set[str] = set()
        order = list(LETTER_AXES)
        wanted = [i for i in range(len(letters)) if letters[i] in LETTER_AXES]
        for i in sorted(wanted, key=lambda i: order.index(letters[i])):
            axes: tuple[str, ...] = ()
            for axis in self._letter_axes(letters[i]):
                if axis not in used and (shape is None or shape[i] % self.size((*axes, axis)) == 0):
                    axes = (*axes, axis)
            if axes:
                taken[i] = axes
                used |= set(axes)
        return P(*(taken.get(i) for i in range(len(letters))))

    def sharding(self, letters: str, shape: Sequence[int] | None = None) -> NamedSharding:
        """The same as a `NamedSharding`, for arguments and results of a jitted function."""
        return NamedSharding(self.mesh, self.partition(letters, shape))

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds the whole."""
        return NamedSharding(self.mesh, P())

    @property
    def _names(self) -> set[str]:
        """The axes that are left to place things on."""
        return {axis for axis, size in self.mesh.shape.items() if size > 1 and axis not in self.manual}

    def place(self, x: jax.Array, letters: str) -> jax.Array:
        """Fixes the sharding of an activation inside a jitted function."""
        if not self._names:
            return x
        partition = self.partition(letters, x.shape)
        return jax.lax.with_sharding_constraint(x, partition if self.manual else NamedSharding(self.mesh, partition))

    def on_shards(
        self, fn: Callable[..., Any], inputs: Sequence[Any], outputs: Any, *, checked: bool = True
    ) -> Callable[..., Any]:
        """Runs `fn` on each device's shards: purely local code, or code that names its collectives.

        `inputs` are letters; `outputs` letters or a pytree of them. A sum inside `fn` that is to be differentiated must be right both with and
        without JAX's checks of what varies over the mesh: inside an outer `jax.shard_map` they are off, and where not `checked`.
        """
        inside, outside = jax.tree.map(self.partition, tuple(inputs)), jax.tree.map(self.partition, outputs)
        return self.on_parts(fn, inside, outside, checked=checked)

    def on_parts(
        self, fn: Callable[..., Any], inputs: Any, outputs: Any, *, checked: bool = True
    ) -> Callable[..., Any]:
        """The same with partitions for letters; axes that are manual already are left out of them."""
        # On TPUs every axis, also those of size 1: a Pallas kernel must not leave any of them to XLA.
        axes = set(self.mesh.axis_names) - set(self.manual) if self.platform == "tpu" else self._names
        if self.single or not axes:
            return fn
        return jax.shard_map(
            fn,
            mesh=None if self.manual else self.mesh,
            in_specs=restrict(inputs, axes),
            out_specs=restrict(outputs, axes),
            axis_names=axes,
            check_vma=checked and not self.manual,
        )

    def after(self, x: jax.Array, earlier: jax.Array) -> jax.Array:
        """`x`, on CPUs not before `earlier`, which lies alike: collective permutes have no names there, and two at a time may take each other's messages."""
        if self.platform != "cpu":
            return x
        # Zeros that XLA cannot know to be zeros; barriers it takes away, and for a single number it would gather all.
        return x + jnp.minimum(jnp.abs(earlier), 0).astype(x.dtype)

    def token_order(self, tokens: int) -> np.ndarray | None:
        """The index in the row of each token as rows lie here; None where that is their own order. Raises `ConfigError` where rows cannot be cut."""
        devices = self.mesh.shape["context"]
        order = token_order(self.plan.sequence, tokens, devices)
        return None if (order == np.arange(tokens)).all() else order

    def in_row_order(self, x_BT: jax.Array) -> jax.Array:
        """A per-token result [B, T, ...] of a placed batch, in the order of the row."""
        order = self.token_order(x_BT.shape[1])
        return x_BT if order is None else x_BT[:, np.argsort(order)]

    def axes(self, letters: str) -> tuple[str, ...]:
        """The axes these letters are cut over here, each once."""
        return tuple(dict.fromkeys(axis for letter in letters for axis in self._letter_axes(letter)))


def names(entry: Any) -> tuple[str, ...]:
    """The axes of one entry of a partition."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def is_cut(x: Any) -> bool:
    """Whether this is a partition: a leaf of a tree of them, though JAX may see a tuple."""
    return isinstance(x, P)


def restrict(cuts: Any, axes: Collection[str]) -> Any:
    """A tree of partitions with just these axes left in them."""
    return jax.tree.map(
        lambda cut: P(*(tuple(a for a in names(entry) if a in axes) or None for entry in cut)),
        cuts,
        is_leaf=is_cut,
    )


def make_layout(plan: MeshPlan, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of a plan on these devices (default: all): real, simulated, or of a topology that is only compiled for."""
    devices = list(devices if devices is not None else jax.devices())
    degrees = plan.degrees(len(devices))
    return Layout(Mesh(arrange(devices, degrees), AXES, axis_types=(AxisType.Auto,) * len(AXES)), plan)


def plan_layout(plan: MeshPlan, devices: int, kind: str | None = None) -> Layout:
    """The layout of a plan on so many devices of a kind ("cpu", "gpu", "tpu") that need not exist: it knows partitions and axes, and places nothing."""
    degrees = plan.degrees(devices)
    mesh: Any = AbstractMesh(tuple(degrees.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Layout(mesh, plan, kind=kind)


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


def partitions(tree: Any, specs: Tree, layout: Layout) -> Any:
    """The same as bare partitions."""
    return jax.tree.map(lambda sharding: sharding.spec, shardings(tree, specs, layout))
