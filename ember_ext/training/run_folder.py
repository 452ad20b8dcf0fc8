"""A run's folder: what is in it, and how to write it so that no crash can spoil it.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ember_ext.data import Corpus, Vocabulary
from ember_ext.files import write_atomically
from ember_ext.training.config import ConfigError, TrainConfig, differing_fields, read_config
from ember_ext.training.plot import plot_losses

CLAIM_SECONDS = 20.0
"""How long to wait for a folder that is in use: a run that was asked to stop finishes its step."""


class RunError(Exception):
    """A run folder that cannot be used or written; the message says what to do."""


@dataclass
class Progress:
    """Where a run stands, as its checkpoint records it."""

    step: int = 0
    """Updates made."""
    evaluated: bool = False
    """Whether the weights of this step were evaluated."""
    val_loss: float = float("inf")
    """Of the latest evaluation, on the whole validation text."""
    val_loss_estimate: float = float("inf")
    """Of the latest evaluation, on random batches."""
    best_val_loss: float = float("inf")
    best_step: int = 0
    best_val_loss_estimate: float = float("inf")
    seconds: float = 0.0
    """Time spent, resumed parts together."""
    step_seconds: float = 0.0
    """Time spent on updates alone."""
    metrics_bytes: int = 0
    """Length of `metrics.jsonl`."""


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
        digest = self._read_json(self.corpus)["sha256"]
        if digest != corpus.sha256:
            differences["corpus"] = (self._read_json(self.corpus)["name"], corpus.name)
        if differences:
            named = ", ".join(
                f"{field} is {there!r} there and {here!r} here"
                for field, (there, here) in differences.items()
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
            return TrainConfig(**read_config(self.config))
        except ConfigError as error:
            raise RunError(str(error)) from None

    def read_vocabulary(self) -> Vocabulary:
        """The characters that the run's model knows."""
        return Vocabulary(self._read_json(self.corpus)["characters"])

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
        """All records of the metrics."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

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
        tensors = {f"model.{name}": tensor for name, tensor in _tensors(model).items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        header = {"progress": json.dumps(dataclasses.asdict(progress))}
        self._write(self.last, safetensors.torch.save(_plain(tensors), header))

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
        _restore(self.last, model, tensors)
        parameters = dict(model.named_parameters())
        for full_name, tensor in tensors.items():
            kind, _, rest = full_name.partition(".")
            if kind == "optimizer":
                key, _, name = rest.partition(".")
                # The step count stays on the CPU unless the optimiser is fused on another device.
                device = parameters[name].device
                optimizer.state[parameters[name]][key] = tensor.to(device)
        return Progress(**json.loads(header["progress"]))

    def save_best(self, model: nn.Module, step: int, val_loss: float) -> None:
        """Keep the present weights as the best ones."""
        tensors = {f"model.{name}": tensor for name, tensor in _tensors(model).items()}
        header = {"best": json.dumps({"step": step, "val_loss": val_loss})}
        self._write(self.best, safetensors.torch.save(_plain(tensors), header))

    def load_best(self, model: nn.Module) -> None:
        """Put the best weights into `model`.

        Raises:
            RunError: there are none yet, they are damaged, or of another model.
        """
        if not self.best.exists():
            raise RunError(f"{self.path} has no trained weights yet")
        _restore(self.best, model, self._read_tensors(self.best)[0])

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
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except (OSError, safetensors.SafetensorError) as error:
            raise RunError(f"{path} is damaged: {error}") from None

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is damaged: {error}") from None
        return dict(content)

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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, a tensor that goes by two names (tied weights) once only."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _restore(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = {f"model.{name}": tensor for name, tensor in _tensors(model).items()}
    given = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if {n: t.shape for n, t in wanted.items()} != {n: t.shape for n, t in given.items()}:
        raise RunError(f"{path} holds the weights of another model")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(given[name])
