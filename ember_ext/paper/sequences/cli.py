"""The command line of `scripts/classify.py`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ember_ext._command_line import (
    ABOVE_ZERO,
    Expectation,
    FlagError,
    at_least,
    prepare_output,
    refuse_empty,
    require,
    within,
)
from ember_ext.paper.files import write_atomically
from ember_ext.paper.runs.results import ResultError
from ember_ext.paper.sequences.confusion import plot_confusion
from ember_ext.paper.sequences.models import CellName, Pooling
from ember_ext.paper.sequences.settings import model_settings, training_settings
from ember_ext.paper.sequences.tasks import (
    Task,
    TaskError,
    TaskName,
    folder_task,
    vowels_task,
    xor_task,
)
from ember_ext.paper.sequences.training import Outcome, train_classifier
from ember_ext.paper.sequences.xor import Encoding
from ember_ext.paper.training import (
    ConfigError,
    NonFiniteLossError,
    RunError,
    resolve_device,
)

_ERRORS = (ConfigError, FlagError, NonFiniteLossError, OSError, ResultError, RunError, TaskError)

_A_SEED = Expectation("from -2**62 to 2**63 - 1", lambda value: -(2**62) <= value < 2**63)
"""What is dropped has twice the seed, which torch's generators must take, too."""

_A_SHARE = Expectation("from 0 on and below 1", lambda value: 0 <= value < 1)

Mode = Literal["vowels", "xor", "data", "study of vowels", "study of xor", "times"]

_RUNS: frozenset[Mode] = frozenset({"vowels", "xor", "data"})
_STUDIES: frozenset[Mode] = frozenset({"study of vowels", "study of xor"})

_USED_IN: dict[str, frozenset[Mode]] = {
    "--data": frozenset({"data"}),
    "--cell": _RUNS,
    "--gate": _RUNS,
    "--drop": _RUNS,
    "--seed": _RUNS,
    "--epochs": _RUNS | _STUDIES,
    "--units": _RUNS,
    "--layers": _RUNS,
    "--pooling": _RUNS,
    "--dropout": _RUNS,
    "--batch-size": _RUNS,
    "--learning-rate": _RUNS,
    "--weight-decay": _RUNS,
    "--curriculum": _RUNS,
    "--noise": _RUNS,
    "--validation": _RUNS,
    "--encoding": frozenset({"xor"}),
    "--rows": frozenset({"xor", "study of xor", "times"}),
    "--device": _RUNS | _STUDIES,
    "--study": _STUDIES,
    "--cells": _STUDIES,
    "--seeds": _STUDIES,
}
"""The modes in which a flag has an effect. Those that are not here have one in all."""

_MODE_WORDS: dict[Mode, str] = {
    "vowels": "a single run of --task vowels",
    "xor": "a single run of --task xor",
    "data": "--data",
    "study of vowels": "--study of --task vowels",
    "study of xor": "--study of --task xor",
    "times": "--times",
}


