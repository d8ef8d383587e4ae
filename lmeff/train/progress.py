"""Progress on the terminal: a bar with loss, tokens/s and time left, or plain lines where nobody watches."""

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(Protocol):
    """What the loop tells: `update` at every logged step, `tell` for a line in between, `close` at the end."""

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None: ...

    def tell(self, line: str) -> None: ...

    def close(self) -> None: ...


class BarProgress:
    """A live bar, for a terminal."""

    def __init__(self, name: str, steps: int, console: Console) -> None:
        """Shows the bar at once: compilation comes first and takes a while."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._bar = Bar(*columns, TimeRemainingColumn(), console=console)
        self._name, self._console = name, console
        self._task = self._bar.add_task(name, total=steps, told="compiling")
        self._bar.start()

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, told=f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s")

    def tell(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(f"{self._name}: {line}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()


class LineProgress:
    """A plain line at every tenth of the way, for logs."""

    def __init__(self, name: str, steps: int, console: Console) -> None:
        """Prints nothing yet."""
        self._name, self._steps, self._console = name, steps, console
        self._next = 1

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Prints a line where a tenth has passed since the last one."""
        if step < self._next and step != self._steps:
            return
        self._next = step + max(self._steps // 10, 1)
        self._console.print(
            f"{self._name}: step {step}/{self._steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s",
            highlight=False,
        )

    def tell(self, line: str) -> None:
        """Prints a line."""
        self._console.print(f"{self._name}: {line}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is open."""


def make_progress(name: str, steps: int, console: Console) -> Progress:
    """A bar on a terminal, lines elsewhere."""
    return BarProgress(name, steps, console) if console.is_terminal else LineProgress(name, steps, console)
