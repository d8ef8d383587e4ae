"""Where every parameter lies, as rows to print: its part on a device, and in how many copies the mesh holds it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from lmeff.core.specs import ParamSpec
from lmeff.core.tree import Tree, flatten
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import LETTER_AXES, ZERO_AXIS, Layout, names

LARGE = 2**20  # bytes on a device from which a copy that nobody asked for is worth a word


class Leaf(NamedTuple):
    """One parameter on a mesh.

    partition: the mesh axes of each dim, such as "-,fsdp,tensor,-".
    bytes:     on each device.
    copies:    how many devices hold the same part.
    unasked:   axes wider than 1 that cut weights under this plan, but not this one: its dims do not divide, or it has no dim for them.
    """

    path: str
    letters: str
    shape: tuple[int, ...]
    partition: str
    bytes: int
    copies: int
    unasked: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """One line where a large leaf lies in copies that the plan does not ask for."""
        if not self.unasked or self.bytes <= LARGE:
            return None
        axes = " and ".join(self.unasked)
        return f"{self.path} ({self.letters} = {'x'.join(map(str, self.shape))}) is not cut over {axes}: {self.bytes / 2**20:.1f} MiB on every device of it"


def leaf_table(specs: Tree, layout: Layout, dtype: Any = jnp.float32) -> list[Leaf]:
    """A row for every parameter stored in `dtype`, in the order of the tree."""
    return [_leaf(path, spec, layout, jnp.dtype(dtype).itemsize) for path, spec in flatten(specs).items()]


def _leaf(path: str, spec: ParamSpec, layout: Layout, item: int) -> Leaf:
    cut = layout.partition(spec.letters, spec.shape)
    axes = [names(dim) for dim in cut]
    used = {axis for dim in axes for axis in dim}
    parts = layout.size(tuple(used))
    return Leaf(
        path=path,
        letters=spec.letters,
        shape=tuple(spec.shape),
        partition=",".join("+".join(dim) or "-" for dim in axes),
        bytes=math.prod(spec.shape) * item // parts,
        copies=layout.mesh.size // parts,
        unasked=tuple(axis for axis in _asked(spec, layout) if axis not in used),
    )


def _asked(spec: ParamSpec, layout: Layout) -> tuple[str, ...]:
    """The axes that this plan cuts such a weight over: those of its letters, and tensor, pipe and, at stage 3 of ZeRO, fsdp for any."""
    wanted = {"tensor", "pipe", ZERO_AXIS} | {axis for letter in spec.letters for axis in LETTER_AXES.get(letter, ())}
    if layout.plan.zero < 3:
        wanted.discard(ZERO_AXIS)
    return tuple(axis for axis in layout.mesh.axis_names if axis in wanted and layout.mesh.shape[axis] > 1)


def print_stages(
    shapes: Mapping[str, ModelConfig], layout: Layout, dtype: Any, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Prints the table of each shape of model once, under the first stage that has it; gives the rows."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for cfg in dict.fromkeys(shapes.values()):
        stage = next(name for name, own in shapes.items() if own == cfg)
        leaves = leaf_table(param_specs(cfg), layout, dtype)
        console.print(f"stage '{stage}'", highlight=False)
        print_leaves(leaves, console)
        rows[stage] = [leaf._asdict() for leaf in leaves]
    return rows


def print_leaves(leaves: list[Leaf], console: Console) -> None:
    """The table, its sum, and the warnings."""
    table = Table("leaf", "letters", "shape", "cut over", "MiB/device", "copies")
    for leaf in leaves:
        shape = "x".join(map(str, leaf.shape))
        table.add_row(leaf.path, leaf.letters, shape, leaf.partition, f"{leaf.bytes / 2**20:,.3f}", str(leaf.copies))
    console.print(table)
    console.print(f"parameters: {sum(leaf.bytes for leaf in leaves) / 2**20:,.1f} MiB on each device", highlight=False)
    warn(leaves, console)


def warn(leaves: list[Leaf], console: Console) -> None:
    """A line for each large leaf in copies that nobody asked for."""
    for leaf in leaves:
        if leaf.warning is not None:
            console.print(f"warning: {leaf.warning}", highlight=False, soft_wrap=True, style="yellow")
