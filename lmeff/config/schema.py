"""The config tree: frozen dataclasses, small and owned by the room that uses them; off is `None`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmeff.compress.activations import Activations
from lmeff.compress.config import Prune, Quantize
from lmeff.compress.shrink import ShrinkConfig
from lmeff.core.errors import ConfigError
from lmeff.data.config import DataConfig
from lmeff.distill.objectives import Distill
from lmeff.models.config import ModelConfig
from lmeff.parallel.mesh import MeshPlan
from lmeff.train.loop import TrainConfig
from lmeff.train.optim import OptimConfig
from lmeff.train.sinks import LogConfig

Transform = Prune | Quantize


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a recipe: it takes earlier artifacts and makes one, under its own name.

    A stage that sets neither `shrink` nor `compress` goes on with the transforms of its `start` and their state. Otherwise it begins from
    the weights as its start's forward pass sees them.

    Attributes:
        name: the artifact's name: letters, digits, - and _.
        start: the earlier artifact to begin from; None begins from random weights, or from `load`.
        load: a folder with a model to begin from: one that `lmeff import` made, or one of Hugging Face. Its shape comes from there.
        model: the shape of a random start; None takes the experiment's. Beside `load` the shape that the folder must have: where the folder is absent,
            `lmeff plan` goes by it.
        shrink: structured pruning before training: a physically smaller model.
        compress: transforms of the weights in training, in order; quantization last.
        activations: formats of the activations at named sites.
        distill: an earlier artifact as teacher, and how.
        optim: this stage's optimizer; None takes the experiment's.
        steps: training steps; None takes train.steps, 0 does not train.
        export: whether the artifact is packed: integer codes instead of fake-quantized weights.
    """

    name: str
    start: str | None = None
    load: str | None = None
    model: ModelConfig | None = None
    shrink: ShrinkConfig | None = None
    compress: tuple[Transform, ...] = ()
    activations: Activations | None = None
    distill: Distill | None = None
    optim: OptimConfig | None = None
    steps: int | None = None
    export: bool = False

    @property
    def continues(self) -> bool:
        """Whether the stage goes on with its start's own transforms and their state."""
        return self.start is not None and self.shrink is None and not self.compress

    @property
    def parents(self) -> tuple[str, ...]:
        """The earlier artifacts this stage reads."""
        teacher = self.distill.teacher if self.distill is not None else None
        return tuple(name for name in (self.start, teacher) if name is not None)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How artifacts are measured.

    Attributes:
        batch: rows of a batch.
        batches: cap on the held-out batches; None takes all of the test split.
        repeats: timed passes of each artifact, all artifacts in turn.
        samples: resamples of the bootstrap over documents.
    """

    batch: int = 16
    batches: int | None = None
    repeats: int = 5
    samples: int = 2000

    def __post_init__(self) -> None:
        """Refuses counts below their least sensible value."""
        for name in ("batch", "batches", "repeats", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluate.{name}: got {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a recipe sets out to show; the report says whether it held.

    The claim is `loss(artifact) <= (1 + within) * loss(of)`, both in nats/token on the same held-out documents.

    Attributes:
        artifact: the artifact the claim is about.
        of: the artifact it is compared with.
        within: the relative rise of the loss that is allowed; 0 asks it to be no worse.
        bytes_at_most: also, stored bytes of its quantized leaves are at most this fraction of their float32 bytes.
    """

    artifact: str
    of: str
    within: float = 0.0
    bytes_at_most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that determines a run.

    Attributes:
        name: the run's name; it lives in `runs`/`name`.
        runs: the folder of all runs.
        seed: of weights and of the order of the data.
        precision: dtypes by role, such as "params=float32,compute=bfloat16,output=float32,state=float32".
        recipe: the stages, in order.
        claims: what the report should check.
    """

    name: str
    runs: str = "runs"
    seed: int = 0
    precision: str = "params=float32,compute=float32,output=float32,state=float32"
    model: ModelConfig = ModelConfig()  # noqa: RUF009 -- frozen
    data: DataConfig = DataConfig()  # noqa: RUF009
    mesh: MeshPlan = MeshPlan()  # noqa: RUF009
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()  # noqa: RUF009
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()  # noqa: RUF009
    recipe: tuple[Stage, ...] = (Stage(name="model"),)
    claims: tuple[Claim, ...] = ()

    @property
    def run_dir(self) -> str:
        """Where the run lives."""
        return f"{self.runs}/{self.name}"

    def steps(self, stage: Stage) -> int:
        """Training steps of a stage."""
        return self.train.steps if stage.steps is None else stage.steps

    def stage(self, name: str) -> Stage:
        """The stage of that name; raises `ConfigError` where there is none."""
        for stage in self.recipe:
            if stage.name == name:
                return stage
        raise ConfigError(f"stage: got '{name}', expected one of {[stage.name for stage in self.recipe]}")


def flat_values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted path, value)` of every setting; stages by name (`recipe.teacher.steps`), other members of tuples by position."""
    for field in dataclasses.fields(config):
        yield from _flat(getattr(config, field.name), f"{prefix}{field.name}")


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        yield from flat_values(value, f"{path}.")
    elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(member) for member in value):
        for position, member in enumerate(value):
            yield from _flat(member, f"{path}.{member.name if isinstance(member, Stage) else position}")
    else:
        yield path, value
