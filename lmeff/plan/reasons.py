"""Why a search ends as it does, in words: the best plan and others beside it, whether to pipeline, and what is missing where nothing fits."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lmeff.plan.estimate import Estimate
from lmeff.plan.words import bubble, largest, setting
from lmeff.report.words import brief, size

if TYPE_CHECKING:
    from lmeff.plan.search import Search


def choices(found: "Search") -> tuple[str, ...]:
    """What a search says: the best plan and why, what was looked at, whether to pipeline, how the config's own plan compares."""
    told = [counted(found)]
    if not found.best:
        return (*told, *nothing_fits(found))
    best = found.best[0]
    told.append(
        f"best: {setting(best.job)}; {brief(best.time.middle)} a step, {size(best.peak.total)} of {size(best.capacity)} on a device"
    )
    told += [*as_simple(found), *whether_to_pipeline(found), *against_own(found), *best.notes[2:]]
    return tuple(told)


def counted(found: "Search") -> str:
    """How many plans there were."""
    refused = sorted(found.refused.items(), key=lambda item: -item[1].count)[:2]
    why = "; ".join(
        f"{reason.count:,} cannot, such as: {reason.example.partition('. ')[0].rstrip('.')}" for _, reason in refused
    )
    return (
        f"{found.looked:,} plans: {found.legal:,} can train{f' ({why})' if why else ''}; the {found.close:,} that looked fastest were predicted, "
        f"{found.fit:,} of them fit"
    )


def nothing_fits(found: "Search") -> Iterator[str]:
    """How far the nearest plan is from fitting."""
    if found.least is None:
        yield "no plan can train; " + next((reason.example for reason in found.refused.values()), "")
        return
    peak, capacity = found.least.peak, found.least.capacity
    yield (
        f"no plan fits: the one that takes least, {setting(found.least.job)}, needs {size(peak.total)} of {size(capacity)} on a device: {largest(peak)}. "
        f"{relief(found.least)}"
    )


def relief(found: Estimate) -> str:
    """What would make room, by what takes most of it."""
    parts = found.peak.parts
    top = max(parts, key=lambda name: parts[name])
    over = found.peak.total / found.capacity
    return f"{RELIEFS.get(top, MORE)}, or take about {over:.1f} times as many devices"


MORE = "Take a smaller batch or context"
RELIEFS: Mapping[str, str] = {
    "optimizer": "Set precision state=bfloat16 or optim.offload",
    "parameters": "Set precision params=bfloat16",
    "average": "Drop optim.ema",
    "teacher": "Export the teacher to packed integers",
}


def as_simple(found: "Search") -> Iterator[str]:
    """A plan with fewer choices that is about as fast as the best."""
    simple, best = found.simple, found.best[0]
    if simple is None or simple.job == best.job:
        return
    more = simple.time.middle / best.time.middle - 1
    yield (
        f"about as fast and simpler: {setting(simple.job)}; {brief(simple.time.middle)} a step ({more:+.1%}), {size(simple.peak.total)} of "
        f"{size(simple.capacity)} on a device"
    )


def whether_to_pipeline(found: "Search") -> Iterator[str]:
    """The best plan with a pipeline against the best without."""
    plain, piped = found.plain, found.piped
    if piped is None:
        if plain is not None:
            yield "do not pipeline: no plan with a pipeline was found that fits"
        return
    formula, share = bubble(piped.job)
    if plain is None:
        yield (
            f"pipeline: no plan without one was found that fits; {setting(piped.job)} takes {brief(piped.time.middle)} a step, {formula} = {share:.0%} of its "
            "ticks idle"
        )
        return
    ours, theirs = piped.time, plain.time
    more, saved = ours.middle / theirs.middle - 1, theirs.parts["network"] - ours.parts["network"]
    network = f"it saves {brief(saved)} of the network" if saved > 0 else f"its network takes {brief(-saved)} more"
    yield (
        f"{'do not pipeline' if more > 0 else 'pipeline'}: the best plan with one ({setting(piped.job)}) takes {brief(ours.middle)} a step, "
        f"{abs(more):.0%} {'more' if more > 0 else 'less'} than {brief(theirs.middle)} without; "
        f"its bubble, {formula} = {share:.0%} of the ticks, costs {brief(ours.parts['bubble'])} and {network}"
    )


def against_own(found: "Search") -> Iterator[str]:
    """The best plan against the one that the config has."""
    own, best = found.own, found.best[0]
    if own is None:
        yield "the config's own plan cannot train on these devices"
    elif own.job == best.job:
        yield "the config's own plan is the best that was found"
    elif not own.fits:
        yield f"the config's own plan ({setting(own.job)}) does not fit: {size(own.peak.total)} of {size(own.capacity)}"
    else:
        more = own.time.middle / best.time.middle - 1
        yield f"the config's own plan ({setting(own.job)}) takes {brief(own.time.middle)} a step, {more:+.1%} against the best"
