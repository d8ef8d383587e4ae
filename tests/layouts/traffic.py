"""What the collectives of a compiled program move in one run of it, loops counted as often as they turn; and what the formulas say of a trial."""

import math
from collections import Counter

from lmeff.parallel.collective import bits, volumes
from lmeff.parallel.hlo import collectives
from lmeff.parallel.volume import volume
from lmeff.parallel.workload import Step, branch_counts
from tests.layouts.trial import FEATURES, MODELS, ROWS, TEACHER, TOKENS

CHUNK = 8  # of the trial's loss


def received(text, *, within=""):
    """`{(kind, dtype): bytes}` of the results of all collectives on one device; `within` is a part of the path of the operation in the Python program."""
    found = Counter()
    for c in collectives(text):
        if within in c.origin:
            assert not math.isnan(c.times), f"in a loop without end: {c.name}"
            for shape, dtype in zip(c.shapes, c.dtypes, strict=True):
                found[c.kind, dtype] += math.prod(shape) * bits(dtype) // 8 * c.times
    return dict(found)


def step_of(mesh, feature="plain", *, stage=0, rows=ROWS, **knobs):
    """What the formulas are told of a trial."""
    sizes = {"devices": mesh.devices, "rows": rows, "tokens": TOKENS, "chunk": CHUNK}
    teacher = TEACHER if FEATURES[feature].distill else None
    knobs = {"accumulate": mesh.accumulate, "remat": mesh.remat, "stage": stage, "teacher": teacher, **knobs}
    return Step(cfg=MODELS[mesh.model], plan=mesh.plan, **sizes, **knobs)


def compared(text, step):
    """`{(kind, axes): bytes}` that a device of the step's stage sends: of the compiled step, and by the formulas."""
    return volumes(collectives(text, branch_counts(step)), step.degrees), volume(step, scatters=False)
