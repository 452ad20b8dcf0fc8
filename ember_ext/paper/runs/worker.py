"""One run of a grid, from wherever it stands to its result; in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ember_ext.paper.data import CorpusError, load_text
from ember_ext.paper.files import write_atomically
from ember_ext.paper.records import RecordError, read_json
from ember_ext.paper.runs.results import RunResult, write_result
from ember_ext.paper.runs.suites import RunSpec
from ember_ext.paper.training import (
    ConfigError,
    NonFiniteLossError,
    RunError,
    RunFolder,
    StopRequested,
    train,
)

_EXPECTED = (ConfigError, CorpusError, NonFiniteLossError, RunError)
"""Errors whose message says it all."""


@dataclass(frozen=True)
class GridFolder:
    """The folder in which a grid keeps its files.

    runs/NAME/            each run's folder, with checkpoints
    runs/NAME/error.txt   why it failed, if it did
    runs/NAME/log.txt     what it printed
    results/NAME.json     what each finished run leaves
    plan.json             the names of all runs that were ever asked for
    report.html and more  see `ember_ext.paper.report`
    """

    path: Path

    def run(self, name: str) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.path / "runs" / name)

    def result(self, name: str) -> Path:
        """The result of a run."""
        return self.results / f"{name}.json"

    def error(self, name: str) -> Path:
        """The message of a run that failed."""
        return self.path / "runs" / name / "error.txt"

    def failure(self, name: str) -> str:
        """The text of a failed run's message."""
        return self.error(name).read_text(encoding="utf-8", errors="replace").strip()

    def log(self, name: str) -> Path:
        """The file with the output of a run."""
        return self.path / "runs" / name / "log.txt"

    @property
    def results(self) -> Path:
        """The folder of all results."""
        return self.path / "results"

    @property
    def planned(self) -> list[str]:
        """The names of all runs that were ever asked for, in that order.

        Raises:
            RunError: plan.json is damaged.
        """
        path = self.path / "plan.json"
        if not path.exists():
            return []
        try:
            names = read_json(path)
            if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise RecordError(f"expected a list of texts, got {names!r:.60}")
        except RecordError as error:
            raise RunError(f"{path} is not a list of the names of runs: {error}") from None
        return names

    def planned_with(self, names: Iterable[str]) -> list[str]:
        """`planned`, and those of some runs that are not among them."""
        return list(dict.fromkeys([*self.planned, *names]))

    def plan(self, names: Iterable[str]) -> None:
        """Add runs to those that were asked for."""
        content = json.dumps(self.planned_with(names), indent=1)
        write_atomically(self.path / "plan.json", f"{content}\n".encode())

    def failures(self) -> dict[str, str]:
        """The planned runs that failed when they were last tried, and why."""
        return {
            name: self.failure(name)
            for name in self.planned
            if self.error(name).exists() and not self.result(name).exists()
        }


def run_to_result(spec: RunSpec, path: str, threads: int) -> None:
    """Start or continue a run, and write its result, or into its error.txt why there is none.

    Args:
        spec: which.
        path: the folder of the grid.
        threads: of the CPU.

    Raises:
        ConfigError, CorpusError, RunError, NonFiniteLossError: as `training.train`.
        StopRequested: SIGINT or SIGTERM; a checkpoint was written.
    """
    torch.set_num_threads(threads)
    grid = GridFolder(Path(path))
    grid.error(spec.name).unlink(missing_ok=True)
    try:
        result = _train(spec, grid.run(spec.name))
    except StopRequested:
        raise
    except _EXPECTED as error:
        write_atomically(grid.error(spec.name), f"{error}\n".encode("utf-8", "backslashreplace"))
        raise
    except Exception:
        write_atomically(grid.error(spec.name), traceback.format_exc().encode())
        raise
    write_result(grid.result(spec.name), result)


def _train(spec: RunSpec, folder: RunFolder) -> RunResult:
    corpus = load_text(data=spec.config.data)
    if spec.corpus not in (None, corpus.sha256):
        raise CorpusError(
            f"this run's process came by the text {corpus.name}, which is not that of the grid: "
            "name one file for all with --data"
        )
    summary = train(spec.config, corpus, folder, resume=folder.exists())
    evaluations = [r for r in folder.read_metrics() if r.pop("event") == "evaluation"]
    source = {"name": corpus.name, "sha256": corpus.sha256, "vocabulary": len(corpus.vocabulary)}
    # A scheduler's machine may have other devices than the one that submits.
    recorded = {**dataclasses.asdict(spec.config), "device": summary["device"]}
    del recorded["data"]  # A path of this machine; `source` names the text.
    return RunResult(spec.variant, recorded, source, summary, evaluations)


def run_in_process(spec: RunSpec, path: str, threads: int) -> None:
    """`run_to_result` as all that a process does; its exit code tells how it ended.

    What is printed goes to the run's log.txt. Ctrl-C does not reach this process: its parent passes
    on what it gets. Without a parent it stops as on SIGTERM.
    """
    log = GridFolder(Path(path)).log(spec.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setpgrp()
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        run_to_result(spec, path, threads)
    except StopRequested as stop:
        sys.exit(stop.exit_code)
    except Exception:
        sys.exit(1)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


class SubmittedRun:
    """A run as submitit hands it to a scheduler; one that runs out of time is queued again."""

    def __init__(self, spec: RunSpec, path: str, threads: int) -> None:
        self.arguments = (spec, path, threads)

    def __call__(self) -> None:
        """Do the work."""
        run_to_result(*self.arguments)

    def checkpoint(self) -> Any:
        """The rest of the work, which submitit asks for shortly before the time is up."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(SubmittedRun(*self.arguments))
