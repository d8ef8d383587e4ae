"""Sizes of every plan at once, as columns of numbers: what rough formulas read."""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lmeff.core.specs import ParamSpec, count
from lmeff.core.tree import flatten
from lmeff.models.transformer import param_specs
from lmeff.parallel.mesh import BATCH_AXES
from lmeff.plan.space import Plans, precisions

Column = np.ndarray


class Sizes(NamedTuple):
    """Of a device. own: parameters, whole over fsdp; routed: those of experts among them; outer: of the embedding and head.

    tokens: of a microbatch. layers: that it runs forward in a step, all microbatches. parameters, compute, state: bytes of a number.
    """

    own: Column
    routed: Column
    outer: Column
    tokens: Column
    layers: Column
    parameters: Column
    compute: Column
    state: Column


def sizes(plans: Plans) -> Sizes:
    """Of every plan."""
    c, job = plans.columns, plans.job
    specs = flatten(param_specs(job.cfg)).values()
    experts = _count(spec for spec in specs if spec.is_expert)
    outer = _count(spec for spec in specs if not spec.stacked)
    dense = _count(specs) - experts - outer
    inner = (dense + experts / c["expert"]) / c["pipe"]
    rows = job.rows / (_ways(c, BATCH_AXES) * c["accumulate"])
    policies = [job.changed(precision=text).policy for text in precisions(job, plans.space)]
    widths = {
        role: np.array([jnp.dtype(getattr(policy, role)).itemsize for policy in policies])[c["precision"]]
        for role in ("params", "compute", "state")
    }
    return Sizes(
        own=(inner + outer) / c["tensor"],
        routed=experts / (c["expert"] * c["pipe"] * c["tensor"]),
        outer=outer / c["tensor"],
        tokens=rows * job.tokens / c["context"],
        layers=job.cfg.layers / c["pipe"] * c["accumulate"],
        parameters=widths["params"],
        compute=widths["compute"],
        state=widths["state"],
    )


def _count(specs: Iterable[ParamSpec]) -> float:
    return float(count({str(i): spec for i, spec in enumerate(specs)}))


def _ways(c: dict[str, Column], axes: tuple[str, ...]) -> Column:
    return np.prod([c[axis] for axis in axes], axis=0)


def region(plans: Plans) -> Column:
    """Where gradients are reduced once a step, and weights gathered once."""
    c = plans.columns
    return (c["accumulate"] > 1) | (c["pipe"] > 1) | (plans.job.reduce is not None)


def stashes_inputs(plans: Plans) -> Column:
    """Where a pipeline's stage keeps inputs alone and runs forward again."""
    stash = np.array([pipeline.stash == "input" for pipeline in plans.space.pipelines] + [False])
    return stash[plans.columns["pipeline"]]


def has_schedule(plans: Plans, schedule: str) -> Column:
    """Where a pipeline has this schedule."""
    found = np.array([pipeline.schedule == schedule for pipeline in plans.space.pipelines] + [False])
    return found[plans.columns["pipeline"]]
