"""The display of a training run: a progress bar on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_SECONDS = 5.0


class TrainingConsole:
    """Reports to the terminal.

    Args:
        console: where to; a terminal gets a bar. Default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        # The first step that was reported, and when: evaluations before it must not count.
        self._first: tuple[int, float] | None = None
        self._printed = -PLAIN_SECONDS

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False)

    def start(self, step: int, steps: int) -> None:
        """Training goes from `step` to `steps`."""
        self._steps = steps
        self._first = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(None),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=steps, completed=step, status="evaluating")
            self._bar.start()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """`step` updates are done; the last batch had `loss`."""
        status = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if now - self._printed >= PLAIN_SECONDS or step == self._steps:
            self._printed = now
            line = f"step {step}/{self._steps}  {status}"
            first_step, started = self._first
            if step > first_step:
                left = (now - started) / (step - first_step) * (self._steps - step)
                line += f"  {duration(left)} left"
            self.note(line)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Show the losses of an evaluation."""
        self.note(
            f"step {record['step']}: val loss {record['val_loss']:.4f}"
            f"  (random batches: train {record['train_loss_estimate']:.4f},"
            f" val {record['val_loss_estimate']:.4f})"
        )

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finished(self, summary: Mapping[str, Any], sample: str, folder: Path) -> None:
        """Show the sample and the outcome."""
        self.note(f"\n{sample.strip()}\n")
        table = Table(show_header=False, box=None)
        for name, value in (
            ("val loss", f"{summary['val_loss']:.4f} nats per character"),
            ("best", f"{summary['best_val_loss']:.4f} after {summary['best_step']} steps"),
            ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s"),
            ("time", duration(summary["seconds"])),
            ("corpus", summary["corpus"]),
            ("run folder", str(folder)),
            ("loss plot", str(folder / "loss.png")),
            ("more text", f"python scripts/sample.py {folder}"),
        ):
            table.add_row(name, value)
        self._console.print(table, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time span in words, such as "3 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
