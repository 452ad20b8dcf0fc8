"""The interface through which a training run tells how it goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Reporter(Protocol):
    """The audience of a run; `TrainingConsole` is one."""

    def note(self, text: str) -> None:
        """A line of text."""

    def start(self, step: int, steps: int) -> None:
        """Training begins at `step` of `steps`."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """One more update is done."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """The model was evaluated."""

    def stop(self) -> None:
        """Training ended or was stopped."""

    def finished(self, summary: Mapping[str, Any], sample: str, folder: Path) -> None:
        """The run is complete."""


class SilentReporter:
    """Tells nobody."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def start(self, step: int, steps: int) -> None:
        """Do nothing."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Do nothing."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def finished(self, summary: Mapping[str, Any], sample: str, folder: Path) -> None:
        """Do nothing."""
