"""A job whose plans are few enough to look at all, and what is varied of it."""

from lmeff.models.config import preset
from lmeff.parallel.mesh import MeshPlan
from lmeff.plan.job import Job, Shape
from lmeff.plan.space import Pipelined, Space

PRECISION = "params=float32,compute=bfloat16,output=bfloat16"
FEW = Space(
    pipelines=(Pipelined(), Pipelined("zb-h1", None, "residuals")), remat=("none", "full"), sequence=("gather",)
)
SHORT = preset("125m", layers=4)


def job(cfg=SHORT, **changes):
    given = {"mesh": MeshPlan(), "devices": 8, "rows": 32, "tokens": 1024, "remat": "full", "precision": PRECISION}
    return Job(name="pretrain", student=Shape(cfg=cfg), **(given | changes))
