"""Metrics where others look at them: TensorBoard, Weights & Biases, trackio. All are fed from the lines of metrics.jsonl, which stays the source of truth.

Each stage is one run there. What a sink holds on this machine is written anew from the lines whenever it is opened, so that a resumed run has each step
once, whatever was lost in a buffer or logged beyond the last checkpoint. Weights & Biases online goes on with the same run instead, after its last step.
"""

import contextlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from lmeff.core.errors import ConfigError
from lmeff.core.extras import require
from lmeff.core.files import write_text

Name = Literal["tensorboard", "wandb", "trackio"]
Values = Mapping[str, Any]
FINISH = 30.0  # seconds that the end of a stage waits for an upload; what is left stays on disk


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl. No keys here: `wandb login` keeps its own.

    Attributes:
        sinks: tensorboard, wandb, trackio: any of them, each of the extra of its name.
        project: of wandb and trackio.
        group: of wandb and trackio; None takes the run's name, so that its stages lie together.
        offline: wandb writes to the run's folder alone, for `wandb sync` later; WANDB_MODE=offline does the same.
    """

    sinks: tuple[Name, ...] = ()
    project: str = "lmeff"
    group: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        """Refuses sinks that there are none of."""
        for name in self.sinks:
            if name not in get_args(Name):
                raise ConfigError(f"log.sinks: got '{name}', expected any of {', '.join(get_args(Name))}")
        if len(set(self.sinks)) < len(self.sinks):
            raise ConfigError(f"log.sinks: got {', '.join(self.sinks)}, expected each once")


class Place(NamedTuple):
    """One stage of one run.

    directory: of the run. run, stage: their names.
    config:    the run's settings by dotted path.
    """

    directory: Path
    run: str
    stage: str
    config: Values

    @property
    def identity(self) -> str:
        """A name that no other run has, wherever its folder moves."""
        return f"{self.run}-{self.stage}-{token(self.directory)}"


class Sink(Protocol):
    """Where rows go.

    first: the first step that it does not hold yet.
    """

    first: int

    def write(self, step: int, values: Values) -> None:
        """The numbers of a step, and "time", in seconds since 1970."""
        ...

    def summary(self, values: Mapping[str, float]) -> None:
        """What came out in the end."""
        ...

    def close(self) -> None:
        """Writes what is left; nothing is written after."""
        ...


def token(directory: Path) -> str:
    """The random name of a run, kept in its folder: what was deleted and begun anew is another run."""
    file = directory / "log.id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:8] + "\n")
    return file.read_text(encoding="utf-8").strip()


class TensorBoard:
    """Event files under `tensorboard/STAGE` of the run: `tensorboard --logdir RUN/tensorboard`. Written at once, in this thread, so that errors are seen."""

    first = 0

    def __init__(self, config: LogConfig, place: Place) -> None:
        """Begins a file; of older ones none is left, and a TensorBoard that is open starts anew."""
        self._events = require("tensorboardX.proto.event_pb2", extra="tensorboard")
        self._summaries = require("tensorboardX.summary", extra="tensorboard")
        self._config, self._last = place.config, 0
        folder = place.directory / "tensorboard" / place.stage
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer = require("tensorboardX.event_file_writer", extra="tensorboard")
        self._writer = writer.EventsWriter(str(folder / "events"))
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._writer.write_event(self._events.Event(step=0, session_log=start))

    def write(self, step: int, values: Values) -> None:
        """One scalar for each number."""
        for name, value in values.items():
            if name != "time":
                self._add(self._summaries.scalar(name, value), step, values["time"])
        self._last = step
        self._writer.flush()

    def summary(self, values: Mapping[str, float]) -> None:
        """The settings and the results as a row of the page HPARAMS."""
        settings = {
            name: value if isinstance(value, bool | int | float) else str(value) for name, value in self._config.items()
        }
        for summary in self._summaries.hparams(settings, dict(values)):
            self._add(summary, self._last)
        for name, value in values.items():
            self._add(self._summaries.scalar(name, value), self._last)
        self._writer.flush()

    def _add(self, summary: Any, step: int, time: float | None = None) -> None:
        self._writer.write_event(self._events.Event(step=step, summary=summary, wall_time=time))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """One run of Weights & Biases; its files are under `wandb` of the run."""

    def __init__(self, config: LogConfig, place: Place) -> None:
        """Online it goes on with the run of this stage; offline it is written anew, in the place of what an earlier attempt left."""
        wandb = _wandb()
        mode = _mode(config)
        offline = mode != "online"
        if offline:
            for old in (place.directory / "wandb").glob(f"offline-run-*-{place.identity}"):
                shutil.rmtree(old)
        self._run = wandb.init(
            project=config.project,
            group=config.group or place.run,
            name=f"{place.run}/{place.stage}",
            id=place.identity,
            resume=None if offline else "allow",
            mode=mode,
            dir=str(place.directory),
            config=dict(place.config),
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH, finish_timeout_raises=True),
        )
        self.first = 0 if offline else self._run.step

    def write(self, step: int, values: Values) -> None:
        """Sent in the background, with the time when the step was taken."""
        own = {"_timestamp" if name == "time" else name: value for name, value in values.items()}
        self._run.log(own, step=step)

    def summary(self, values: Mapping[str, float]) -> None:
        """To the run's summary."""
        self._run.summary.update(dict(values))

    def close(self) -> None:
        """Waits for the upload, but not for long."""
        self._run.finish()


