"""What is static of a run: models, objective, optimizer, layout; and the arrays that a step reads and never changes."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax

from lmeff.compress.base import Compression
from lmeff.core.batch import Batch
from lmeff.core.ops import FLOATING, Numerics, Ranges
from lmeff.core.precision import Policy
from lmeff.core.tree import Tree
from lmeff.distill.objectives import Objective
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import Output, View, forward, identity_view
from lmeff.parallel.layers import layer_scan
from lmeff.parallel.mesh import Layout, partitions
from lmeff.parallel.region import EXACT, Reducer, Region
from lmeff.parallel.seam import gathering_einsum, layout_ops
from lmeff.parallel.tiles import pinned
from lmeff.train.local_updates import LocalUpdates

Metrics = dict[str, jax.Array]


class Model(NamedTuple):
    """A model as a step sees it: its shape, its numerics, and how its weights are viewed."""

    cfg: ModelConfig
    numerics: Numerics = FLOATING
    view: View = identity_view

    def run(
        self, layout: Layout, params: Any, state: Any, batch: Batch, ranges: Ranges | None, policy: Policy, remat: str
    ) -> Output:
        """Runs `forward` on a layout under the precision policy."""
        return forward(
            params,
            batch,
            self.cfg,
            make_ops=layout_ops(layout, self.numerics, gathering_einsum(layout, remat)),
            view=self.view,
            view_state=state,
            ranges=ranges,
            remat=remat,
            unroll=layout.layers_at_once(remat),
            scan=layer_scan(layout),
            enter=functools.partial(pinned, layout),
            compute_dtype=policy.compute,
            output_dtype=policy.output,
        )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Everything static of a run, built once from the config and closed over by the step.

    steps: the last step of the run, after which workers with updates of their own (`local`) are brought together.
    """

    student: Model
    teacher: Model | None
    specs: Tree
    compression: Compression
    objective: Objective
    tx: optax.GradientTransformationExtraArgs
    layout: Layout
    policy: Policy
    accumulate: int = 1
    remat: str = "none"
    ema: float | None = None
    offload: bool = False
    reducer: Reducer = EXACT
    local: LocalUpdates | None = None
    steps: int = 0

    def region(self, trainable: Any) -> Region:
        """Where gradients are summed, if it is not left to XLA."""
        axes = self.layout.axes("BL")
        return Region(self.layout.within(axes), axes, partitions(trainable, self.specs, self.layout))


class Frozen(NamedTuple):
    """Arrays a step reads and never changes.

    teacher:        the teacher's parameters (arrays or packed leaves), or None.
    teacher_ranges: its calibrated activation ranges, or None; `ranges` are the student's.
    """

    teacher: Any = None
    teacher_ranges: Any = None
    ranges: Any = None