@dataclass(frozen=True)
class ClassifyArguments:
    """Classify sequences: who speaks in JapaneseVowels, irregularly sampled XOR, or your own.

    A run or a study that was stopped goes on when it is called again. A flag that would have no
    effect is an error.
    """

    task: TaskName = "vowels"
    """"vowels" is JapaneseVowels, which is fetched once; "xor" is drawn."""
    data: Path | None = None
    """A folder with NAME_TRAIN.ts and NAME_TEST.ts, or either file, in place of the task's data."""
    cell: CellName = "cfc"
    """"cfc-mixed" is a CfC with mixed memory."""
    gate: bool = False
    """A LIF gate after each layer."""
    drop: float = 0.0
    """Drop this share of each series' steps at random, and pass the true time spans."""
    seed: int = 0
    """Of weights, batches, dropout and dropped steps."""
    epochs: int | None = None
    """Default: what suits the task, as for the flags up to --noise."""
    units: int | None = None
    """Of each layer."""
    layers: int | None = None
    """How many."""
    pooling: Pooling | None = None
    """Classify by the mean over all steps, or by the last."""
    dropout: float | None = None
    """Rate before the last layer."""
    batch_size: int | None = None
    """Series of an update."""
    learning_rate: float | None = None
    """Of AdamW."""
    weight_decay: float | None = None
    """Of AdamW."""
    curriculum: float | None = None
    """Begin with the shortest series, and let in longer ones whenever the running accuracy exceeds
    this; 0 for none."""
    noise: float | None = None
    """Standard deviation of the noise that training adds to the scaled values."""
    validation: float = 0.0
    """Keep this share of the training set out, and test with it and not with the test set: to
    choose settings."""
    encoding: Encoding = "event"
    """Of XOR: "event" has a step where the bit changes, "dense" one for each bit."""
    rows: int = 100_000
    """Streams of XOR to train with; a tenth of it, up to 10,000, is tested with."""
    out: Path | None = None
    """The run's folder. Default: one under runs/. With --study: runs/study-TASK."""
    device: str = "cpu"
    """A torch device; "auto" is CUDA where there is one."""
    threads: int = 1
    """On a CPU. Such small networks gain little from more."""
    study: bool = False
    """Run all cells, with and without gates, over --seeds seeds; write results, table and figure
    to --out."""
    cells: tuple[CellName, ...] = ()
    """With --study: only these. Default: all."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --study: seeds from 0 on. Default: 10 for "vowels", 5 for "xor"."""
    times: bool = False
    """Time an epoch of XOR with our layers and with those of ncps in turns; write times.csv to
    --out."""


