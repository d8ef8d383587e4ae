"""Two artifacts on the same documents, and claims against bounds."""

import dataclasses
from typing import Any

from lmeff.report.schema import Comparison, Verdict
from lmeff.report.statistics import paired_difference
from lmeff.report.words import comparison_sentence


def compare(
    name_a: str, a: tuple[Any, Any], name_b: str, b: tuple[Any, Any], *, samples: int = 2000, seed: int = 0
) -> Comparison:
    """The paired difference `a - b` with its interval and the sentence it makes. a, b: `(nats, tokens)` by document."""
    difference, low, high = paired_difference(a, b, samples=samples, seed=seed)
    found = Comparison(a=name_a, b=name_b, difference=difference, interval=(low, high))
    return dataclasses.replace(found, sentence=comparison_sentence(found))


def at_most(claim: str, measured: float, bound: float, detail: str = "") -> Verdict:
    """The claim that `measured` is at most `bound`; a number that is not finite fails."""
    return Verdict(
        claim=claim, passed=bool(measured <= bound), measured=float(measured), bound=float(bound), detail=detail
    )
