"""Training a classifier: a fixed schedule, which no look at the test set ends or chooses."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn import functional as F

from ember_ext._machine import machine
from ember_ext.paper.files import remove_leftovers, write_atomically
from ember_ext.paper.records import RecordError, check_record, parse_json, read_json
from ember_ext.paper.sequences.batches import Sampler
from ember_ext.paper.sequences.models import ClassifierConfig, SequenceClassifier
from ember_ext.paper.sequences.series import SeriesSet
from ember_ext.paper.sequences.tasks import Task
from ember_ext.paper.training import NonFiniteLossError, RunError
from ember_ext.paper.training.checkpoint import (
    check_model,
    model_tensors,
    optimizer_states,
    plain,
    restore,
)

EVALUATION_ROWS = 1000
"""Series that are classified at once."""

CHECKPOINT_SECONDS = 20.0
"""A run that is shorter leaves no checkpoint: it is as quick to repeat."""


class InUseError(RunError):
    """Another process works on a run."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a classifier is trained.

    Attributes:
        epochs: how many. An epoch has as many updates as it takes to see every series once.
        batch_size: series of an update.
        learning_rate: of AdamW.
        decay: the share of the updates, at the end, over which the learning rate falls to 0, as
            half a cosine wave does.
        weight_decay: of AdamW.
        clip: the largest norm of the gradient.
        noise: standard deviation of the noise that is added to each value in training, which keeps
            a small set from being learnt by heart.
        curriculum: the running accuracy at which longer series are let in, see `batches.Sampler`;
            0 for training with all series from the start.
        validation: the share of the training set that is kept out of training. The classifier is
            tested with it, and the test set is not touched.
        seed: of weights, batches, dropout and what is kept out.
    """

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 5e-3
    decay: float = 1.0
    weight_decay: float = 1e-2
    clip: float = 1.0
    noise: float = 0.0
    curriculum: float = 0.0
    validation: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        accuracy: the share of the tested series that got their class.
        loss: mean cross-entropy over them, in nats.
        tested: "test", or "validation".
        confusion: for each true class the number of series by class given.
        classes: names of the classes.
        parameters: trainable ones.
        updates: how many were made.
        seconds_per_epoch: the median.
        curve: for each epoch the mean loss and accuracy over its batches, and the most steps that a
            series of its last batch could have.
        machine: what it ran on.
    """

    accuracy: float
    loss: float
    tested: str
    confusion: list[list[int]]
    classes: list[str]
    parameters: int
    updates: int
    seconds_per_epoch: float
    curve: list[list[float]]
    machine: str


_OUTCOME = {
    "accuracy": float, "loss": float, "tested": str, "confusion": list, "classes": list,
    "parameters": int, "updates": int, "seconds_per_epoch": float, "curve": list, "machine": str,
}  # fmt: skip


