"""The study: every cell, with and without gates, over seeds; it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ember_ext.paper.runs.grid import other_configuration
from ember_ext.paper.sequences.models import CellName
from ember_ext.paper.sequences.results import (
    SequenceResult,
    read_results,
    run_name,
    write_result,
)
from ember_ext.paper.sequences.settings import model_settings, training_settings
from ember_ext.paper.sequences.tasks import (
    Task,
    TaskName,
    vowels_details,
    vowels_task,
    xor_details,
    xor_task,
)
from ember_ext.paper.sequences.training import InUseError, TrainingConfig, train_classifier
from ember_ext.paper.training import ConfigError

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
    runs/NAME.lock      whose lock the process holds that works on the run
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

    def result(self, name: str) -> Path:
        """The file with the result of a run."""
        return self.results / f"{name}.json"

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Hold a run while it is trained, its result is written and its folder is removed.

        Raises:
            InUseError: another process holds it.
        """
        path = self.path / "runs" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InUseError(f"{name} is left to the process that trains it") from None
        try:
            yield
            # Who opened the file before and gets its lock later finds the result.
            with suppress(OSError):
                path.unlink()
        finally:
            lock.release()


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
        All results of the task in the folder.

    Raises:
        ConfigError: a result in the folder has other settings than those asked for.
        TaskError: the data cannot be had.
        ResultError: a result is damaged.
        RunError: the folder of a run cannot be used, is damaged, or holds another run.
        NonFiniteLossError: a loss is not finite any more.
        OSError: the folder cannot be written.
    """
    read_study(task, folder, epochs=epochs, rows=rows)
    chosen = set(cells)
    runs = [run for run in planned(task, seeds) if not chosen or run[0].cell in chosen]
    tasks: dict[tuple[float, int], Task] = {}
    for number, (condition, seed) in enumerate(runs, 1):
        name = run_name(task, condition.cell, condition.gate, condition.drop, seed)
        if folder.result(name).exists():
            continue
        # What is dropped differs from seed to seed, and is the same for all cells of one.
        key = (condition.drop, seed if condition.drop else 0)
        if key not in tasks:
            tasks = {key: _task(task, condition.drop, seed, rows, notify), **tasks}
        try:
            with folder.claim(name):
                # Another process may have made it just now.
                if folder.result(name).exists():
                    continue
                result = _run(tasks[key], task, condition, seed, folder, epochs, device, notify)
                write_result(folder.results, result)
                shutil.rmtree(folder.run(name))
        except InUseError as error:
            notify(f"  {error}")
        else:
            notify(f"{number}/{len(runs)} {name}: {result.accuracy:.2f} %")
    return read_study(task, folder, epochs=epochs, rows=rows)


def read_study(
    task: TaskName, folder: StudyFolder, *, epochs: int | None = None, rows: int | None = None
) -> list[SequenceResult]:
    """All results of a task in a study's folder.

    Every one counts in tables and figures, so every one must have the settings of the study.

    Args:
        task: as of `run_study`.
        folder: as of `run_study`.
        epochs: as of `run_study`.
        rows: as of `run_study`.

    Raises:
        ConfigError: a result has other settings.
        ResultError: a result is damaged.
    """
    results = read_results(folder.results, task)
    for result in results:
        differences = differences_of(result, epochs, rows)
        if differences:
            path = folder.result(result.name)
            raise ConfigError(f"{other_configuration(path, differences)}: choose another --out")
    return results


def differences_of(
    result: SequenceResult, epochs: int | None = None, rows: int | None = None
) -> dict[str, tuple[Any, Any]]:
    """The settings in which a result and the study's run of that name differ, with both values.

    What the data alone decide, the numbers of channels and classes, is not compared.
    """
    condition = Condition(result.cell, result.gate, result.drop)  # type: ignore[arg-type]
    task: TaskName = result.task  # type: ignore[assignment]
    if condition not in CONDITIONS[task]:
        return {"condition": (result.name, "no run of the study")}
    sizes = (result.model.get("channels", 0), result.model.get("classes", 0))
    model = model_settings(task, condition.cell, *sizes, gate=condition.gate)
    training = _schedule(task, condition.cell, result.seed, epochs)
    details = vowels_details(result.drop)
    if task == "xor":
        details = xor_details() if rows is None else xor_details(rows=rows)
    return {
        **_differing(result.model, dataclasses.asdict(model)),
        **_differing(result.training, dataclasses.asdict(training)),
        **_differing(result.details, details),
    }


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (there.get(name), here.get(name)) for name in [*here, *there]}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def _schedule(task: TaskName, cell: CellName, seed: int, epochs: int | None) -> TrainingConfig:
    return training_settings(task, cell, seed=seed, epochs=epochs)


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
    folder: StudyFolder,
    epochs: int | None,
    device: str,
    notify: Callable[[str], None],
) -> SequenceResult:
    name = run_name(task, condition.cell, condition.gate, condition.drop, seed)
    sizes = (data.train.channels, len(data.classes))
    model = model_settings(task, condition.cell, *sizes, gate=condition.gate)
    training = _schedule(task, condition.cell, seed, epochs)
    outcome = train_classifier(
        data,
        model,
        training,
        folder=folder.run(name),
        device=device,
        notify=lambda line: notify(f"  {name}: {line}"),
    )
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
