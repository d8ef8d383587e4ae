"""Writes what commands print now into a page: `python -m tests.docs.renew docs/plan.md`. Read the difference before you commit it, and the text around it."""

import difflib
import os
import re
import sys

from tests.docs.page import LEFT_OUT, ROOT, refute, shown
from tests.runs import lmeff


def renewed(line: str, printed: list[str]) -> str:
    """The printed line that is most like a shown one, but for its numbers."""
    same = [known for known in printed if _words(known) == _words(line)]
    near = same or [known for known in printed if known.split()[:1] == line.split()[:1]] or printed
    return max(near, key=lambda known: difflib.SequenceMatcher(None, line, known).ratio())


def _words(line: str) -> list[str]:
    return re.sub(r"[\d.,]+( [kMGTP])?", "", line).split()


def renew(page: str) -> None:
    """Rewrites the page where its lines are not printed any more."""
    text = (ROOT / page).read_text()
    for each in filter(lambda each: each.lines, shown(page)):
        _, out, err = lmeff(*each.words[1:])
        if not refute(each.lines, out + err):
            continue
        printed = [line.rstrip() for line in (out + err).splitlines()]
        begin = text.index(each.command)
        for line in each.lines:
            if line and line != LEFT_OUT:
                begin = text.index(f"\n{line}\n", begin)
                new = renewed(line, printed)
                text = text[:begin] + text[begin:].replace(f"\n{line}\n", f"\n{new}\n", 1)
    (ROOT / page).write_text(text)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    renew(sys.argv[1])