def train_classifier(
    task: Task,
    model_config: ClassifierConfig,
    config: TrainingConfig,
    *,
    folder: Path | None = None,
    device: str = "cpu",
    notify: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Train a classifier and test it once, at the end.

    A run that was stopped goes on from its folder, on a CPU with the same bits, and one that is
    finished gives its outcome again.

    Args:
        task: what to learn.
        model_config: the classifier.
        config: the schedule.
        folder: where its checkpoint and outcome are kept. Default: nowhere.
        device: a torch device.
        notify: called with a line for each epoch, at most every few seconds.

    Raises:
        InUseError: another process trains in the folder.
        RunError: the folder cannot be used, is damaged, or holds another run.
        NonFiniteLossError: the loss is not finite any more.
    """
    where = machine(torch.device(device))
    description = {
        "task": task.name,
        "details": dict(task.details),
        "model": dataclasses.asdict(model_config),
        "training": dataclasses.asdict(config),
    }
    if folder is None:
        return _Training(task, model_config, config, torch.device(device), notify).run()
    kept = _Folder(folder, description, where)
    with kept.claim():
        outcome = kept.outcome()
        if outcome is not None:
            notify(f"finished earlier, on {outcome.machine}")
        elif kept.begun_on not in (None, where):
            notify(f"begun on {kept.begun_on}, now on {where}: the numbers may differ a little")
        if outcome is None:
            training = _Training(task, model_config, config, torch.device(device), notify)
            outcome = training.run(kept)
            kept.finish(outcome)
    return outcome


def initial_model(config: ClassifierConfig, seed: int) -> SequenceClassifier:
    """The classifier with the initial weights of a seed; torch's own generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceClassifier(config)


def split(series: SeriesSet, fraction: float, seed: int) -> tuple[SeriesSet, SeriesSet]:
    """Set a share of the series of every class aside, one at least; the rest comes first.

    Raises:
        ValueError: a class has one series only.
    """
    generator = torch.Generator().manual_seed(seed)
    aside = torch.zeros(len(series), dtype=torch.bool)
    for label in series.labels.unique():
        rows = torch.nonzero(series.labels == label)[:, 0]
        if len(rows) < 2:
            raise ValueError(f"class {int(label)} must have two series or more to be split, got 1")
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        aside[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    kept, tested = (torch.nonzero(which)[:, 0] for which in (~aside, aside))
    return series.subset(kept), series.subset(tested)


@torch.no_grad()
def evaluate(model: nn.Module, series: SeriesSet, classes: int) -> tuple[float, list[list[int]]]:
    """The mean loss of a classifier, and its confusion matrix (true classes are the rows)."""
    model.eval()
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    loss = 0.0
    for rows in torch.arange(len(series)).split(EVALUATION_ROWS):
        batch = series.subset(rows.to(series.labels.device))
        logits = model(batch.x, batch.timespans, batch.lengths)
        loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        pairs = (batch.labels * classes + logits.argmax(1)).cpu()
        confusion += pairs.bincount(minlength=classes**2).view(classes, classes)
    return loss / len(series), confusion.tolist()


class _Folder:
    """The files of a run: run.json says what it is, then last.safetensors, then outcome.json."""

    def __init__(self, path: Path, description: dict[str, Any], where: str) -> None:
        self._path = path
        self._description = description
        self._where = where
        self.begun_on: str | None = None
        """The machine and the versions of the call that began the run, where they are known."""

    @contextmanager
    def claim(self) -> Iterator[None]:
        lock = FileLock(self._path / ".lock", timeout=0)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise InUseError(f"{self._path} is in use: another process trains there") from None
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}") from error
        try:
            remove_leftovers(self._path)
            self._check()
            yield
        finally:
            lock.release()

    def _check(self) -> None:
        """Make sure that the run here is this one; a folder without a run becomes one of it."""
        file = self._path / "run.json"
        if not file.exists():
            content = {**self._description, "machine": self._where}
            write_atomically(file, json.dumps(content, indent=2).encode())
            return
        try:
            there = read_json(file)
        except RecordError as error:
            raise RunError(f"{file}: {error}") from None
        # A run may go on elsewhere.
        if isinstance(there, dict):
            self.begun_on = there.pop("machine", None)
        if there != json.loads(json.dumps(self._description)):
            names = ", ".join(_differences(there, self._description)) or "all"
            raise RunError(
                f"{self._path} holds another run, which differs in {names}: choose another folder "
                "with --out"
            )

    def outcome(self) -> Outcome | None:
        file = self._path / "outcome.json"
        if not file.exists():
            return None
        try:
            return Outcome(**check_record(read_json(file), _OUTCOME, exact=True))
        except RecordError as error:
            raise RunError(f"{file}: {error}") from None

    def finish(self, outcome: Outcome) -> None:
        content = json.dumps(dataclasses.asdict(outcome), indent=2)
        write_atomically(self._path / "outcome.json", content.encode())
        (self._path / "last.safetensors").unlink(missing_ok=True)

    def save(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        header = {"progress": json.dumps(progress)}
        content = safetensors.torch.save(plain(tensors), header)
        write_atomically(self._path / "last.safetensors", content)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        file = self._path / "last.safetensors"
        if not file.exists():
            return None
        try:
            with safetensors.safe_open(file, "pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
                header = content.metadata() or {}
            fields = {"epoch": int, "updates": int, "seconds": list, "curve": list, "sampler": dict}
            progress = check_record(parse_json(header.get("progress", "")), fields, exact=True)
        except (RecordError, safetensors.SafetensorError) as error:
            raise RunError(f"{file} is damaged ({error}): remove it to start anew") from None
        return tensors, progress


def _differences(there: Any, here: dict[str, Any]) -> list[str]:
    """The names of the settings in which two descriptions of runs differ."""
    names = []
    for part, fields in here.items():
        other = there.get(part) if isinstance(there, dict) else None
        if not isinstance(fields, dict) or not isinstance(other, dict):
            names += [] if other == fields else [part]
            continue
        every = sorted(fields.keys() | other.keys())
        names += [name for name in every if fields.get(name) != other.get(name)]
    return names


class _Training:
    def __init__(
        self,
        task: Task,
        model_config: ClassifierConfig,
        config: TrainingConfig,
        device: torch.device,
        notify: Callable[[str], None],
    ) -> None:
        self._config = config
        self._notify = notify
        self._device = device
        self._classes = task.classes
        train, tested = task.train, task.test
        if config.validation:
            train, tested = split(task.train, config.validation, config.seed)
        self._train, self._tested = train.to(device), tested.to(device)
        self._model = initial_model(model_config, config.seed).to(device)
        self._weights = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._weights, config.learning_rate, weight_decay=config.weight_decay
        )
        self._sampler = Sampler(train.lengths, config.batch_size, config.curriculum)
        self._epoch = 0
        self._updates = 0
        self._seconds: list[float] = []
        self._curve: list[list[float]] = []

    def run(self, folder: _Folder | None = None) -> Outcome:
        """Train to the end and test."""
        if folder is not None:
            self._resume(folder)
        said = saved = time.monotonic()
        while self._epoch < self._config.epochs:
            self._run_epoch()
            now = time.monotonic()
            last = self._epoch == self._config.epochs
            if last or now - said > 5:
                said = now
                loss, accuracy, _ = self._curve[-1]
                self._notify(
                    f"epoch {self._epoch}/{self._config.epochs}: training loss {loss:.4f}, "
                    f"accuracy {accuracy:.3f}, {self._seconds[-1]:.2f} s"
                )
            if folder is not None and not last and now - saved > CHECKPOINT_SECONDS:
                saved = now
                self._save(folder)
        loss, confusion = evaluate(self._model, self._tested, len(self._classes))
        right = sum(row[i] for i, row in enumerate(confusion))
        return Outcome(
            accuracy=right / len(self._tested),
            loss=loss,
            tested="validation" if self._config.validation else "test",
            confusion=confusion,
            classes=list(self._classes),
            parameters=sum(p.numel() for p in self._weights),
            updates=self._updates,
            seconds_per_epoch=statistics.median(self._seconds) if self._seconds else 0.0,
            curve=self._curve,
            machine=machine(self._device),
        )

    def _run_epoch(self) -> None:
        start = time.perf_counter()
        self._model.train()
        # Each epoch has a seed of its own, so a run goes on after any of them as if undisturbed.
        seed = hash((self._config.seed, self._epoch)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        losses, hits, seen = 0.0, 0.0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for rows in self._sampler.epoch(generator):
                batch = self._train.subset(rows.to(self._device))
                loss, right = self._update(batch)
                self._sampler.learned(right / len(rows))
                losses, hits, seen = losses + loss * len(rows), hits + right, seen + len(rows)
        self._epoch += 1
        self._seconds.append(time.perf_counter() - start)
        self._curve.append([losses / seen, hits / seen, float(self._sampler.limit)])

    def _update(self, batch: SeriesSet) -> tuple[float, float]:
        """One step of the optimiser; returns loss and number of right answers."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        x = batch.x
        if self._config.noise:
            x = x + self._config.noise * torch.randn_like(x)
        logits = self._model(x, batch.timespans, batch.lengths)
        loss = F.cross_entropy(logits, batch.labels)
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise NonFiniteLossError(
                f"the loss is {value} after {self._updates} updates; try a smaller --learning-rate"
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, self._config.clip)
        self._optimizer.step()
        self._updates += 1
        return value, float((logits.argmax(1) == batch.labels).sum())

    def _learning_rate(self) -> float:
        total = self._config.epochs * self._sampler.batches
        left = (1 - self._updates / total) / self._config.decay if self._config.decay else 1.0
        # 1 until the decay begins, then down to 0 as half a cosine wave.
        share = torch.sin(torch.tensor(min(left, 1.0) * torch.pi / 2, dtype=torch.float64)) ** 2
        return self._config.learning_rate * float(share)

    def _save(self, folder: _Folder) -> None:
        tensors = {f"model.{name}": t for name, t in model_tensors(self._model).items()}
        for name, weight in self._model.named_parameters():
            for key, value in self._optimizer.state.get(weight, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        progress = {
            "epoch": self._epoch,
            "updates": self._updates,
            "seconds": self._seconds,
            "curve": self._curve,
            "sampler": self._sampler.state(),
        }
        folder.save(tensors, progress)

    def _resume(self, folder: _Folder) -> None:
        found = folder.load()
        if found is None:
            return
        tensors, progress = found
        try:
            check_model(self._model, tensors)
            states = optimizer_states(self._model, self._optimizer, tensors, progress["updates"])
        except RecordError as error:
            raise RunError(f"the checkpoint is of another run: {error}") from None
        restore(self._model, tensors)
        self._optimizer.state.clear()
        self._optimizer.state.update(states)
        self._epoch, self._updates = progress["epoch"], progress["updates"]
        self._seconds, self._curve = progress["seconds"], progress["curve"]
        self._sampler.restore(progress["sampler"])
        self._notify(f"going on after epoch {self._epoch}")
