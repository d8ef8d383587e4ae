"""A plan in sentences, and what its numbers count: the terminal and the page tell the same from the same JSON (`lmeff plan --json`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmeff.report import plan_options, words

Json = Mapping[str, Any]

# What each figure of FLOPs counts, in a line; a plan's "conventions" say it in full. A FLOP is a multiplication or an addition.
FLOPS: dict[str, str] = {
    "forward": "2 a weight and token of every product; the head counts, the embedding lookup does not",
    "backward": "twice the forward products: gradients of inputs and of weights",
    "recompute": "what the backward pass runs again, by the remat policy and the pipeline",
    "attention forward": "scores and values of the keys that a token sees: causal",
    "attention backward": "the same for the gradients, with what the kernel makes again",
    "teacher": "the teacher's forward pass",
    "compression": "masks and grids of weights and activations, elementwise",
    "optimizer": "the update, elementwise",
    "padding": "layers that are none, where slices of the pipeline do not divide them",
    "hardware": "everything that runs (HFU)",
    "model_full": "forward and backward alone, every query with every key (PaLM's MFU)",
    "model_causal": "the same with causal attention",
    "effective": "causal, without the products of pruned weights",
    "six_nd": "6 x active parameters x tokens (Kaplan et al. 2020)",
}
# Why kinds of collectives differ from the prediction where their sum does not.
OTHERWISE = "A TPU's compiler may send the same otherwise: a gather or scatter around a product becomes permutes, a scatter a sum of which parts are kept."
TOTALS = ("hardware", "model_full", "model_causal", "effective", "six_nd")
SHOWN = {"model_full": "model, attention full", "model_causal": "model, attention causal", "six_nd": "6 N D"}


def flops(plan: Json) -> list[tuple[str, float, str]]:
    """`(name, FLOPs of a step, what is counted)`: the parts that run, then the sums by convention."""
    parts = {key: n for key, n in plan["flops_per_step"].items() if n and key not in TOTALS}
    sums = {**plan["flops_per_step"], **plan.get("flops", {})}
    rows: list[tuple[str, float]] = [*parts.items(), *((key, sums[key]) for key in TOTALS if sums.get(key))]
    return [(SHOWN.get(key, key), n, FLOPS.get(key, "")) for key, n in rows]


def categories(memory: Json) -> dict[str, int]:
    """Bytes on a device by category, what stays first."""
    return {**memory["state"], **memory["held"], **memory["temporaries"]}


def all_categories(memories: Sequence[Json]) -> list[str]:
    """Every category that some stage has, in the order in which they first appear."""
    return [*dict.fromkeys(name for memory in memories for name, n in categories(memory).items() if n)]


def fullest(plan: Json) -> Json:
    """The memory of the stage that has most."""
    return max(plan["memory"], key=lambda memory: memory["total"])


def verdict(plan: Json) -> str:
    """Whether it fits, and how nearly; the compiler's word counts where it was asked."""
    total, capacity, compiled = plan["bytes_per_device"]["total"], plan["capacity"], plan.get("compiled")
    answer = "Fits" if plan["fits"] else "Does not fit"
    after = "." if plan["fits"] else f"; {blame(plan)}."
    if not compiled:
        return f"{answer}: the fullest device needs {words.size(total)} of {words.size(capacity)}, {share(total, capacity)}{after}"
    own = compiled.get("total_bytes")
    told = f"{words.size(own)} of {words.size(capacity)}, {share(own, capacity)}" if own else "refused"
    return f"{answer}, says the compiler: {told}; predicted {words.size(total)}, {share(total, capacity)}{after}"


def refusal(plan: Json, remedies: Mapping[str, str], otherwise: str) -> str:
    """Why what was asked for does not fit, in one paragraph; the compiler's reason where it gave one.

    remedies: by the category that takes most; `otherwise` for the others.
    """
    if plan.get("budget") and not plan["budget"]["options"]:
        return f"no compression that is known here meets {plan_options.target(plan['budget'])}"
    if plan.get("search"):
        return plan["search"]["reasons"][-1]
    if reason := (plan.get("compiled") or {}).get("refusal"):
        return reason
    total, capacity = plan["bytes_per_device"]["total"], plan["capacity"]
    remedy = remedies.get(largest(plan)[0], otherwise)
    return f"the step needs {words.size(total)} of a device's {words.size(capacity)}, expected it to fit; {blame(plan)}. {remedy}"


def largest(plan: Json) -> tuple[str, int]:
    """The category that takes most on the fullest device, and its bytes."""
    return max(categories(fullest(plan)).items(), key=lambda item: item[1])


def share(part: float, whole: float) -> str:
    """A part in per cent; a small one says so."""
    if not whole:
        return words.DASH
    return "under 1%" if 0 < part < 0.01 * whole else f"{part / whole:.0%}"


