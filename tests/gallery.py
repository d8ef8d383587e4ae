"""The gallery of configs as its docstrings show it: every command, and the plan's numbers that stand below those of plans."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import tyro

from lmeff.cli import Command
from lmeff.config.overrides import resolve
from lmeff.plan.command import Target, target
from lmeff.plan.job import Job, jobs

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))

# 52.7 of 95.7 GiB a chip; 159 k tokens/s (91.0 k to 243 k), MFU 56%, HFU 63%; 11 d 15 h, 8,950 chip-hours
NUMBERS = re.compile(
    r"(?:(?P<stage>[\w-]+): )?(?P<needs>[\d.]+) of (?P<has>[\d.]+) GiB a chip; (?P<speed>[\d.]+) (?P<prefix>[kM]) tokens/s "
    r"\((?P<low>[\d.]+) (?P=prefix) to (?P<high>[\d.]+) (?P=prefix)\), MFU (?P<mfu>\d+)%(?:, HFU (?P<hfu>\d+)%)?; "
    r"(?:(?P<days>\d+) d )?(?:(?P<hours>\d+) h)?(?: ?(?P<minutes>\d+) min)?, (?P<chip_hours>[\d,]+) chip-hours"
)


class Shown(NamedTuple):
    """A plan as a docstring shows it. line: the command. numbers: what stands below, by the names in `NUMBERS`, a row a stage. launch: the script's line."""

    file: Path
    line: str
    numbers: tuple[dict[str, str | None], ...]
    launch: str | None


def docstring(file: Path) -> str:
    """The text, each command on one line."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").replace("\\\n    ", "")


def commands(file: Path) -> list[str]:
    """Every line that is a command."""
    return re.findall(r"^(?:lmeff|tpu_scripts/) ?\S.*", docstring(file), re.MULTILINE)


def plans(file: Path) -> list[Shown]:
    """Every plan, with what stands below it."""
    found = re.findall(
        r"^(lmeff plan .* --topology .*)\n((?: {4}\S.*\n)*)(tpu_scripts/launch\.sh .*)?", docstring(file), re.MULTILINE
    )
    return [
        Shown(file, line, tuple(map(_numbers, below.splitlines())), launch or None) for line, below, launch in found
    ]


def _numbers(line: str) -> dict[str, str | None]:
    match = NUMBERS.fullmatch(line.strip())
    assert match is not None, f"numbers of a plan in another form: {line!r}"
    return match.groupdict()


def asked(line: str) -> tuple[Target, list[Job]]:
    """What a plan's command is about: the devices, and a job for every stage that trains."""
    command, overrides = tyro.cli(Command, args=shlex.split(line)[1:], return_unknown_args=True)
    experiment, _ = resolve(command.config, overrides, prog="lmeff plan")
    where = target(command, experiment)
    return where, jobs(experiment, where.devices, where.chip.platform)
