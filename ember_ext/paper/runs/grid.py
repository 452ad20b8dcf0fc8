"""Carries out the runs of a suite: starts, watches, and goes on where an earlier call stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ember_ext.paper.data import Corpus
from ember_ext.paper.records import RecordError, check_record, parse_json
from ember_ext.paper.runs.executors import Executor, Job
from ember_ext.paper.runs.results import RunResult, read_result
from ember_ext.paper.runs.suites import RunSpec
from ember_ext.paper.runs.worker import GridFolder
from ember_ext.paper.training import ConfigError, StopRequested, TrainConfig
from ember_ext.paper.training.config import differing_fields
from ember_ext.paper.training.console import duration
from ember_ext.paper.training.signals import StopSignals

RunState = Literal["waiting", "running", "done", "failed"]

POLL_SECONDS = 0.5

RESULT_SECONDS = 10.0
"""The longest time that the result of a run that ended well may take to appear."""


@dataclass
class RunStatus:
    """The status of a run of the grid."""

    spec: RunSpec
    state: RunState = "waiting"
    step: int = 0
    """Updates made, as far as its metrics tell."""
    val_loss: float | None = None
    """The loss of its latest evaluation."""
    message: str = ""
    """Why it failed."""

    @property
    def steps_left(self) -> int:
        """Updates still to be made."""
        over = self.state in ("done", "failed")
        return 0 if over else max(0, self.spec.config.steps - self.step)


class Overview(Protocol):
    """A watcher of a grid."""

    def update(self, statuses: Sequence[RunStatus]) -> None:
        """The runs stand like this; called twice a second."""


class OutOfTime(Exception):  # noqa: N818 - stopping is no error
    """The time that a grid was given is over; what was under way goes on next time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"stopped after {duration(seconds)}")


class Grid:
    """The runs of a suite in a folder.

    Args:
        folder: where they are, or will be.
        specs: the runs.
        corpus: the text, the same for all; None if nothing is to be run.

    Raises:
        ConfigError: the folder holds a result of the same name from another configuration or text.
    """

    def __init__(self, folder: GridFolder, specs: Sequence[RunSpec], corpus: Corpus | None) -> None:
        self.folder = folder
        self.statuses = [RunStatus(spec) for spec in specs]
        self._tails: dict[str, _Tail] = {}
        self._ended: dict[str, float] = {}
        for status in self.statuses:
            self._look_for_result(status, corpus)

    def _look_for_result(self, status: RunStatus, corpus: Corpus | None) -> None:
        path = self.folder.result(status.spec.name)
        if not path.exists():
            return
        result = read_result(path)
        differences = differences_of(result, status.spec, path)
        if corpus is not None and result.corpus.get("sha256") != corpus.sha256:
            differences["corpus"] = (result.corpus["name"], corpus.name)
        if differences:
            raise ConfigError(f"{other_configuration(path, differences)}: choose another --out")
        status.state, status.step = "done", status.spec.config.steps
        status.val_loss = result.final()

    def run(
        self,
        executor: Executor,
        overview: Overview,
        *,
        seconds: float | None = None,
        drop_checkpoints: bool = False,
    ) -> None:
        """Carry out all that is not done. A run that fails does not keep the others from going on.

        Args:
            executor: starts the runs.
            overview: told of the progress.
            seconds: the time after which runs under way are stopped. Default: none.
            drop_checkpoints: remove those of every run that has a result.

        Raises:
            StopRequested: SIGINT or SIGTERM; the runs under way were stopped, and go on next time.
            OutOfTime: the seconds are over; likewise.
        """
        started = time.monotonic()
        if drop_checkpoints:
            self._drop_checkpoints()
        waiting = [status for status in self.statuses if status.state == "waiting"]
        running: list[tuple[RunStatus, Job]] = []
        with StopSignals() as signals:
            try:
                while waiting or running:
                    if signals.received:
                        raise StopRequested(signals.received)
                    if seconds is not None and time.monotonic() - started >= seconds:
                        raise OutOfTime(seconds)
                    while waiting and len(running) < executor.jobs:
                        status = waiting.pop(0)
                        status.state = "running"
                        running.append((status, executor.start(status.spec, self.folder.path)))
                    for status, job in running:
                        self._refresh(status, job)
                    if drop_checkpoints:
                        self._drop_checkpoints([s for s, _ in running])
                    running = [(s, job) for s, job in running if s.state == "running"]
                    overview.update(self.statuses)
                    if running:
                        time.sleep(POLL_SECONDS)
            finally:
                for _, job in running:
                    job.stop()
                for _, job in running:
                    job.wait()

    def _drop_checkpoints(self, statuses: Sequence[RunStatus] | None = None) -> None:
        for status in self.statuses if statuses is None else statuses:
            if status.state == "done":
                self.folder.run(status.spec.name).drop_checkpoints()

    @property
    def failures(self) -> dict[str, str]:
        """The runs that failed, and why."""
        return {s.spec.name: s.message for s in self.statuses if s.state == "failed"}

    def _refresh(self, status: RunStatus, job: Job) -> None:
        # Asked for before the files are read, so that nothing written before its end is missed.
        state = job.state()
        name = status.spec.name
        tail = self._tails.setdefault(name, _Tail(self.folder.run(name).metrics))
        for record in tail.read():
            if record["event"] == "step":
                status.step = record["step"] + 1
            else:
                status.val_loss = record.get("val_loss")
        if state == "running":
            return
        if state == "done" and self.folder.result(name).exists():
            status.state, status.step = "done", status.spec.config.steps
            return
        # On a shared file system a result can arrive after the scheduler's word.
        ended = self._ended.setdefault(name, time.monotonic())
        if state == "done" and time.monotonic() - ended < RESULT_SECONDS:
            return
        status.state = "failed"
        error = self.folder.error(name)
        status.message = (
            self.folder.failure(name)
            if error.exists()
            else f"it ended without a result; see {self.folder.log(name)}"
        )


def differences_of(result: RunResult, spec: RunSpec, path: Path) -> dict[str, tuple[Any, Any]]:
    """The fields in which a result and a run of that name would differ, with both values.

    Raises:
        ConfigError: the result, which is at `path`, has a configuration that no run can have.
    """
    try:
        recorded = TrainConfig(**result.config)
    except (ConfigError, TypeError) as error:
        raise ConfigError(
            f"{path} must be the result of a run of this version, got another's config: {error}"
        ) from None
    return differing_fields(recorded, spec.config)


def other_configuration(path: Path, differences: Mapping[str, tuple[Any, Any]]) -> str:
    """What is wrong with a result that is not of the run that was asked for."""
    named = ", ".join(f"{f} was {a!r} and is {b!r}" for f, (a, b) in differences.items())
    return f"{path} is of another configuration ({named})"


class _Tail:
    """The records that are added to a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                # A resumed run cuts off what its checkpoint does not cover.
                self._position = min(self._position, file.seek(0, os.SEEK_END))
                file.seek(self._position)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        records = []
        for line in whole.splitlines():
            # After such a cut the file may have grown past this place again, to mid-line.
            with suppress(RecordError):
                records.append(check_record(parse_json(line), {"event": str, "step": int}))
        return records
