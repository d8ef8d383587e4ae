"""What a run found, as data: the report on disk. `report.json` is strict JSON; a number that is not finite is null there and NaN here."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cattrs

from lmeff.core.decode import explain
from lmeff.core.errors import CheckpointError, DataError
from lmeff.core.files import write_text

FORMAT = "lmeff-report/1"
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class RuleRow:
    """What the rules resolved to for one parameter: `rule` says it in words, such as "int8/g32" or "none"."""

    path: str
    letters: str
    shape: tuple[int, ...]
    rule: str


@dataclass(frozen=True, kw_only=True)
class ArtifactRow:
    """One model at rest, measured.

    kind:               "dense", "pruned", "shrunk", "distilled", "qat", "packed", "composed", ...
    parents:            names of the artifacts it was made from: its start, its teacher.
    loss:               held-out nats per token; `loss_interval` is its bootstrap interval over documents.
    bits_per_byte:      held-out bits per byte of text.
    parameters:         weights of the model; `nonzero_parameters` of them are not zero.
    stored_bytes:       bytes of everything needed to run it; `effective_bits` are these in bits per parameter.
    flops_per_token:    forward pass; see the report's conventions.
    ms_per_token:       median, None where it was not timed; `ms_interval` holds the quartiles.
    train_tokens:       tokens and seconds of its own stage, without those of its parents.
    curve:              `(step, tokens, training loss)`.
    """

    name: str
    kind: str
    loss: float
    loss_interval: Interval
    bits_per_byte: float
    parameters: int
    nonzero_parameters: int
    stored_bytes: int
    effective_bits: float
    flops_per_token: int
    ms_per_token: float | None = None
    ms_interval: Interval | None = None
    parents: tuple[str, ...] = ()
    train_tokens: int = 0
    train_seconds: float = 0.0
    curve: tuple[tuple[float, float, float], ...] = ()
    rules: tuple[RuleRow, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`loss(a) - loss(b)` on the same documents, in nats per token: negative means that `a` is better."""

    a: str
    b: str
    difference: float
    interval: Interval
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim checked against a number: `passed` says whether `measured` met `bound`; `detail` shows the arithmetic."""

    claim: str
    passed: bool
    measured: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a run found.

    created:     ISO 8601.
    baseline:    name of the artifact that ratios refer to; None is the first.
    conventions: what a number means, by topic: "FLOPs", "storage", "timing", "interval".
    environment: versions, devices, cores.
    config:      the resolved config, nested; a leaf is `{"value": ..., "origin": "what set it"}` or a bare value.
    schedule:    of the pipeline, by name; `schedule_table` is its table as CSV. Empty where layers were not pipelined.
    """

    name: str
    created: str
    artifacts: tuple[ArtifactRow, ...]
    comparisons: tuple[Comparison, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    baseline: str | None = None
    conventions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    schedule: str = ""
    schedule_table: str = ""
    held_out_tokens: int = 0
    held_out_documents: int = 0

    def __post_init__(self) -> None:
        """Names are unique, and what refers to an artifact refers to one that is here."""
        names = [row.name for row in self.artifacts]
        if not names:
            raise DataError(f"report '{self.name}': got no artifact, expected at least one; measure one first")
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"report '{self.name}': artifact names must differ, got {doubles} more than once")
        used = {name for c in self.comparisons for name in (c.a, c.b)} | ({self.baseline} if self.baseline else set())
        if unknown := sorted(used - set(names)):
            raise DataError(f"report '{self.name}': {unknown} is compared with, but the artifacts are {names}")

    @property
    def base(self) -> ArtifactRow:
        """The artifact that ratios refer to."""
        return self.row(self.artifacts[0].name if self.baseline is None else self.baseline)

    def row(self, name: str) -> ArtifactRow:
        """The artifact of this name."""
        return next(row for row in self.artifacts if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """The report as strict JSON values."""
        return _strict(dataclasses.asdict(self))

    def write(self, path: Path) -> None:
        """Writes `report.json`, complete or not at all, with a digest of its content."""
        content = self.to_json()
        head = {"format": FORMAT, "digest": _digest(content)}
        write_text(path, json.dumps(head | content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    @staticmethod
    def read(path: Path) -> "Report":
        """Reads `report.json` back; raises `CheckpointError` where it is missing, damaged or of another format."""
        content = _load(path)
        found = content.pop("format", None)
        if found != FORMAT:
            raise _damaged(path, f"got the format {found!r}, expected '{FORMAT}'")
        if content.pop("digest", None) != _digest(content):
            raise _damaged(path, "its content does not match its digest")
        try:
            return _converter().structure(content, Report)
        except cattrs.BaseValidationError as error:
            raise _damaged(path, explain(error, "report")) from error


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(float, lambda value, _: math.nan if value is None else float(value))
    return converter


def config_rows(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """A nested config as `(dotted path, value, origin)`, in its own order."""
    rows = []
    for key, entry in config.items():
        if isinstance(entry, dict) and entry.keys() == {"value", "origin"}:
            rows.append((f"{prefix}{key}", _text(entry["value"]), str(entry["origin"])))
        elif isinstance(entry, dict) and entry:
            rows += config_rows(entry, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _text(entry), ""))
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: there is no report here; expected the report.json of a finished run. Run it first."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); expected the report.json of a run"
        ) from error
    except ValueError as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"got a {type(content).__name__}, expected an object")
    return content


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: this report is damaged or was changed by hand: {what}. The run's artifacts are not touched by this; run it again to measure anew."
    )


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _strict(value.item())
    raise TypeError(f"a report holds JSON values, got a {type(value).__name__}: {value!r}")


def _digest(content: dict[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(plain.encode("ascii")).hexdigest()
