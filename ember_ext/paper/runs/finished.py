"""The runs of a report, checked once: whole, finite, and trained alike within a backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from ember_ext.paper.earlier import LATER_FIELDS
from ember_ext.paper.runs.results import ResultError, RunResult, select

BASELINE = "standard"
"""The variant that all others are compared with."""

LIF = "lif"
"""The learnable gate, which most claims are about."""

NULL = "null"
"""The baseline again, with a relative noise of 1e-7 on its initial weights."""

LOSSES = ("val_loss", "val_loss_estimate")

LAYER_MEASURES = {
    "transformer": ("attention_entropy", "attention_support", "first_token_mass"),
    "cfc": ("fire_rate", "neuron_entropy", "virtual_fire_rate", "virtual_neuron_entropy"),
}
"""The measures of every evaluation, one value a layer or one a head."""

NEWER_MEASURES = {
    "transformer": (),
    "cfc": ("always_on", "selective", "virtual_always_on", "virtual_selective"),
}
"""Measures that evaluations of earlier versions lack."""

# Every configuration must have these.
_NUMBERS = (
    "seed",
    "steps",
    "n_layer",
    "n_embd",
    "n_head",
    "cfc_units",
    "block_size",
    "batch_size",
    "eval_interval",
    "dropout",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
)
_NAMES = ("gate_preset", "lr_schedule")

# Runs that are compared may differ in these: they are under study, or move no loss.
_FREE_FIELDS = {
    "condition",
    "gate_preset",
    "init_noise",
    "seed",
    "preset",
    "device",
    "data",
    "checkpoint_seconds",
    "sample_length",
}


class Pair(NamedTuple):
    """Two runs of one backbone and seed: equal initial weights, batches and dropout masks."""

    base: RunResult
    other: RunResult


class FinishedRuns:
    """Finished runs by backbone, variant and seed.

    Args:
        results: any number of runs, none too, in any order.

    Raises:
        ResultError: two results are of the same run, one is damaged or unfinished, or runs of one
            backbone differ in a field that is not under study. The message names the run.
    """

    def __init__(self, results: Sequence[RunResult]) -> None:
        self.results = tuple(results)
        names: set[str] = set()
        for run in self.results:
            _check(run)
            if run.name in names:
                raise ResultError(f"{run.name}: there are two results of this run")
            names.add(run.name)
        for backbone in self.backbones:
            _check_alike([run for run in self.results if run.backbone == backbone])

    @property
    def backbones(self) -> list[str]:
        """The backbones with at least one run, the Transformer first."""
        present = {run.backbone for run in self.results}
        return [backbone for backbone in LAYER_MEASURES if backbone in present]

    def variants(self, backbone: str) -> list[str]:
        """The variants of a backbone with at least one run, in alphabetical order."""
        return sorted({run.variant for run in self.results if run.backbone == backbone})

    def runs(self, backbone: str, variant: str) -> list[RunResult]:
        """The runs of one variant, by rising seed."""
        return list(select(self.results, backbone, variant).values())

    def pairs(self, backbone: str, variant: str, base: str = BASELINE) -> list[Pair]:
        """The runs of two variants over the seeds that both have, by rising seed."""
        bases = select(self.results, backbone, base)
        others = select(self.results, backbone, variant)
        return [Pair(bases[seed], run) for seed, run in others.items() if seed in bases]

    def config(self, backbone: str) -> dict[str, Any] | None:
        """The configuration of one of the backbone's runs, None if it has none."""
        return next((run.config for run in self.results if run.backbone == backbone), None)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(run: RunResult) -> None:
    """Raise ResultError unless everything that the analysis reads is there."""
    name, config = f"{run.variant!r}", run.config
    if not isinstance(config, dict) or not isinstance(run.corpus, dict):
        raise ResultError(f"{name}: config and corpus must be objects")
    for field in _NUMBERS:
        if not is_number(config.get(field)):
            raise ResultError(f"{name}: config has no number {field!r}")
    for field in _NAMES:
        if not isinstance(config.get(field), str):
            raise ResultError(f"{name}: config has no {field!r}")
    if config.get("backbone") not in LAYER_MEASURES:
        raise ResultError(f"{name}: backbone must be one of {list(LAYER_MEASURES)}")
    name = run.name
    for field in ("parameters", "trainable_parameters", "lif_parameters"):
        if not is_number(run.summary.get(field)):
            raise ResultError(f"{name}: summary has no number {field!r}")
    if not isinstance(run.evaluations, list) or not run.evaluations:
        raise ResultError(f"{name}: there are no evaluations")
    before = -1.0
    for record in run.evaluations:
        step = record.get("step")
        if not is_number(step) or step <= before:
            raise ResultError(
                f"{name}: steps of evaluations must rise, got {step!r} after {before:g}"
            )
        before = step
        _check_record(run, record)
    if before != config["steps"]:
        raise ResultError(
            f"{name}: the last evaluation is at {before:g} of {config['steps']} steps"
        )