def classify_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/classify.py`; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    prepare_output()
    try:
        refuse_empty(arguments)
        options = tyro.cli(ClassifyArguments, args=arguments, prog="classify.py")
        _check(options)
        _check_effect(options, arguments)
        threads = torch.get_num_threads()
        torch.set_num_threads(options.threads)
        try:
            _run(options)
        finally:
            torch.set_num_threads(threads)
    except _ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "begins anew" if "--times" in arguments else "goes on"
        print(f"stopped; the same command {again}", file=sys.stderr)
        return 130
    return 0


def _check(options: ClassifyArguments) -> None:
    require("--seed", options.seed, _A_SEED)
    shares = (
        ("--drop", options.drop),
        ("--validation", options.validation),
        ("--dropout", options.dropout),
        ("--curriculum", options.curriculum),
    )
    for flag, share in shares:
        require(flag, share, _A_SHARE)
    counts = (
        ("--epochs", options.epochs),
        ("--units", options.units),
        ("--layers", options.layers),
        ("--batch-size", options.batch_size),
        ("--seeds", options.seeds),
        ("--threads", options.threads),
    )
    for flag, count in counts:
        require(flag, count, at_least(1))
    require("--learning-rate", options.learning_rate, ABOVE_ZERO)
    require("--weight-decay", options.weight_decay, at_least(0))
    require("--noise", options.noise, at_least(0))
    require("--rows", options.rows, within(10, 10_000_000))
    if _mode(options) == "xor" and options.drop:
        raise FlagError(f"--drop must be 0 with --task xor, got {options.drop}: its time spans are "
                        "irregular already")  # fmt: skip
    if options.times and options.task != "xor":
        raise FlagError(f"--times must come with --task xor, got --task {options.task}")


def _check_effect(options: ClassifyArguments, arguments: Sequence[str]) -> None:
    """Make sure that every flag that was given has an effect.

    Flags are looked for among the arguments: a value that is the default is asked for all the same.
    """
    mode = _mode(options)
    given = [a.partition("=")[0].replace("_", "-") for a in arguments if a.startswith("--")]
    for flag in given:
        name = f"--{flag[5:]}" if flag.startswith("--no-") else flag
        if mode not in _USED_IN.get(name, {mode}):
            value = getattr(options, name[2:].replace("-", "_"))
            raise FlagError(f"{name} must be left out with {_MODE_WORDS[mode]}, where it has no "
                            f"effect, got {value}")  # fmt: skip


def _mode(options: ClassifyArguments) -> Mode:
    if options.times:
        return "times"
    if options.study:
        return "study of xor" if options.task == "xor" else "study of vowels"
    # Data of one's own and XOR contradict each other: the flag for the data is the error.
    return "data" if options.data is not None and options.task != "xor" else options.task


def _run(options: ClassifyArguments) -> None:
    if options.study or options.times:
        _study(options)
        return
    task = _task(options)
    sizes = (task.train.channels, len(task.classes))
    model = model_settings(
        options.task,
        options.cell,
        *sizes,
        gate=options.gate,
        units=options.units,
        layers=options.layers,
        pooling=options.pooling,
        dropout=options.dropout,
    )
    training = training_settings(
        options.task,
        options.cell,
        seed=options.seed,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        curriculum=options.curriculum,
        noise=options.noise,
        validation=options.validation,
    )
    folder = options.out or Path("runs", _name(options, task))
    counts = f"{len(task.train)} series to train with, {len(task.test)} to test with"
    print(f"{task.name}: {counts}, {sizes[0]} channels, {sizes[1]} classes")
    device = resolve_device(options.device)
    try:
        outcome = train_classifier(
            task, model, training, folder=folder, device=device, notify=print
        )
    except ValueError as error:
        raise TaskError(str(error)) from None
    _report(outcome, folder, f"{task.name}, {options.cell}{', LIF gate' * options.gate}")


def _task(options: ClassifyArguments) -> Task:
    if options.data is not None:
        return folder_task(options.data, options.drop, options.seed)
    if options.task == "xor":
        return xor_task(options.encoding, options.rows)
    return vowels_task(options.drop, options.seed, print)


def _name(options: ClassifyArguments, task: Task) -> str:
    parts: list[Any] = [task.name, options.cell, *(["gate"] if options.gate else [])]
    parts += [f"drop{options.drop:g}"] if options.drop else []
    parts += [options.encoding] if options.encoding != "event" else []
    parts += [f"validation{options.validation:g}"] if options.validation else []
    return "-".join([*parts, f"seed{options.seed}"])


def _report(outcome: Outcome, folder: Path, title: str) -> None:
    picture = folder / "confusion.png"
    write_atomically(picture, plot_confusion(outcome.confusion, outcome.classes, title))
    total = sum(map(sum, outcome.confusion))
    right = round(outcome.accuracy * total)
    print(f"{outcome.tested} accuracy  {outcome.accuracy:.2%} ({right} of {total})")
    print(f"{outcome.tested} loss      {outcome.loss:.4f} nats")
    print(f"an epoch       {outcome.seconds_per_epoch:.3f} s")
    print(f"parameters     {outcome.parameters:,}")
    print(f"confusion      {picture}")


def _study(options: ClassifyArguments) -> None:
    # These need scipy, which training does not.
    try:
        from ember_ext.paper.sequences.study import CONDITIONS, SEEDS, StudyFolder, run_study
        from ember_ext.paper.sequences.summary import as_csv, write_summary
        from ember_ext.paper.sequences.timing import time_epochs
    except ModuleNotFoundError as error:
        raise FlagError(
            f'a study needs {error.name}; install it with: pip install ".[paper]"'
        ) from None

    known = list(dict.fromkeys(condition.cell for condition in CONDITIONS[options.task]))
    for cell in options.cells:
        if cell not in known:
            raise FlagError(
                f"--cells must be among {', '.join(known)} with --task {options.task}, got {cell}"
            )
    folder = StudyFolder(options.out or Path("runs", f"study-{options.task}"))
    _check_writable(folder.path)
    if options.times:
        times = as_csv(time_epochs(options.rows, notify=print))
        write_atomically(folder.path / "times.csv", times)
        return
    count = SEEDS[options.task] if options.seeds is None else options.seeds
    results = run_study(
        options.task,
        range(count),
        folder,
        epochs=options.epochs,
        rows=options.rows if options.task == "xor" else None,
        cells=options.cells,
        device=resolve_device(options.device),
        notify=lambda line: print(line, flush=True),
    )
    if results:
        write_summary(options.task, results, folder)
        print(f"table and figure in {folder.path}")
    else:
        print("other processes make all of the runs: there is no result yet")


def _check_writable(folder: Path) -> None:
    """Make sure that a folder can be written, before hours of work.

    Raises:
        FlagError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FlagError(f"--out must be a folder that can be written, got {folder}: "
                        f"{error.strerror}") from None  # fmt: skip
