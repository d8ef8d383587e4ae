"""A schedule as text: a row for each stage, a column for each tick."""

from rich.console import Console
from rich.text import Text

from lmeff.parallel.simulate import Simulation
from lmeff.parallel.tables import IDLE, LETTERS, B, F, Schedule, W

STYLES = {IDLE: "dim", F: "cyan", B: "bold magenta", W: "green"}


def draw(schedule: Schedule, width: int = 100) -> Text:
    """The table, in blocks of as many ticks as fit into `width` characters.

    A cell is the operation, its microbatch and, where stages have several chunks, the chunk's letter: `F3`, `B0b`. A dot is an idle tick.
    `print` writes it plain, a rich console in colours where it is a terminal.
    """
    size = 1 + len(str(schedule.microbatches - 1)) + (schedule.chunks > 1)
    head = len(f"stage {schedule.stages - 1}") + 1
    block = max(1, (width - head) // (size + 1))
    text = Text()
    for start in range(0, schedule.ticks, block):
        ticks = range(start, min(start + block, schedule.ticks))
        text.append("\n" if start else "")
        text.append(f"{'tick':{head}}{_ruler(ticks, size)}\n", "dim")
        for s in range(schedule.stages):
            text.append(f"{f'stage {s}':{head}}")
            for t in ticks:
                op = schedule.table[t][s]
                text.append(f"{cell(schedule, t, s):{size}}", STYLES[op.kind])
                text.append(" " if t != ticks[-1] else "\n")
    return text


def cell(schedule: Schedule, tick: int, stage: int) -> str:
    """What a stage does in a tick: `F3`, `B0b` or `.`"""
    op = schedule.table[tick][stage]
    if op.kind == IDLE:
        return LETTERS[IDLE]
    return f"{LETTERS[op.kind]}{op.microbatch}{_chunk(op.chunk) if schedule.chunks > 1 else ''}"


def _chunk(chunk: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[chunk] if chunk < len(letters) else "~"


def _ruler(ticks: range, size: int) -> str:
    """Every fifth tick's number, above its column."""
    ruler = ""
    for t in ticks:
        column = (t - ticks.start) * (size + 1)
        if t % 5 == 0 and column >= len(ruler):
            ruler = f"{ruler:{column}}{t} "
    return ruler.rstrip()


def print_schedule(schedule: Schedule, counts: Simulation, console: Console) -> None:
    """The drawing, what its signs mean, and what was counted."""
    console.print(draw(schedule, console.width), soft_wrap=True, end="")
    chunks = "; a, b, ... chunks of the stage" if schedule.chunks > 1 else ""
    console.print(f"F forward, B gradient of the input, W gradient of the weights, . idle{chunks}", style="dim")
    in_flight = ", ".join(map(str, counts.in_flight))
    awaiting = ", ".join(map(str, counts.awaiting_b))
    unit = "microbatches" if schedule.chunks == 1 else f"slices (1/{schedule.chunks} of a stage, one microbatch)"
    lines = (
        f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches, chunks a stage: {schedule.chunks}",
        f"ticks: {counts.ticks}; idle: {counts.idle_share:.1%}, of which inside the work of a stage at most {counts.idle_inside.max()} ticks",
        f"peak in flight by stage, in {unit}: {in_flight} until W, {awaiting} until B",
        f"sent to other stages: {counts.activations_sent} activations, {counts.gradients_sent} gradients",
        "buffers, rows a stage: " + ", ".join(f"{name} {rows}" for name, rows in counts.slots._asdict().items()),
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