def _check_record(run: RunResult, record: dict[str, Any]) -> None:
    where = f"{run.name}, step {record['step']}"
    for key in LOSSES:
        if not is_number(record.get(key)):
            raise ResultError(f"{where}: {key} must be a finite number, got {record.get(key)!r}")
    layers = run.config["n_layer"]
    newer = [key for key in NEWER_MEASURES[run.backbone] if key in record]
    for key in (*LAYER_MEASURES[run.backbone], *newer):
        values = record.get(key)
        if not isinstance(values, list) or len(values) != layers:
            raise ResultError(f"{where}: {key} must have one entry for each of {layers} layers")
        if run.backbone == "transformer":
            heads = run.config["n_head"]
            whole = all(
                isinstance(row, list) and len(row) == heads and all(map(is_number, row))
                for row in values
            )
        else:
            # Without a gate of its own a model has no own fire rate.
            whole = all(map(is_number, values)) or (
                not key.startswith("virtual") and all(value is None for value in values)
            )
        if not whole:
            raise ResultError(f"{where}: {key} must hold finite numbers, got {values}")
    gates = record.get("gates")
    if not isinstance(gates, dict) or len(gates) not in (0, layers):
        raise ResultError(f"{where}: gates must be one for each of {layers} layers, or none")
    units = run.config["n_head" if run.backbone == "transformer" else "n_embd"]
    for name, gate in gates.items():
        for parameter in ("threshold", "leak", "steepness"):
            values = gate.get(parameter) if isinstance(gate, dict) else None
            if (
                not isinstance(values, list)
                or len(values) != units
                or not all(map(is_number, values))
            ):
                raise ResultError(f"{where}: {parameter} of {name} must hold {units} numbers")


def _check_alike(runs: Sequence[RunResult]) -> None:
    """Raise ResultError unless the runs of one backbone may be compared."""
    first = runs[0]
    presets: dict[str, RunResult] = {}
    for run in runs:
        for field in (first.config.keys() | run.config.keys()) - _FREE_FIELDS:
            expected, got = (
                each.config.get(field, LATER_FIELDS.get(field)) for each in (first, run)
            )
            if expected != got:
                raise ResultError(
                    f"{run.name}: {field} must be {expected!r} as in {first.name}, got {got!r}"
                )
        if run.curve()[0] != first.curve()[0]:
            raise ResultError(f"{run.name}: evaluations must be at the steps of {first.name}")
        if run.corpus.get("sha256") != first.corpus.get("sha256"):
            raise ResultError(f"{run.name}: the corpus must be that of {first.name}")
        other = presets.setdefault(run.variant, run)
        if other.config.get("gate_preset") != run.config.get("gate_preset"):
            raise ResultError(f"{run.name}: gate_preset must be that of {other.name}")
