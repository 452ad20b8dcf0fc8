"""The display of a grid: a table that keeps up on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ember_ext.paper.runs.grid import RunState, RunStatus
from ember_ext.paper.training.console import duration

PLAIN_SECONDS = 60.0

_STYLES: dict[RunState, str] = {
    "waiting": "dim", "running": "bold", "done": "green", "failed": "bold red",
}  # fmt: skip


class GridConsole:
    """Shows every run, how many are done, and the time left; to be used as a context manager.

    Args:
        console: where to. Default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._started = time.monotonic()
        self._steps_at_start: int | None = None
        self._states: dict[str, RunState] = {}
        self._printed = self._started

    def __enter__(self) -> GridConsole:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, statuses: Sequence[RunStatus]) -> None:
        """See `Overview.update`."""
        left = sum(status.steps_left for status in statuses)
        if self._steps_at_start is None:
            self._steps_at_start = left
        summary = self._summary(statuses, self._steps_at_start - left, left)
        if self._live is not None:
            self._live.update(Group(_table(statuses), Text(summary)), refresh=True)
            return
        for status in statuses:
            name = status.spec.name
            if status.state != self._states.get(name, "waiting"):
                self._states[name] = status.state
                self.console.print(_line(status), markup=False)
        if time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.console.print(summary, markup=False)

    def _summary(self, statuses: Sequence[RunStatus], made: int, left: int) -> str:
        counts = {state: sum(s.state == state for s in statuses) for state in _STYLES}
        text = f"{counts['done']} of {len(statuses)} runs done, {counts['running']} running"
        if counts["failed"]:
            text += f", {counts['failed']} failed"
        spent = time.monotonic() - self._started
        text += f"; {duration(spent)}"
        # Steps of different models cost different times, so this is a guess.
        if made > 0 and left > 0:
            text += f", about {duration(spent / made * left)} left"
        return text


def _table(statuses: Sequence[RunStatus]) -> Table:
    table = Table("run", "state", box=None)
    for column in ("step", "val loss"):
        table.add_column(column, justify="right")
    for status in statuses:
        loss = "" if status.val_loss is None else f"{status.val_loss:.4f}"
        steps = f"{status.step}/{status.spec.config.steps}"
        style = _STYLES[status.state]
        table.add_row(status.spec.name, status.state, steps, loss, style=style)
    return table


def _line(status: RunStatus) -> str:
    text = f"{status.spec.name}: {status.state}"
    if status.state == "done" and status.val_loss is not None:
        text += f", val loss {status.val_loss:.4f}"
    if status.message:
        text += f": {status.message}"
    return text
