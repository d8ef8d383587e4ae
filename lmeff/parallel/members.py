"""The models of a train step as the formulas see them: their parameters on a layout, and what their layers' backward pass computes again."""

import functools
import math
from typing import NamedTuple

from lmeff.core.specs import ParamSpec
from lmeff.core.tree import flatten
from lmeff.models.config import ModelConfig
from lmeff.models.remat import parse
from lmeff.models.transformer import param_specs, sites
from lmeff.parallel.mesh import ZERO_AXIS, Layout, names

EMBEDDING, POSITIONS = "embed/table", "embed/positions"
PIPE = "pipe"


class Leaf(NamedTuple):
    """A parameter: elements that a device has when it is whole over fsdp, of all layers it holds; the axes that cut it; the layers."""

    path: str
    elements: float
    axes: tuple[str, ...]
    layers: int
    spec: ParamSpec

    def part(self, parts: int) -> float:
        """Elements that a device has where fsdp cuts it into so many parts."""
        return self.elements / (parts if ZERO_AXIS in self.axes else 1)

    @property
    def is_matmul(self) -> bool:
        """Whether an einsum contracts it."""
        return self.spec.is_matmul

    @property
    def in_block(self) -> bool:
        """Whether it belongs to the layers."""
        return self.path.startswith("blocks/")

    @property
    def routed(self) -> bool:
        """Whether the layer of experts itself moves it, as code for one device's shards (`parallel.experts`)."""
        return self.path.startswith("blocks/moe/") and "/shared/" not in self.path

    @property
    def is_router(self) -> bool:
        """Whether it stays in the dtype of the parameters."""
        return self.path.endswith("/router")


class Again(NamedTuple):
    """What a layer's backward pass does again of the collectives of its forward pass: over tensor gathers, and sums of the products with these output
    matrices; whether it goes through attention, and through anything at all."""

    gathers: int = 0
    outputs: tuple[str, ...] = ()
    attention: bool = False
    any: bool = False

    @property
    def reductions(self) -> int:
        """The sums."""
        return len(self.outputs)


class Member(NamedTuple):
    """A model that runs in a step.

    forward:  how often a device runs a layer forward in a step, but for what rematerialisation runs again.
    backward: how often it runs one backward; 0 for a teacher.
    slice:    the layers in one turn of a pipeline's op, or all.
    """

    cfg: ModelConfig
    leaves: tuple[Leaf, ...]
    forward: float
    backward: float
    slice: int
    again: Again = Again()

    @property
    def trained(self) -> bool:
        """Whether it has gradients."""
        return self.backward > 0

    def is_head(self, leaf: Leaf) -> bool:
        """Whether the loss multiplies with it."""
        return leaf.path == (EMBEDDING if self.cfg.tied else "head/w")


def again_of(remat: str, cfg: ModelConfig) -> Again:
    """What a policy computes again: what enters a sublayer is never kept, but where it is the stream itself, which without a norm before attention is the
    block's input; the attention's output matrix multiplies again unless its product is kept, and the ffn's where a norm comes after it.
    """
    policy = parse(remat, sites(cfg))
    if policy.kind == "none":
        return Again()
    kept, normalized = set(policy.names), cfg.norm_at != "pre" and cfg.moe is None
    matrices = {"wo": "attn.o", "down": "mlp.down"} if normalized else {"wo": "attn.o"}
    outputs = tuple(matrix for matrix, site in matrices.items() if not kept & {"product", site})
    return Again(1 if cfg.norm_at == "post" else 2, outputs, "attn_out" not in kept, True)


@functools.lru_cache(maxsize=64)
def specs_of(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """`{path: spec}` of its parameters."""
    return flatten(param_specs(cfg))


@functools.lru_cache(maxsize=1024)
def leaves_of(cfg: ModelConfig, layout: Layout) -> tuple[Leaf, ...]:
    """The parameters of a model on a layout."""
    found = []
    for path, spec in specs_of(cfg).items():
        axes = tuple(axis for entry in layout.partition(spec.letters, spec.shape) for axis in names(entry))
        size = math.prod(spec.shape) / layout.size([axis for axis in axes if axis != ZERO_AXIS])
        stages = layout.mesh.shape[PIPE] if PIPE in axes else 1
        found.append(Leaf(path, size, axes, spec.shape[0] // stages if spec.stacked else 1, spec))
    return tuple(found)