def blame(plan: Json) -> str:
    """The category that takes most, in words."""
    name, n = largest(plan)
    return f"{name} take{'' if name.endswith('s') else 's'} {words.size(n)} of it"


def notes(plan: Json) -> list[str]:
    """What binds and what to change, without the verdict, which is told already."""
    return [note for note in plan["notes"] if not note.startswith(("fits:", "does not fit:"))]


def speed(plan: Json) -> str:
    """Tokens a second as a range, and the share of the chip's peak."""
    low, high = (_rate(plan, key) for key in ("high", "low"))
    use = plan["utilization"]
    return (
        f"{words.amount(low)} to {words.amount(high)} tokens/s, perhaps {words.amount(plan['tokens_per_second'])}: "
        f"MFU {use['mfu_full']:.0%} with attention counted full, {use['mfu_causal']:.0%} causal; HFU {use['hfu']:.0%}"
    )


def _rate(plan: Json, key: str) -> float:
    seconds = plan["step_seconds"][key]
    return plan["tokens_per_step"] / seconds if seconds else 0.0


def cost(plan: Json) -> str:
    """What the whole run takes."""
    job, energy = plan["job"], plan["energy"]
    wall = job["steps"] * plan["step_seconds"]["middle"]
    return (
        f"{words.plural(job['steps'], 'step')}, {words.count(job['steps'] * plan['tokens_per_step'])} tokens: {words.seconds(wall)}, "
        f"{words.amount(energy['chip_hours'])} chip-hours, {watt_hours(energy['kwh'])}"
    )


def setting(plan: Json) -> str:
    """What was planned, in one line."""
    job = plan["job"]
    return (
        f"{words.plural(plan['devices'], plan['chip'] + ' device')}: {chosen(job)}; {job['rows']} rows of {job['tokens']} tokens a step, "
        f"{job['optimizer']}"
    )


def chosen(job: Json) -> str:
    """The mesh and what is chosen beside it, with what a budget of remat comes to."""
    return job["words"] + ("" if job["remat"] == job["remat_policy"] else f" (which is {job['remat_policy']})")


def binding(plan: Json) -> str:
    """Which cause takes most of a step."""
    parts = {name: seconds for name, seconds in plan["time_parts"].items() if seconds}
    if not parts:
        return ""
    name = max(parts, key=lambda part: parts[part])
    return f"{name.capitalize()} takes most, {words.brief(parts[name])} of {words.brief(sum(parts.values()))}"


def compared(plan: Json) -> list[tuple[str, str, str, str]]:
    """`(what, predicted, compiled, error)` in words, where the program was compiled; the error is relative to the compiler's number."""
    return [
        (row["name"], words.size(row["predicted"]), words.size(row["compiled"]), words.percent(row["difference"], 1))
        for row in (plan.get("compiled") or {}).get("compared", [])
    ]


def compared_collectives(plan: Json) -> list[tuple[str, str, float, float]]:
    """`(kind, axes, predicted, compiled)` bytes that a device sends, of every kind and axes that either has."""
    theirs = (plan.get("compiled") or {}).get("collective_bytes")
    if theirs is None:
        return []
    ours = plan["collective_bytes"]
    keys = [(kind, axes) for table in (ours, theirs) for kind, row in table.items() for axes in row]
    rows = [
        (kind, axes, ours.get(kind, {}).get(axes, 0), theirs.get(kind, {}).get(axes, 0))
        for kind, axes in dict.fromkeys(keys)
    ]
    return [*rows, ("all", "", sum(row[2] for row in rows), sum(row[3] for row in rows))] if rows else []


def energy(plan: Json) -> str:
    """Of the whole run, beside what a bill can be compared with."""
    found = plan["energy"]
    most = f", at most {watt_hours(found['ceiling'])} with all chips at full power" if found.get("ceiling") else ""
    return f"energy: {watt_hours(found['kwh'])} for the whole run{most}"


def watt_hours(kwh: float) -> str:
    """Energy with the unit that suits it: `298180` kWh as `298 MWh`."""
    text = words.amount(1000 * kwh)
    return f"{text}Wh" if text[-1:].isalpha() else f"{text} Wh"


def sized(plan: Json) -> str:
    """Tokens a parameter, and what laws of scaling would do with as many FLOPs; they are about training from random weights on one epoch."""
    found = plan["sizing"]
    others = "; ".join(
        f"{words.count(best['parameters'])} parameters on {words.count(best['tokens'])} tokens ({law})"
        for law, best in found["compute_optimal"].items()
    )
    return f"the run sees {words.number(found['tokens_per_parameter'])} tokens a parameter; as many FLOPs train from random weights best: {others}"
