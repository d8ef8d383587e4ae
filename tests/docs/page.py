"""A page of docs/ as what can be run: its commands in their order, and what it says that they print."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = "..."  # a line that stands for lines which are not shown
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Shown(NamedTuple):
    """A command, and lines that the page shows of what it prints."""

    command: str
    lines: list[str]

    @property
    def words(self) -> list[str]:
        """As a shell takes them apart, without a comment."""
        return shlex.split(self.command, comments=True)


def blocks(page: str) -> list[tuple[str, str]]:
    """`(language, text)` of every fenced block."""
    return BLOCK.findall((ROOT / page).read_text())


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return BLOCK.sub("", (ROOT / page).read_text())


def shown(page: str) -> list[Shown]:
    """Commands in the order of the page: every line of a `sh` block, and every line of a `console` block that begins with a prompt.

    Lines below a prompt are what it prints, and `text` blocks say more of what the last command prints. A backslash joins lines.
    """
    found: list[Shown] = []
    for language, text in blocks(page):
        lines = text.replace("\\\n", " ").splitlines()
        if language == "text":
            found[-1].lines.extend([LEFT_OUT, *lines])
        for line in lines if language == "console" else []:
            if line.startswith("$ "):
                found.append(Shown(line.removeprefix("$ "), []))
            else:
                found[-1].lines.append(line)
        if language == "sh":
            found.extend(Shown(line, []) for line in lines if line.strip() and not line.startswith("#"))
    return found


def refute(lines: list[str], printed: str) -> str:
    """The first shown line that is not printed where it should be, with what is; empty where all are, in their order.

    Lines that follow each other on the page follow each other in print; behind a line "..." any later line may be next.
    """
    printed_lines = [line.rstrip() for line in printed.splitlines()]
    at, anywhere = 0, True
    for line in lines:
        if line == LEFT_OUT:
            anywhere = True
            continue
        places = [i for i in range(at, len(printed_lines)) if printed_lines[i] == line.rstrip()]
        if not places or not (anywhere or places[0] == at):
            first = line.split(" ")[0]
            near = [known for known in printed_lines if known.split(" ")[0] == first] or printed_lines[at : at + 1]
            return "\n".join([f"the page shows   {line}", *(f"it prints        {known}" for known in near)])
        at, anywhere = places[0] + 1, False
    return ""
