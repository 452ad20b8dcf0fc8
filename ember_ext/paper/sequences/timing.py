"""The time of an epoch of XOR, with our layers and with those of ncps in turns.

A busy machine slows both alike. Before anything is timed, both must give the same loss and the same
gradients.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ember_ext import decelerate
from ember_ext._machine import machine
from ember_ext.paper.sequences.batches import Sampler
from ember_ext.paper.sequences.labels import CELL_LABELS, short_machine
from ember_ext.paper.sequences.models import CONTINUOUS, CellName, SequenceClassifier
from ember_ext.paper.sequences.series import SeriesSet
from ember_ext.paper.sequences.settings import model_settings, training_settings
from ember_ext.paper.sequences.tasks import xor_task
from ember_ext.paper.sequences.training import initial_model

ROUNDS = 32
"""Batches that each contender is timed with, in turns."""

REPEATS = 2
"""Times that each batch is timed; the fastest counts, as other work can only add to a time."""

Row = dict[str, str]


class _OfNcps(nn.Module):
    """A layer of ncps behind the call of ours.

    It takes no lengths, so it runs over the padding, which changes no earlier output. It takes time
    spans of each row only if every unit has one of its own, and those are equal here.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timespans: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        spans = timespans[..., None].expand(-1, -1, self.layer.state_size)
        y, state = self.layer(x, timespans=spans)
        return y, state


def as_ncps(model: SequenceClassifier) -> SequenceClassifier:
    """A copy of a classifier whose layers are those of ncps, with the same weights."""
    theirs = copy.deepcopy(model)
    decelerate(theirs)
    theirs.layers = nn.ModuleList(_OfNcps(layer) for layer in theirs.layers)
    return theirs


def time_epochs(
    rows: int = 100_000, rounds: int | None = None, notify: Callable[[str], None] = print
) -> list[Row]:
    """Time an update with each continuous cell; an epoch is as many as the study's.

    Batches are drawn as the study draws them once its curriculum has let in all series: of like
    length, so that little of a batch is padding.

    Args:
        rows: streams of an epoch.
        rounds: batches that are timed. Default: `ROUNDS`.
        notify: called with a line for each cell.

    Returns:
        A row for each cell, times in milliseconds.

    Raises:
        AssertionError: ours and ncps disagree.
    """
    task = xor_task(rows=rows)
    count = ROUNDS if rounds is None else rounds
    return [_time_cell(task.train, cell, count, notify) for cell in CONTINUOUS]


def _time_cell(
    series: SeriesSet, cell: CellName, rounds: int, notify: Callable[[str], None]
) -> Row:
    config = training_settings("xor", cell)
    ours = initial_model(model_settings("xor", cell, series.channels, 2), seed=0)
    models = {"ember-ext": ours, "ncps": as_ncps(ours)}
    sampler = Sampler(series.lengths, config.batch_size, config.curriculum)
    sampler.restore({"limit": int(series.lengths.max()), "running": 0.0, "since": 0})
    drawn = sampler.epoch(torch.Generator().manual_seed(0))
    batches = [series.subset(rows) for rows in itertools.islice(drawn, rounds)]
    _compare(models, batches[0])
    steps = {name: _stepper(model, config.learning_rate) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in steps.values():  # the first step is slower
        step(batches[0])
    for batch in batches:
        fastest = dict.fromkeys(steps, float("inf"))
        for _, (name, step) in itertools.product(range(REPEATS), steps.items()):
            start = time.perf_counter()
            step(batch)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
        for name in steps:
            seconds[name].append(fastest[name])
    # The mean, as batches differ in length.
    epochs = {name: sampler.batches * statistics.mean(s) for name, s in seconds.items()}
    ratio = epochs["ncps"] / epochs["ember-ext"]
    notify(f"{cell}: {epochs['ember-ext']:.1f} s an epoch, ncps {epochs['ncps']:.1f} s")
    return {
        "cell": CELL_LABELS[cell],
        "units": str(ours.config.units),
        "ember-ext": f"{epochs['ember-ext']:.1f} s",
        "ncps": f"{epochs['ncps']:.1f} s",
        "speedup": f"{ratio:.1f}x",
        "updates": str(sampler.batches),
        "device": short_machine(machine(torch.device("cpu"))),
    }


def _stepper(model: nn.Module, learning_rate: float) -> Callable[[SeriesSet], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)

    def step(batch: SeriesSet) -> None:
        loss = F.cross_entropy(model(batch.x, batch.timespans, batch.lengths), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _compare(models: dict[str, SequenceClassifier], batch: SeriesSet) -> None:
    found = []
    for model in models.values():
        loss = F.cross_entropy(model(batch.x, batch.timespans, batch.lengths), batch.labels)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *gradients])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
