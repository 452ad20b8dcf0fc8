"""The tasks: what is classified, and the settings that suit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ember_ext.paper.data.cache import sha256
from ember_ext.paper.data.packages import SourceError
from ember_ext.paper.sequences.series import Scaling, SeriesSet
from ember_ext.paper.sequences.ts_files import TsError, TsFile, read_ts
from ember_ext.paper.sequences.vowels import vowels_folder
from ember_ext.paper.sequences.xor import Encoding, xor_series

TaskName = Literal["vowels", "xor"]

TRAIN_SEED, TEST_SEED = 1, 2
"""The sets of XOR are the same in all runs, as those of the published benchmark are."""


class TaskError(Exception):
    """A task that cannot be set up; the message says what to do."""


@dataclass(frozen=True)
class Task:
    """Series to train and to test with.

    Attributes:
        name: goes into the names of runs.
        train: the training set, as models take it.
        test: the test set, scaled as the training set was.
        classes: their names.
        details: what the data depend on, which a resumed run must have in common.
    """

    name: str
    train: SeriesSet
    test: SeriesSet
    classes: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


def vowels_task(
    drop: float = 0.0, seed: int = 0, notify: Callable[[str], None] = lambda text: None
) -> Task:
    """JapaneseVowels, fetched where needed.

    Args:
        drop: the fraction of the steps of each utterance that is dropped, in training and testing.
        seed: of what is dropped.
        notify: called with one line when something is fetched.

    Raises:
        TaskError: the data cannot be had, or `drop` is out of range.
    """
    try:
        folder = vowels_folder(notify)
    except SourceError as error:
        raise TaskError(
            f"no JapaneseVowels: {error}. Name a folder that has JapaneseVowels_TRAIN.ts and "
            "JapaneseVowels_TEST.ts with --data FOLDER"
        ) from None
    paths = tuple(folder / f"JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST"))
    return _task_of_files(paths, "vowels", drop, seed)


def folder_task(path: Path, drop: float = 0.0, seed: int = 0) -> Task:
    """Series of your own.

    Args:
        path: a folder with one file NAME_TRAIN.ts and one file NAME_TEST.ts, or either file.
        drop: as of `vowels_task`.
        seed: as of `vowels_task`.

    Raises:
        TaskError: files are missing, cannot be read or do not fit together, or `drop` is out of
            range.
    """
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise TaskError(f"cannot read --data {path}: No such file or folder")
    pattern = "*_TRAIN.ts"
    if path.is_file():
        stem = path.name.removesuffix("_TRAIN.ts").removesuffix("_TEST.ts")
        pattern = f"{stem}_TRAIN.ts"
    trains = sorted(folder.glob(pattern))
    if len(trains) != 1:
        raise TaskError(
            f"--data {path} must have one file {pattern}, got "
            f"{', '.join(t.name for t in trains) or 'none'}"
        )
    test = trains[0].with_name(trains[0].name.replace("_TRAIN.ts", "_TEST.ts"))
    task = _task_of_files((trains[0], test), trains[0].name.removesuffix("_TRAIN.ts"), drop, seed)
    # A run must not go on with files that were changed meanwhile.
    digest = sha256(trains[0].read_bytes() + test.read_bytes())
    return dataclasses.replace(task, details={**task.details, "data": digest})


def xor_task(encoding: Encoding = "event", rows: int = 100_000, time_unit: float = 1.0) -> Task:
    """Irregularly sampled XOR.

    Args:
        encoding: "event" or "dense".
        rows: streams to train with; a tenth of it, and no more than 10,000, is tested with.
        time_unit: bits that take one unit of time.

    Raises:
        TaskError: `rows` is below 10.
    """
    if rows < 10:
        raise TaskError(f"--rows must be at least 10, got {rows}")
    train = xor_series(rows, TRAIN_SEED, encoding, time_unit)
    test = xor_series(min(rows // 10, 10_000), TEST_SEED, encoding, time_unit)
    details = xor_details(encoding, rows, time_unit)
    return Task("xor", train, test, ("even", "odd"), details)


def xor_details(
    encoding: Encoding = "event", rows: int = 100_000, time_unit: float = 1.0
) -> dict[str, Any]:
    """The details of an `xor_task`, without drawing it."""
    return {"encoding": encoding, "rows": rows, "time_unit": time_unit}


def vowels_details(drop: float = 0.0) -> dict[str, Any]:
    """The details of a `vowels_task`, without reading it."""
    return {"drop": drop}


def _task_of_files(paths: tuple[Path, ...], name: str, drop: float, seed: int) -> Task:
    if not 0 <= drop < 1:
        raise TaskError(f"--drop must be from 0 on and below 1, got {drop}")
    try:
        train, test = (read_ts(path) for path in paths)
    except TsError as error:
        raise TaskError(str(error)) from None
    if set(test.classes) - set(train.classes):
        raise TaskError(
            f"{paths[1]}: its classes must be among {', '.join(train.classes)}, got "
            f"{', '.join(test.classes)}"
        )
    channels = [file.values[0].shape[1] for file in (train, test)]
    if channels[0] != channels[1]:
        raise TaskError(f"{paths[1]}: it must have {channels[0]} channels as {paths[0].name} has, "
                        f"got {channels[1]}")  # fmt: skip
    if (train.times is None) != (test.times is None):
        raise TaskError(f"{paths[1]}: both files must have time stamps, or neither")
    unit = _time_unit(train)
    sets = [
        _series(file, train.classes, unit).drop_steps(drop, 2 * seed + part)
        for part, file in enumerate((train, test))
    ]
    scaling = Scaling.of(sets[0])
    scaled_train, scaled_test = (scaling.apply(part) for part in sets)
    return Task(name, scaled_train, scaled_test, train.classes, vowels_details(drop))


def _time_unit(file: TsFile) -> float:
    """The mean time between two steps, which time spans are divided by."""
    if file.times is None:
        return 1.0
    gaps = torch.cat([times.diff() for times in file.times])
    return float(gaps.mean()) if len(gaps) else 1.0


def _series(file: TsFile, classes: tuple[str, ...], unit: float) -> SeriesSet:
    labels = [classes.index(label) for label in file.labels]
    if file.times is None:
        return SeriesSet.of(file.values, labels)
    # The first step has no step before it, so it gets the time span of a mean step.
    spans = [times.diff(prepend=times[:1] - unit) / unit for times in file.times]
    return SeriesSet.of(file.values, labels, spans)
