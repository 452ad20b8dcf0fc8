"""The study: every cell, with and without gates, over seeds; it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ember_ext.paper.sequences.models import CellName
from ember_ext.paper.sequences.results import (
    SequenceResult,
    read_results,
    run_name,
    write_result,
)
from ember_ext.paper.sequences.settings import model_settings, training_settings
from ember_ext.paper.sequences.tasks import Task, TaskName, vowels_task, xor_task
from ember_ext.paper.sequences.training import train_classifier
from ember_ext.paper.training import RunError

DROPPED = 0.5
"""The share of the steps that the irregularly sampled conditions lose."""


@dataclass(frozen=True)
class Condition:
    """What is compared.

    Attributes:
        cell: see `ClassifierConfig`.
        gate: whether each layer has a LIF gate.
        drop: the share of the steps that is dropped.
    """

    cell: CellName
    gate: bool = False
    drop: float = 0.0


_VOWEL_CELLS: tuple[CellName, ...] = ("cfc", "ltc", "gru", "lstm")
_XOR_CELLS: tuple[CellName, ...] = ("cfc", "cfc-mixed", "ltc", "gru", "lstm")

CONDITIONS: dict[TaskName, tuple[Condition, ...]] = {
    "vowels": tuple(
        Condition(cell, gate, drop)
        for drop in (0.0, DROPPED)
        for cell in _VOWEL_CELLS
        for gate in (False, True)
    ),
    "xor": tuple(Condition(cell) for cell in _XOR_CELLS),
}

SEEDS: dict[TaskName, int] = {"vowels": 10, "xor": 5}
"""How many seeds, from 0 on."""


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study.

    results/NAME.json   what each finished run leaves
    runs/NAME/          runs that were stopped, with their checkpoints
    table.csv and more  see `summary`
    """

    path: Path

    @property
    def results(self) -> Path:
        """The folder of all results."""
        return self.path / "results"

    def run(self, name: str) -> Path:
        """The folder of a run that is not finished."""
        return self.path / "runs" / name


def planned(task: TaskName, seeds: Iterable[int]) -> list[tuple[Condition, int]]:
    """All runs, seed by seed, so that a study that is cut off has whole seeds."""
    return [(condition, seed) for seed in seeds for condition in CONDITIONS[task]]


def run_study(
    task: TaskName,
    seeds: Iterable[int],
    folder: StudyFolder,
    *,
    epochs: int | None = None,
    rows: int | None = None,
    cells: Iterable[CellName] = (),
    device: str = "cpu",
    notify: Callable[[str], None] = print,
) -> list[SequenceResult]:
    """Make the runs that have no result yet.

    Several processes may work on one folder: a run that another process trains is left to it.

    Args:
        task: "vowels" or "xor".
        seeds: of the runs.
        folder: where results are and come.
        epochs: in place of the study's own.
        rows: streams of XOR to train with, in place of the study's own.
        cells: only these. Default: all.
        device: a torch device.
        notify: called with a line for each run.

    Returns:
        All results in the folder.

    Raises:
        TaskError: the data cannot be had.
        ResultError: a result is damaged.
        NonFiniteLossError: a loss is not finite any more.
    """
    chosen = set(cells)
    runs = [run for run in planned(task, seeds) if not chosen or run[0].cell in chosen]
    tasks: dict[tuple[float, int], Task] = {}
    for number, (condition, seed) in enumerate(runs, 1):
        name = run_name(task, condition.cell, condition.gate, condition.drop, seed)
        if (folder.results / f"{name}.json").exists():
            continue
        # What is dropped differs from seed to seed, and is the same for all cells of one.
        key = (condition.drop, seed if condition.drop else 0)
        if key not in tasks:
            tasks = {key: _task(task, condition.drop, seed, rows, notify), **tasks}
        result = _run(tasks[key], task, condition, seed, folder.run(name), epochs, device, notify)
        if result is not None:
            write_result(folder.results, result)
            shutil.rmtree(folder.run(name))
            notify(f"{number}/{len(runs)} {name}: {result.accuracy:.2f} %")
    return read_results(folder.results)


def _task(
    task: TaskName, drop: float, seed: int, rows: int | None, notify: Callable[[str], None]
) -> Task:
    if task == "vowels":
        return vowels_task(drop, seed, notify)
    return xor_task() if rows is None else xor_task(rows=rows)


def _run(
    data: Task,
    task: TaskName,
    condition: Condition,
    seed: int,
    folder: Path,
    epochs: int | None,
    device: str,
    notify: Callable[[str], None],
) -> SequenceResult | None:
    """The result of a run; None if another process trains it."""
    sizes = (data.train.channels, len(data.classes))
    model = model_settings(task, condition.cell, *sizes, gate=condition.gate)
    training = training_settings(task, condition.cell, seed=seed)
    if epochs is not None:
        training = dataclasses.replace(training, epochs=epochs)
    try:
        outcome = train_classifier(
            data,
            model,
            training,
            folder=folder,
            device=device,
            notify=lambda line: notify(f"  {folder.name}: {line}"),
        )
    except RunError as error:
        notify(f"  {error}")
        return None
    return SequenceResult(
        task=task,
        cell=condition.cell,
        gate=condition.gate,
        drop=condition.drop,
        seed=seed,
        model=dataclasses.asdict(model),
        training=dataclasses.asdict(training),
        details=dict(data.details),
        outcome=dataclasses.asdict(outcome),
    )
