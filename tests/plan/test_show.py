"""A plan on the terminal: the answer first, and nothing cut at 80 and 120 columns."""

import io
import re

import pytest
from rich.console import Console

from lmeff.plan.estimate import Memory
from lmeff.plan.show import overview, show
from lmeff.report import words
from tests.plan.plan_sample import FLOWS, GIB, MEMORY, SITES, make_full, make_plan


def shown(plan, width, terminal=False, encoding="utf-8"):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(file=file, width=width, force_terminal=terminal, legacy_windows=False)
    overview([plan, plan], console)
    show(plan, console)
    file.flush()
    return re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue().decode(encoding))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_every_number_is_told_within_the_width(width, terminal):
    plan = make_full()
    text = shown(plan, width, terminal)
    assert "…" not in text
    if terminal:
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    whole = re.sub(r"\s+", "", text)  # a wrapped cell goes on in the next line

    def has(part):
        return re.sub(r"\s+", "", part) in whole

    for memory in MEMORY:
        for n in (*memory.state.values(), *memory.temporaries.values(), memory.total, memory.host):
            assert has(words.size(n))
    for flow in FLOWS:
        assert has(flow.kind)
        assert has(words.size(flow.bytes))
        assert has(words.brief(flow.seconds))
    for site in SITES:
        assert has(words.count(site.flops))
        assert has(words.brief(site.memory))
    for row in plan["search"]["plans"]:
        assert has(row["words"])
    assert has("do not pipeline")
    assert has("room for 2,944 rows of 4096 tokens: 94.0 GiB")
    for option in plan["budget"]["options"]:
        assert has(words.size(option["stored_bytes"]))
        assert has(f"{option['nats']:+.3f}")
    for row in plan["serving"]["rows"]:
        assert has(words.brief(row["decode"]["seconds"])) or row["cache"] not in ("bfloat16", "int8")
    for leaf in plan["leaves"]:
        assert has(words.size(leaf["bytes"]))
    for part in (
        "everything that runs",
        "MFU 52%",
        "3.90 MWh",
        "7.89 k chip-hours",
        "PUE 1.10",
        "+9.1%",
    ):  # 12 GiB for 11
        assert has(part)


def test_the_answer_comes_first():
    lines = shown(make_plan(), 120).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("teacher: "))
    assert "fsdp 16 x pipe 4 x tensor 4, ZeRO-3" in lines[start]
    assert lines[start + 1].startswith("Fits: the fullest device needs 30.5 GiB of 95.0 GiB, 32%")
    assert lines[start + 2].startswith("- 93.6 k to 206 k tokens/s")


def test_too_much_goes_beyond_the_edge_of_the_bar():
    memory = Memory(stage=0, state={"parameters": 19 * GIB}, temporaries={"logits": 95 * GIB})
    text = shown(make_plan(memory=(memory,)), 80)
    assert "Does not fit: the fullest device needs 114 GiB of 95.0 GiB, 120%; logits take 95.0 GiB of it." in text
    assert "█" * 40 + "|" + "█" * 8 + " 120% of 95.0 GiB" in text


def test_plain_ascii_where_nothing_else_can_be_shown():
    text = shown(make_plan(), 80, encoding="ascii")
    assert "#" * 12 + "." in text
    assert "us" in text


def test_nothing_is_sent_on_one_device():
    assert "no collectives: nothing is sent" in shown(make_plan(flows=()), 80)
