"""A plan on the terminal, what one reads first on top: does it fit, how fast, at what cost; then where the numbers come from."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from lmeff.report import plan_options, plan_words, words
from lmeff.report.tables import make_cell, make_table, print_points

Json = dict[str, Any]
BAR = 40  # characters of a bar that fills a device
GOOD, BAD = "bold green", "bold red"


def show(plan: Json, console: Console) -> None:
    """Everything about one stage."""
    verdict(plan, console)
    for section in SECTIONS:
        section(plan, console)


def overview(plans: Sequence[Json], console: Console) -> None:
    """A line for every stage of a recipe."""
    table = make_table(
        console, "stage", "params", "FLOPs", "on a device", "fits", "a step", "energy", text_columns=("stage",)
    )
    for plan in plans:
        cells = (
            plan["stage"],
            words.count(plan["parameters"]),
            words.count(plan["flops"]["hardware"]),
            words.size(plan["bytes_per_device"]["total"]),
            "yes" if plan["fits"] else "no",
            words.brief(plan["step_seconds"]["middle"]),
            plan_words.watt_hours(plan["energy_kwh"]),
        )
        table.add_row(*(make_cell(console, cell) for cell in cells))
    console.print(table)


def verdict(plan: Json, console: Console) -> None:
    """The lines that answer the question."""
    console.print(make_cell(console, f"{plan['stage']}: {plan_words.setting(plan)}"), soft_wrap=not console.is_terminal)
    told = plan_words.verdict(plan)
    console.print(make_cell(console, told, GOOD if plan["fits"] else BAD), soft_wrap=not console.is_terminal)
    print_points(console, [plan_words.speed(plan), plan_words.cost(plan), *plan_words.notes(plan)])


def _head(console: Console, text: str) -> None:
    console.print()
    console.print(make_cell(console, text, "bold"), soft_wrap=not console.is_terminal)


def _compiled(plan: Json, console: Console) -> None:
    rows = plan_words.compared(plan)
    if "refusal" in (plan.get("compiled") or {}):
        _head(console, "compiled")
        print_points(console, [plan["compiled"]["refusal"]])
    if not rows:
        return
    _head(console, f"bytes on a device, predicted and compiled for {plan['compiled']['where']}")
    table = make_table(console, "what", "predicted", "compiled", "error", text_columns=("what",))
    for cells in rows:
        table.add_row(*(make_cell(console, cell) for cell in cells))
    console.print(table)
    _compiled_bytes(plan, console)


def _compiled_bytes(plan: Json, console: Console) -> None:
    rows = plan_words.compared_collectives(plan)
    if not rows:
        return
    table = make_table(console, "collective", "axes", "predicted", "compiled", text_columns=("collective", "axes"))
    for kind, axes, ours, theirs in rows:
        cells = (kind, axes, words.size(ours), words.size(theirs))
        table.add_row(*(make_cell(console, cell) for cell in cells))
    console.print(table)
    if plan["chip"] != "cpu":
        console.print(make_cell(console, plan_words.OTHERWISE, "dim"), soft_wrap=not console.is_terminal)


def _room(plan: Json, console: Console) -> None:
    if plan.get("room"):
        _head(console, "what there is room for")
        print_points(console, plan_options.roomy(plan))


def _memory(plan: Json, console: Console) -> None:
    memories = plan["memory"]
    _head(console, "memory of a device" + (" by stage of the pipeline" if len(memories) > 1 else ""))
    heads = [f"stage {memory['stage']}" for memory in memories] if len(memories) > 1 else ["bytes"]
    table = make_table(console, "category", *heads, text_columns=("category",))
    for name in plan_words.all_categories(memories):
        cells = (words.size(plan_words.categories(memory).get(name, 0)) for memory in memories)
        table.add_row(*(make_cell(console, cell) for cell in (name, *cells)))
    total = (words.size(memory["total"]) for memory in memories)
    table.add_row(*(make_cell(console, cell, "bold") for cell in ("total", *total)))
    if any(memory["host"] for memory in memories):
        host = (words.size(memory["host"]) for memory in memories)
        table.add_row(*(make_cell(console, cell) for cell in ("in the host's memory", *host)))
    console.print(table)
    for head, memory in zip(heads, memories):
        _bar(head if len(memories) > 1 else "device", memory["total"], plan["capacity"], console)


def _bar(name: str, total: float, capacity: float, console: Console) -> None:
    """One device against what programs can use of it; what is too much goes beyond the edge."""
    share = total / capacity if capacity else 0.0
    full = min(round(share * BAR), BAR)
    over = min(max(round(share * BAR) - BAR, 0), 12)
    bar = "█" * full + "░" * (BAR - full) + "|" + "█" * over
    text = f"{name:8} {bar} {plan_words.share(total, capacity)} of {words.size(capacity)}"
    console.print(make_cell(console, text, BAD if over else ""), soft_wrap=True)


def _flops(plan: Json, console: Console) -> None:
    active = plan["active_parameters"]
    some = f", of which {words.count(active)} act on a token" if active != plan["parameters"] else ""
    _head(console, f"parameters: {words.count(plan['parameters'])}{some}; FLOPs of a step on all devices")
    table = make_table(console, "part", "FLOPs", "what is counted", text_columns=("part", "what is counted"))
    for name, n, counted in plan_words.flops(plan):
        table.add_row(*(make_cell(console, cell) for cell in (name, words.count(n), counted)))
    console.print(table)
    console.print(make_cell(console, plan_words.sized(plan), "dim"), soft_wrap=not console.is_terminal)


def _collectives(plan: Json, console: Console) -> None:
    flows = plan["collectives"]
    _head(console, "bytes that a device sends in a step" if flows else "no collectives: nothing is sent")
    if not flows:
        return
    heads = ("collective", "axes", "each", "network", "bytes", "alone")
    table = make_table(console, *heads, text_columns=heads[:4])
    for flow in flows:
        cells = (
            flow["kind"],
            "+".join(flow["axes"]),
            flow["loop"],
            flow["network"],
            words.size(flow["bytes"]),
            words.brief(flow["seconds"]),
        )
        table.add_row(*(make_cell(console, cell) for cell in cells))
    console.print(table)


def _time(plan: Json, console: Console) -> None:
    low, middle, high = (words.brief(plan["step_seconds"][key]) for key in ("low", "middle", "high"))
    _head(console, f"a step: {low} if all overlaps at full rates, {high} if nothing does, perhaps {middle}")
    parts = make_table(console, "part", "time", "share", text_columns=("part",))
    whole = sum(plan["time_parts"].values())
    for name, seconds in plan["time_parts"].items():
        if seconds:
            parts.add_row(
                *(make_cell(console, cell) for cell in (name, words.brief(seconds), f"{seconds / whole:.0%}"))
            )
    console.print(parts)
    heads = ("site", "FLOPs", "bytes", "compute", "memory", "bound by")
    sites = make_table(console, *heads, text_columns=("site", "bound by"))
    for site in plan["sites"]:
        cells = (
            site["name"],
            words.count(site["flops"]),
            words.size(site["bytes"]),
            words.brief(site["compute"]),
            words.brief(site["memory"]),
            site["bound"],
        )
        sites.add_row(*(make_cell(console, cell) for cell in cells))
    console.print(sites)


def _energy(plan: Json, console: Console) -> None:
    energy = plan["energy"]
    _head(console, plan_words.energy(plan))
    table = make_table(console, "of a step", "joules", text_columns=("of a step",))
    for name, joules in energy["joules"].items():
        table.add_row(*(make_cell(console, cell) for cell in (name, words.amount(joules))))
    console.print(table)
    assumed = "; ".join(f"{name} {words.number(value)}" for name, value in energy["assumptions"].items())
    console.print(make_cell(console, f"assumed: {assumed}", "dim"), soft_wrap=not console.is_terminal)


def _sharding(plan: Json, console: Console) -> None:
    _head(console, "where parameters lie")
    heads = ("parameter", "letters", "shape", "cut over", "a device", "copies")
    table = make_table(console, *heads, text_columns=heads[:4])
    for leaf in plan["leaves"]:
        shape = "x".join(map(str, leaf["shape"]))
        cells = (
            leaf["path"],
            leaf["letters"],
            shape,
            leaf["partition"],
            words.size(leaf["bytes"]),
            str(leaf["copies"]),
        )
        table.add_row(*(make_cell(console, cell) for cell in cells))
    console.print(table)


def _search(plan: Json, console: Console) -> None:
    found = plan.get("search")
    if not found:
        return
    _head(console, "search: the best plans, and those beside which they are best")
    table = make_table(console, "plan", "a step", "tokens/s", "MFU", "a device", text_columns=("plan",))
    for row in found["plans"]:
        cells = plan_options.searched_row(row)
        style = "" if row["fits"] else "dim"
        table.add_row(*(make_cell(console, cell, style) for cell in cells))
    console.print(table)
    print_points(console, found["reasons"])


def _budget(plan: Json, console: Console) -> None:
    found = plan.get("budget")
    if not found:
        return
    _head(
        console,
        f"compressions that meet {plan_options.target(found)}, the gentlest first; nats are expected, not measured",
    )
    heads = ("stage", "stored", "bits", "a token", "nats")
    table = make_table(console, *heads, text_columns=("stage",))
    for option in found["options"]:
        table.add_row(*(make_cell(console, cell) for cell in plan_options.option_row(option)))
    console.print(table)
    print_points(console, [plan_options.because(option) for option in found["options"]])


def _serving(plan: Json, console: Console) -> None:
    found = plan.get("serving")
    if not found:
        return
    _head(console, plan_options.served(found))
    heads = ("weights", "cache", "rows", "on a device", "a token", "bound by", "prompt", "tokens/s")
    table = make_table(console, *heads, text_columns=("weights", "cache", "bound by"))
    for row in plan_options.served_rows(found):
        table.add_row(*(make_cell(console, cell) for cell in row))
    console.print(table)


SECTIONS: tuple[Callable[[Json, Console], None], ...] = (
    _budget, _search, _room, _compiled, _memory, _flops, _collectives, _time, _energy, _serving, _sharding,
)  # fmt: skip
