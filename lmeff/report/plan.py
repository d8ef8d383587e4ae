"""A plan as one HTML file that needs nothing else, in the dress of a run's report. It is made of the JSON that `lmeff plan --json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmeff.report import plan_options, plan_words, words
from lmeff.report.html import pipeline, template
from lmeff.report.roofline import roofline_plot

Json = Mapping[str, Any]
COLORED = 7  # categories with a colour of their own; the smaller ones share the eighth


def render_plan(answer: Json) -> str:
    """The page as text: the chosen stage in full, and a line for every stage where there are several. The same answer gives the same bytes."""
    stages = answer.get("stages") or [answer]
    plan = next(stage for stage in stages if stage["stage"] == answer["stage"])
    schedule = plan["schedule"] or {"name": "", "table": ""}
    roofline = roofline_plot(plan["sites"])
    return template("plan.html").render(
        name=answer["experiment"],
        plan=plan,
        stages=[_stage(stage) for stage in stages] if len(stages) > 1 else [],
        lead=plan_words.verdict(plan),
        sentences=[plan_words.speed(plan), plan_words.cost(plan), *plan_words.notes(plan)],
        facts=_facts(plan),
        memory=memory_bars(plan),
        compiled=plan.get("compiled") or {},
        room=plan_options.roomy(plan) if plan.get("room") else [],
        compared=plan_words.compared(plan),
        compared_collectives=plan_words.compared_collectives(plan),
        otherwise=plan_words.OTHERWISE if plan["chip"] != "cpu" else "",
        parts=time_bar(plan),
        seconds={key: words.brief(plan["step_seconds"][key]) for key in ("low", "middle", "high")},
        binding=plan_words.binding(plan),
        roofline=roofline,
        flops=plan_words.flops(plan),
        sized=plan_words.sized(plan),
        pipeline=pipeline(schedule["name"], schedule["table"]),
        search=_search(plan.get("search")),
        budget=_budget(plan.get("budget")),
        serving=_serving(plan.get("serving")),
        energy=plan_words.energy(plan),
        count=words.count,
        size=words.size,
        brief=words.brief,
        number=words.number,
        amount=words.amount,
        shape=lambda shape: " × ".join(map(str, shape)) or "scalar",
    )


def _facts(plan: Json) -> list[tuple[str, str]]:
    job = plan["job"]
    active = plan["active_parameters"]
    some = f", {words.count(active)} of them active" if active != plan["parameters"] else ""
    return [
        ("Devices", f"{plan['devices']} of {plan['chip']}"),
        ("Plan", plan_words.chosen(job)),
        ("Parameters", f"{words.count(plan['parameters'])}{some}"),
        ("A step", f"{job['rows']} rows of {job['tokens']:,} tokens, microbatches: {job['accumulate']}"),
        ("Precision", job["precision"].replace(",", ", ")),
        ("Optimizer", job["optimizer"]),
    ]  # fmt: skip


def _stage(plan: Json) -> dict[str, Any]:
    return {
        "name": plan["stage"],
        "fits": plan["fits"],
        "cells": (
            words.count(plan["parameters"]),
            words.count(plan["flops"]["hardware"]),
            words.size(plan["bytes_per_device"]["total"]),
            words.brief(plan["step_seconds"]["middle"]),
            plan_words.watt_hours(plan["energy_kwh"]),
        ),
    }


def _search(found: Json | None) -> dict[str, Any] | None:
    if not found:
        return None
    return {
        "rows": [(plan_options.searched_row({**row, "names": ()}), row) for row in found["plans"]],
        "reasons": found["reasons"],
        "refused": plan_options.refusals(found),
    }


def _budget(found: Json | None) -> dict[str, Any] | None:
    if not found:
        return None
    rows = [(plan_options.option_row(option), option["because"]) for option in found["options"]]
    return {"target": plan_options.target(found), "rows": rows}


def _serving(found: Json | None) -> dict[str, Any] | None:
    if not found:
        return None
    return {"told": plan_options.served(found), "rows": plan_options.served_rows(found)}


def colors(sizes: Mapping[str, float]) -> dict[str, str]:
    """A CSS colour for every name: the largest have their own, the others share one."""
    order = sorted(sizes, key=lambda name: -sizes[name])
    return {name: f"var(--series-{i})" if i < COLORED else "var(--muted)" for i, name in enumerate(order)}


def memory_bars(plan: Json) -> dict[str, Any]:
    """A bar for the device of every stage, in per cent of the widest or of what a device has; and the rows of the table beside it."""
    memories, capacity = plan["memory"], plan["capacity"]
    tables = [plan_words.categories(memory) for memory in memories]
    names = plan_words.all_categories(memories)
    painted = colors({name: max(table.get(name, 0) for table in tables) for name in names})
    scale = max([capacity, *(memory["total"] for memory in memories)]) or 1
    several = len(memories) > 1
    return {
        "edge": 100 * capacity / scale,
        "capacity": words.size(capacity),
        "heads": [f"Stage {memory['stage']}" if several else "Bytes" for memory in memories],
        "bars": [_memory_bar(memory, plan, painted, scale, several) for memory in memories],
        "rows": [(name, painted[name], [words.size(table.get(name, 0)) for table in tables]) for name in names],
        "totals": [words.size(memory["total"]) for memory in memories],
        "host": [words.size(memory["host"]) for memory in memories] if any(m["host"] for m in memories) else [],
    }


def _memory_bar(memory: Json, plan: Json, painted: Mapping[str, str], scale: float, several: bool) -> dict[str, Any]:
    capacity = plan["capacity"]
    share = plan_words.share(memory["total"], capacity)
    where = f"Stage {memory['stage']}" if several else "Device"
    return {
        "label": where,
        "told": f"{words.size(memory['total'])}, {share}",
        "over": memory["total"] > capacity,
        "pieces": _pieces(plan_words.categories(memory), painted, scale, words.size),
    }


def time_bar(plan: Json) -> dict[str, Any]:
    """The parts of a step one after another, in per cent of their sum."""
    parts = {name: seconds for name, seconds in plan["time_parts"].items() if seconds}
    whole, painted = sum(parts.values()) or 1.0, colors(parts)
    rows = [(name, painted[name], words.brief(seconds), f"{seconds / whole:.0%}") for name, seconds in parts.items()]
    return {"pieces": _pieces(parts, painted, whole, words.brief), "rows": rows}


def _pieces(
    sizes: Mapping[str, float], painted: Mapping[str, str], scale: float, tell: Any
) -> Sequence[dict[str, Any]]:
    return [
        {"color": painted[name], "width": f"{100 * n / scale:.3f}", "title": f"{name}: {tell(n)}"}
        for name, n in sizes.items()
        if n
    ]