class Trackio:
    """One run of trackio, in its local store: `trackio show`."""

    first = 0

    def __init__(self, config: LogConfig, place: Place) -> None:
        """Written anew, in the place of what an earlier attempt left."""
        self._trackio = trackio = require("trackio", extra="trackio")
        self._last = 0
        with _silent():
            with contextlib.suppress(ValueError):  # there is no such project yet
                for run in trackio.Api().runs(config.project):
                    if run.name == place.identity:
                        run.delete()
            self._run = trackio.init(
                project=config.project,
                name=place.identity,
                group=config.group or place.run,
                config=dict(place.config),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def write(self, step: int, values: Values) -> None:
        """Written in the background; its own time of each row is when it came."""
        self._last = step
        self._run.log({name: value for name, value in values.items() if name != "time"}, step=step)

    def summary(self, values: Mapping[str, float]) -> None:
        """More numbers of the last step: trackio has no summary."""
        self._run.log(dict(values), step=self._last)

    def close(self) -> None:
        """Waits until all is written."""
        with _silent():
            self._trackio.finish()


class Sinks:
    """Every row to every sink. A sink that fails is told of and dropped: a run does not end because a disk or a network does not answer."""

    def __init__(self, config: LogConfig, place: Place, rows: Iterable[Values], tell: Callable[[str], None]) -> None:
        """Opens the sinks of `config` and brings them up to date. rows: all lines of metrics.jsonl so far. tell: a line for the user."""
        self._run, self._tell, self._open = place.directory, tell, dict[str, Sink]()
        self.failed: list[str] = []
        for name in config.sinks:
            with self._dropped(name):
                self._open[name] = SINKS[name](config, place)
        for row in rows:
            self.write(row)

    def write(self, row: Values) -> None:
        """A line of metrics.jsonl; null, which is no finite number, is left out."""
        step, values = row["step"], {name: x for name, x in row.items() if name != "step" and x is not None}
        for name, sink in [*self._open.items()]:
            if step >= sink.first:
                with self._dropped(name):
                    sink.write(step, values)

    def summary(self, values: Mapping[str, float]) -> None:
        """What came out in the end."""
        for name, sink in [*self._open.items()]:
            with self._dropped(name):
                sink.summary(values)

    def close(self) -> None:
        """Closes all."""
        for name, sink in [*self._open.items()]:
            with self._dropped(name):
                sink.close()
        self._open.clear()

    @contextlib.contextmanager
    def _dropped(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self.failed.append(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._tell(
                f"{name} is dropped ({reason}); metrics.jsonl goes on, and `lmeff log {self._run} --sinks {name}` replays it"
            )


def check(config: LogConfig) -> None:
    """Refuses, before hours of training, sinks whose package is not there or that nobody is logged in to."""
    for name in config.sinks:
        require(PACKAGES[name], extra=name)
    if "wandb" in config.sinks and _mode(config) == "online" and not _wandb().login(prompt=False, verify=False):
        raise ConfigError(
            "log.sinks: wandb has no API key here, expected one, or a run that is not uploaded. Run `wandb login`, or set --log.offline."
        )
    remote = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
    if "trackio" in config.sinks and remote:
        raise ConfigError(
            f"log.sinks: trackio with {' and '.join(remote)} set, expected its local store, whose steps can be written anew when a run goes on. "
            "Unset it, and upload afterwards with `trackio sync`."
        )


def _wandb() -> Any:
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # else it reports its own errors over the network, offline too
    return require("wandb", extra="wandb")


def _mode(config: LogConfig) -> str:
    """Of wandb: offline where the config says so, else what WANDB_MODE and its own settings say."""
    return "offline" if config.offline else _wandb().setup().settings.mode


def _silent() -> contextlib.AbstractContextManager[Any]:
    """What trackio prints on stdout, which may be for one JSON object alone."""
    return contextlib.redirect_stdout(io.StringIO())


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
SINKS: dict[str, Callable[[LogConfig, Place], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
