"""Which activations are quantized and how: rules on the model's sites, settled before anything compiles."""

import difflib
import re
from dataclasses import dataclass

from lmeff.core.errors import ConfigError
from lmeff.core.numerics import parse_format
from lmeff.core.ops import Numerics
from lmeff.core.specs import resolve
from lmeff.models.config import ModelConfig
from lmeff.models.transformer import sites

RANGES = ("minmax", "moving", "percentile")


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Formats of the activations that enter the model's products, as `(pattern, format)` rules on sites; None stays in floating point.

    rules:      total and live, first match wins. "int8", "int8-affine" and "fp8" find one scale per token on the fly; "int8/tensor",
                "int8-affine/tensor" and "fp8/tensor" use one calibrated range per layer.
    batches:    batches of training data that calibrate the static ranges.
    ranges:     "minmax": the extremes of all batches. "moving": extremes of each batch, averaged with `decay` (Jacob et al. 2018,
                https://arxiv.org/abs/1712.05877). "percentile": `percentile` and its mirror of each batch, averaged; what lies outside is clipped.
    decay:      of the moving average, 0 to 1.
    percentile: 50 to 100, of all entries at a site.
    """

    rules: tuple[tuple[str, str | None], ...] = ((".*", "int8"),)
    batches: int = 4
    ranges: str = "minmax"
    decay: float = 0.9
    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Refuses formats and values that do not exist."""
        for i, (pattern, format) in enumerate(self.rules):
            if format is not None and parse_format(format).granularity == "group":
                raise ConfigError(
                    f"activations.rules[{i}] ('{pattern}'): got '{format}', but groups are for weights; expected one scale per token "
                    f"('{format.partition('/')[0]}') or one calibrated scale ('{format.partition('/')[0]}/tensor')"
                )
        if self.batches < 1:
            raise ConfigError(f"activations.batches: got {self.batches}, expected at least 1")
        if self.ranges not in RANGES:
            near = difflib.get_close_matches(self.ranges, RANGES, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"activations.ranges: got '{self.ranges}', expected one of {', '.join(RANGES)}{hint}")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"activations.decay: got {self.decay}, expected at least 0 and less than 1")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"activations.percentile: got {self.percentile}, expected more than 50 and at most 100")

    def resolve(self, cfg: ModelConfig) -> Numerics:
        """The format of every site of this model; raises `ConfigError` for a rule that names no site of it."""
        where, names = "activations.rules", sites(cfg)
        for i, (pattern, _) in enumerate(self.rules):
            _refuse_dead_alternatives(pattern, names, f"{where}[{i}]")
        table = resolve(self.rules, names, where=where)
        chosen = {site: parse_format(format) for site, format in table.items() if format is not None}
        return Numerics(tuple(sorted(chosen.items())))


def _refuse_dead_alternatives(pattern: str, names: list[str], where: str) -> None:
    """`attn.q|mlp.gaet` matches something, yet its second half never would."""
    if re.search(r"[()\[\]\\]", pattern) or "|" not in pattern:
        return
    for part in pattern.split("|"):
        if not any(re.fullmatch(part, name) for name in names):
            near = difflib.get_close_matches(part, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"{where}: '{part}' in '{pattern}' matches no site of this model. Nearest: '{near[0]}'. Sites: {', '.join(names)}."
            )
