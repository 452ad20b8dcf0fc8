"""A run's folder: its files, written so that no crash can spoil them.

    config.json        the run's `TrainConfig`
    corpus.json        name, digest and characters of the text
    metrics.jsonl      one line per step and per evaluation
    last.safetensors   where training stands: weights, optimiser, and in the header the rest
    best.safetensors   the weights of the best evaluation
    summary.json, loss.png, sample.txt   the outcome

Checkpoints replace each other in one step, and each knows how long `metrics.jsonl` was: resuming
cuts off what came later. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ember_ext.nn.lif_gate import current_name
from ember_ext.paper.data import Corpus, Vocabulary
from ember_ext.paper.earlier import LATER_FIELDS
from ember_ext.paper.files import remove_leftovers, write_atomically
from ember_ext.paper.records import RecordError, check_record, parse_json, read_json
from ember_ext.paper.training.checkpoint import (
    Progress,
    check_model,
    model_tensors,
    optimizer_states,
    parse_progress,
    plain,
    restore,
)
from ember_ext.paper.training.config import (
    ConfigError,
    TrainConfig,
    differing_fields,
    read_config,
)
from ember_ext.paper.training.plot import plot_losses

CLAIM_SECONDS = 20.0
"""The longest wait for a folder in use: a run that was asked to stop finishes its step."""


_DIGEST = re.compile("[0-9a-f]{64}")
_CORPUS = {"name": str, "sha256": str, "characters": str}
_METRICS = {
    "step": {"loss": float, "grad_norm": float, "learning_rate": float},
    "evaluation": {"val_loss": float, "val_loss_estimate": float, "train_loss_estimate": float},
}
"""The fields of each line of metrics.jsonl, by its event."""


class RunError(Exception):
    """A run folder that cannot be used or written; the message says what to do."""


class RunFolder:
    """Reads and writes the files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.corpus = self.path / "corpus.json"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.safetensors"
        self.best = self.path / "best.safetensors"
        self.summary = self.path / "summary.json"
        self.plot = self.path / "loss.png"
        self.sample = self.path / "sample.txt"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes from training here meanwhile.

        What an earlier process left unfinished when it was killed is removed.

        Raises:
            RunError: one does already, or the folder cannot be written to.
        """
        lock = FileLock(self.path / ".lock", timeout=CLAIM_SECONDS)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunError(f"{self.path} is in use: another process trains there") from None
        except OSError as error:
            raise self._write_error(self.path, error) from error
        try:
            remove_leftovers(self.path)
            yield
        finally:
            lock.release()

    def create(self, config: TrainConfig, corpus: Corpus) -> None:
        """Start a run here.

        Raises:
            RunError: the folder cannot be written to, or holds a run already.
        """
        if self.exists():
            raise RunError(
                f"{self.path} holds a run already: continue it with --resume {self.path}, or "
                "choose another folder with --out"
            )
        self._write_json(
            self.corpus,
            {
                "name": corpus.name,
                "sha256": corpus.sha256,
                "characters": corpus.vocabulary.characters,
            },
        )
        # Last, because it makes the folder a run.
        self._write_json(self.config, dataclasses.asdict(config))

    def check(self, config: TrainConfig, corpus: Corpus) -> None:
        """Make sure that the run here is of `corpus` and of `config`, or of a shorter one.

        Raises:
            RunError: it is another one; the message names the fields that differ.
        """
        differences = differing_fields(self.read_config(), config)
        there = self._read_corpus()
        if there["sha256"] != corpus.sha256:
            differences["corpus"] = (there["name"], corpus.name)
        if differences:
            named = ", ".join(
                f"{field} is {old!r} there and {new!r} here"
                for field, (old, new) in differences.items()
            )
            raise RunError(f"{self.path} belongs to another configuration: {named}")

    def update_config(self, config: TrainConfig) -> None:
        """Record what the run goes on with, such as more steps."""
        self._write_json(self.config, dataclasses.asdict(config))

    def read_config(self) -> TrainConfig:
        """The configuration of the run here.

        Raises:
            RunError: there is none, or it is damaged.
        """
        if not self.exists():
            raise RunError(f"{self.path} holds no run (no {self.config.name})")
        try:
            fields = {**LATER_FIELDS, **read_config(self.config)}
            # A field that is gone would go on with its default, as another run.
            missing = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in fields]
            if missing:
                raise RunError(
                    f"{self.config} must have all fields of a run, got one without "
                    f"{', '.join(missing)} (it is damaged, or another version of ember-ext wrote "
                    "it)"
                )
            return TrainConfig(**fields)
        except ConfigError as error:
            text = str(error)
            raise RunError(text if str(self.config) in text else f"{self.config}: {text}") from None

    def read_vocabulary(self) -> Vocabulary:
        """The characters that the run's model knows.

        Raises:
            RunError: corpus.json is missing or damaged.
        """
        with _reading(self.corpus):
            return _vocabulary(self._read_corpus()["characters"])

    def _read_corpus(self) -> dict[str, Any]:
        with _reading(self.corpus):
            corpus = check_record(read_json(self.corpus), _CORPUS)
            if not _DIGEST.fullmatch(corpus["sha256"]):
                raise RecordError(f"sha256 must be 64 hexadecimal digits, got {corpus['sha256']!r}")
            _vocabulary(corpus["characters"])
            return corpus

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add lines to the metrics.

        Raises:
            RunError: they cannot be written.
        """
        text = "".join(json.dumps(record) + "\n" for record in records)
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise self._write_error(self.metrics, error) from error

    def cut_metrics(self, size: int) -> None:
        """Forget the metrics beyond `size` bytes, which no checkpoint covers.

        Raises:
            RunError: there are fewer.
        """
        actual = self.metrics.stat().st_size if self.metrics.exists() else 0
        if actual < size:
            raise RunError(f"{self.metrics} has lost lines that the checkpoint counts on")
        if actual > size:
            os.truncate(self.metrics, size)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records of the metrics.

        Raises:
            RunError: they are missing or damaged; the message names the line.
        """
        with _reading(self.metrics):
            try:
                lines = self.metrics.read_bytes().splitlines()
            except OSError as error:
                raise RecordError(f"it cannot be read: {error.strerror}") from None
            return [_metric(line, number) for number, line in enumerate(lines, 1)]

    def save_checkpoint(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> None:
        """Replace the checkpoint in one step.

        Raises:
            RunError: it cannot be written; the previous one is untouched.
        """
        if self.metrics.exists():
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())
            progress.metrics_bytes = self.metrics.stat().st_size
        tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        header = {"progress": json.dumps(dataclasses.asdict(progress))}
        self._write(self.last, safetensors.torch.save(plain(tensors), header))

    def load_checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Restore what `save_checkpoint` saved; nothing if there is no checkpoint yet.

        Returns:
            Where the run stands.

        Raises:
            RunError: the checkpoint is damaged or of another model.
        """
        if not self.last.exists():
            return Progress()
        tensors, header = self._read_tensors(self.last)
        with _reading(self.last):
            # All is checked before anything is changed.
            progress = parse_progress(header)
            check_model(model, tensors)
            states = optimizer_states(model, optimizer, tensors, progress.step)
        restore(model, tensors)
        optimizer.state.update(states)
        return progress

    def save_best(self, model: nn.Module, step: int, val_loss: float) -> None:
        """Keep the present weights as the best ones."""
        tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
        header = {"best": json.dumps({"step": step, "val_loss": val_loss})}
        self._write(self.best, safetensors.torch.save(plain(tensors), header))

    def load_best(self, model: nn.Module) -> None:
        """Put the best weights into `model`.

        Raises:
            RunError: there are none yet, they are damaged, or of another model.
        """
        if not self.best.exists():
            raise RunError(f"{self.path} has no trained weights yet")
        tensors, _ = self._read_tensors(self.best)
        with _reading(self.best):
            check_model(model, tensors)
        restore(model, tensors)

    def drop_checkpoints(self) -> None:
        """Remove the weights and the optimiser's state; a run without them starts anew."""
        for path in (self.last, self.best):
            path.unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the outcome."""
        self._write_json(self.summary, summary)

    def write_plot(self, title: str) -> None:
        """Draw the loss curves.

        Raises:
            RunError: the picture cannot be written.
        """
        self._write(self.plot, plot_losses(self.read_metrics(), title))

    def write_sample(self, text: str) -> None:
        """Write the text sample."""
        self._write(self.sample, text.encode())

    def _read_tensors(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {current_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        except (OSError, safetensors.SafetensorError) as error:
            raise RunError(
                f"{path} is damaged: expected a safetensors file, got one that cannot be read: "
                f"{error}"
            ) from None

    def _write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        self._write(path, (json.dumps(content, indent=2) + "\n").encode())

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomically(path, content)
        except OSError as error:
            raise self._write_error(path, error) from error

    def _write_error(self, path: Path, error: OSError) -> RunError:
        kept = f"; the last checkpoint, {self.last}, is intact" if self.last.exists() else ""
        return RunError(f"cannot write {path}: {error.strerror}{kept}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what is wrong with a file's content into an error that names the file."""
    try:
        yield
    except RecordError as error:
        raise RunError(f"{path} is damaged: {error}") from None


def _vocabulary(characters: str) -> Vocabulary:
    try:
        return Vocabulary(characters)
    except ValueError:
        raise RecordError(
            "characters must be distinct and in code-point order, got others"
        ) from None


def _metric(line: bytes, number: int) -> dict[str, Any]:
    what = f"line {number}"
    try:
        record = check_record(parse_json(line), {"event": str, "step": int}, what)
        if record["event"] not in _METRICS:
            known = " or ".join(map(repr, _METRICS))
            raise RecordError(f"event must be {known}, got {record['event']!r}")
        return check_record(record, _METRICS[record["event"]], what)
    except RecordError as error:
        text = str(error)
        raise RecordError(text if text.startswith(what) else f"{what}: {text}") from None
