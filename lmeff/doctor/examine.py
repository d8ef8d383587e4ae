"""An examination: every check is made, none can end it, and several processes compare what they found."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from lmeff.config.files import to_json
from lmeff.core.errors import UserError
from lmeff.doctor import folder, hosts, packages
from lmeff.doctor.check import Check, crashed
from lmeff.doctor.table import CHECKS, Case, Row
from lmeff.parallel.processes import joined, leads

LONG = 20.0  # seconds after which to say what is waited for
MARKS = {"ok": "[green]ok  [/green]", "look": "[yellow]look[/yellow]", "FAIL": "[red]FAIL[/red]"}


class Unwell(UserError):
    """Something failed. `answer`: all that was found, for `--json`."""

    exit_code = 1

    def __init__(self, message: str, answer: dict[str, Any]) -> None:
        """`message`: what failed, in words."""
        super().__init__(message)
        self.answer = answer


def examine(case: Case, console: Console) -> dict[str, Any]:
    """Makes every check and prints it as it is made; of several processes the first prints for all. Raises `Unwell` where one failed."""
    case, alone = case._replace(began=(time.time(), time.monotonic())), not joined()
    if not alone:
        console.print(f"{jax.process_count()} processes examine themselves", highlight=False)
    missing: list[Check] = []
    with _folder(case, missing):
        checks = list(_made(case, console if alone else None))
        reports = [] if alone or missing else _exchanged(case, checks)
    if not alone:
        checks = missing + _together(case, checks, reports)
        for check in checks:
            show(check, console)
    failed = [check.name for check in checks if check.level == "FAIL"]
    answer = {"checks": [check.to_json() for check in checks], "failed": failed}
    answer["processes"] = [report.to_json() for report in reports]
    if failed:
        count = f"{len(failed)} of {len(checks)} checks failed" if len(failed) > 1 else "a check failed"
        raise Unwell(f"doctor: {count}: {', '.join(dict.fromkeys(failed))}; follow the arrows, then ask again", answer)
    return answer


@contextlib.contextmanager
def _folder(case: Case, missing: list[Check]) -> Iterator[None]:
    """The run folder is there meanwhile; of several processes the first makes it and clears it away. missing: takes up that one does not come."""
    with folder.standing(case.directory) if leads() else contextlib.nullcontext():
        missing += _meeting("folder made")
        yield
        missing += _meeting("all done")


def _meeting(name: str) -> list[Check]:
    """Waits for all processes; a finding where one of them does not come."""
    try:
        hosts.wait(name)
    except Exception as error:
        return [crashed("hosts", error)]
    return []


def _made(case: Case, console: Console | None) -> Iterator[Check]:
    """The checks of this process, one after the other; an exception becomes a finding."""
    blind = False
    for row in CHECKS:
        if row.devices and blind:
            check = Check(row.name, "look", "not checked: JAX finds no devices", "mend `devices` first")
        else:
            check = attempt(row, case, console)
        blind = blind or (row.name == "devices" and check.level == "FAIL" and not _has_devices())
        if console is not None:
            show(check, console)
        yield check


def attempt(row: Row, case: Case, console: Console | None = None) -> Check:
    """One check. Where it takes long, it is said what is waited for."""
    hint = "; on a pod start the same command on every host, with --distributed" if row.name == "devices" else ""
    told = f"     {row.name}: still waiting{hint}"
    patience = threading.Timer(LONG, lambda: console.print(told, highlight=False) if console is not None else None)
    patience.daemon = True
    patience.start()
    try:
        return row.check(case)
    except Exception as error:
        return crashed(row.name, error)
    finally:
        patience.cancel()


def _has_devices() -> bool:
    try:
        return bool(jax.local_devices())
    except RuntimeError:
        return False


def _exchanged(case: Case, checks: list[Check]) -> list[hosts.Report]:
    """What all processes found; nothing where they cannot reach each other."""
    config = None if case.experiment is None else json.dumps(to_json(case.experiment), sort_keys=True)
    try:
        return hosts.report(hosts.versions(packages.read_installed(), config), checks, case.directory)
    except Exception as error:
        checks.append(crashed("hosts", error))
        return []


def _together(case: Case, own: list[Check], reports: list[hosts.Report]) -> list[Check]:
    if not reports:
        return own
    shared = [hosts.alike(reports), hosts.one_folder(reports, case.directory), hosts.one_time(reports)]
    return hosts.merged(reports) + shared


def show(check: Check, console: Console) -> None:
    """One line in a file or a pipe; on a terminal folded to its width, the remedy below."""
    if not console.is_terminal:
        remedy = f"  -> {check.remedy}" if check.remedy else ""
        line = f"{check.level:4} {check.name}: {check.found}{remedy}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(width=4)
    table.add_column(width=13)
    table.add_column(overflow="fold")
    table.add_row(MARKS[check.level], check.name, _plain(check.found))
    if check.remedy:
        table.add_row("", "", _plain(f"-> {check.remedy}"))
    console.print(table, highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
