"""Profiles over the layers: entropies, fire rates and thresholds against depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.paired import spearman

ATTENTION_ENTROPY = "attention_entropy"
ATTENTION_SUPPORT = "attention_support"
FIRST_TOKEN_MASS = "first_token_mass"
NEURON_ENTROPY = "neuron_entropy"
FIRE_RATE = "fire_rate"
VIRTUAL_NEURON_ENTROPY = "virtual_neuron_entropy"
VIRTUAL_FIRE_RATE = "virtual_fire_rate"
ALWAYS_ON = "always_on"
SELECTIVE = "selective"
VIRTUAL_ALWAYS_ON = "virtual_always_on"
VIRTUAL_SELECTIVE = "virtual_selective"
THRESHOLD = "threshold"

PROFILE_MEASURES = {
    "transformer": (ATTENTION_ENTROPY, ATTENTION_SUPPORT, FIRST_TOKEN_MASS, THRESHOLD),
    "cfc": (
        NEURON_ENTROPY,
        FIRE_RATE,
        ALWAYS_ON,
        SELECTIVE,
        VIRTUAL_NEURON_ENTROPY,
        VIRTUAL_FIRE_RATE,
        VIRTUAL_ALWAYS_ON,
        VIRTUAL_SELECTIVE,
        THRESHOLD,
    ),
}


@dataclass(frozen=True)
class DepthProfile:
    """One measure, layer by layer, at the last evaluation.

    Attributes:
        measure: its name.
        seeds: of the runs.
        values: one row a run, one value a layer.
    """

    measure: str
    seeds: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each layer, over runs."""
        return tuple(np.mean(self.values, axis=0).tolist())

    @property
    def sd(self) -> tuple[float, ...] | None:
        """The standard deviation of each layer, over runs, with ddof 1; None with a single run."""
        if len(self.values) < 2:
            return None
        return tuple(np.std(self.values, axis=0, ddof=1).tolist())

    @property
    def spearman(self) -> tuple[float | None, ...]:
        """Rank correlation of layer and value in each run; None with fewer than 3 layers."""
        return tuple(spearman(row) for row in self.values)

    @property
    def mean_spearman(self) -> float | None:
        """Mean of the runs' rank correlations; a run whose layers are all equal counts as 0."""
        if len(self.values[0]) < 3:
            return None
        return float(np.mean([value or 0.0 for value in self.spearman]))

    @property
    def rises(self) -> tuple[float, ...]:
        """Last layer minus first, of each run."""
        return tuple(row[-1] - row[0] for row in self.values)


def layer_values(run: RunResult, measure: str, evaluation: int = -1) -> list[float] | None:
    """One measure of each layer at one evaluation.

    Args:
        run: any run.
        measure: an entry of `collect_metrics`, or "threshold" for the mean effective |θ|.
        evaluation: its index; by default the last.

    Returns:
        Means over heads or neurons, one a layer; None if the model has no such measure.
    """
    record: dict[str, Any] = run.evaluations[evaluation]
    if measure == THRESHOLD:
        gates = record["gates"].values()
        return [float(np.abs(gate["threshold"]).mean()) for gate in gates] or None
    values = record.get(measure)
    if not values or values[0] is None:
        return None
    return [float(np.mean(value)) for value in values]


def depth_profile(runs: Sequence[RunResult], measure: str) -> DepthProfile | None:
    """The profile of some runs of one variant; None without runs, or if one lacks the measure."""
    rows = [layer_values(run, measure) for run in runs]
    values = tuple(tuple(row) for row in rows if row is not None)
    if not values or len(values) < len(rows):
        return None
    return DepthProfile(measure, tuple(run.seed for run in runs), values)


def depth_profiles(finished: FinishedRuns, backbone: str, measure: str) -> dict[str, DepthProfile]:
    """The profile of every variant that has the measure."""
    profiles = {
        v: depth_profile(finished.runs(backbone, v), measure) for v in finished.variants(backbone)
    }
    return {variant: profile for variant, profile in profiles.items() if profile is not None}


def threshold_trajectories(run: RunResult) -> tuple[list[int], np.ndarray]:
    """Steps [E] of a gated run's evaluations, and the effective |θ| of its gates [E, layer, unit].

    A unit is a head of the Transformer, or a neuron of the CfC.
    """
    values = [
        [gate["threshold"] for gate in record["gates"].values()] for record in run.evaluations
    ]
    return [int(record["step"]) for record in run.evaluations], np.abs(values)
