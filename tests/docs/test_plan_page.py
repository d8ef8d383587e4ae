"""The page on reading a plan shows what `lmeff plan` prints."""

import re

import pytest

from tests.docs.page import ROOT, Shown, prose, refute, shown
from tests.runs import lmeff

PAGE = "docs/plan.md"


@pytest.fixture(scope="module")
def printed():
    """By command of the page: its exit code, and what it prints with tables and errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("COLUMNS", "80")
        found = {each.command: lmeff(*each.words[1:]) for each in shown(PAGE)}
    return {command: (code, out + err) for command, (code, out, err) in found.items()}


@pytest.mark.parametrize("each", shown(PAGE), ids=lambda each: " ".join(each.words[2:]))
def test_what_is_shown_is_printed(each: Shown, printed):
    assert each.words[:2] == ["lmeff", "plan"]
    code, text = printed[each.command]
    wrong = refute(each.lines, text)
    assert not wrong, wrong
    assert code == (6 if "Does not fit" in text else 0)


def test_numbers_of_the_text_are_printed_by_a_plan(printed):
    """Every number with a unit and every large one, but for what stands in code."""
    everything = "".join(text for _, text in printed.values())
    text = re.sub("`[^`]*`", "", prose(PAGE))
    units = r"(?:[GM]iB|ms|s|min|%|k tokens/s|MWh)"
    said = set(re.findall(rf"(?<![\w.,])(\d[\d,.]* ?{units}|\d+,\d{{3}})(?!\w)", text))
    assert said, "none is found"
    missing = sorted(number for number in said if number not in everything)
    assert not missing, missing


def test_a_line_that_is_not_printed_is_found():
    assert refute(["a 1", "b 2"], "a 1\nb 2\n") == ""
    assert refute(["a 1", "...", "c 3"], "a 1\nb 2\nc 3\n") == ""
    assert "it prints        b 2" in refute(["a 1", "b 3"], "a 1\nb 2\n")
    assert refute(["a 1", "c 3"], "a 1\nb 2\nc 3\n")
    assert refute(["b 2", "...", "a 1"], "a 1\nb 2\n")
