"""Config: what a config file imports. `from lmeff.config import Experiment, Stage, ...`."""

from lmeff.compress.activations import Activations
from lmeff.compress.config import Prune, Quantize
from lmeff.compress.shrink import ShrinkConfig
from lmeff.config.schema import Claim, EvaluateConfig, Experiment, Stage
from lmeff.data.config import DataConfig
from lmeff.distill.objectives import Distill
from lmeff.models.config import ModelConfig, preset
from lmeff.parallel.compressed import Reduce
from lmeff.parallel.mesh import MeshPlan
from lmeff.train.local_updates import LocalUpdates
from lmeff.train.loop import TrainConfig
from lmeff.train.optim import OptimConfig
from lmeff.train.sinks import LogConfig

__all__ = [
    "Activations",
    "Claim",
    "DataConfig",
    "Distill",
    "EvaluateConfig",
    "Experiment",
    "LocalUpdates",
    "LogConfig",
    "MeshPlan",
    "ModelConfig",
    "OptimConfig",
    "Prune",
    "Quantize",
    "Reduce",
    "ShrinkConfig",
    "Stage",
    "TrainConfig",
    "preset",
]
