"""Two variants of one backbone compared over their common seeds, next to the noise floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ember_ext.paper.runs.finished import BASELINE, NULL, FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.paired import (
    NoiseFloor,
    PairedComparison,
    compare_paired,
    noise_floor,
)

Measure = Callable[[RunResult], float]
"""One number of a run."""

MAIN_LOSS = "val_loss_estimate"
"""The loss by the paper's protocol: random batches of the validation text."""


def best_loss(run: RunResult) -> float:
    """The paper's number: the smallest estimate of the validation loss over all evaluations."""
    return run.best(MAIN_LOSS)


def final_loss(run: RunResult) -> float:
    """The estimate at the last evaluation, which no choice has flattered."""
    return run.final(MAIN_LOSS)


def best_full_loss(run: RunResult) -> float:
    """The smallest loss on the whole validation text over all evaluations."""
    return run.best("val_loss")


def final_full_loss(run: RunResult) -> float:
    """The loss on the whole validation text at the last evaluation."""
    return run.final("val_loss")


LOSS_MEASURES: dict[str, Measure] = {
    "best, estimate": best_loss,
    "final, estimate": final_loss,
    "best, whole text": best_full_loss,
    "final, whole text": final_full_loss,
}


def compare(
    finished: FinishedRuns,
    backbone: str,
    variant: str,
    measure: Measure = best_loss,
    base: str = BASELINE,
) -> PairedComparison | None:
    """Compare a variant with a base by one measure; None without a common seed."""
    pairs = finished.pairs(backbone, variant, base)
    if not pairs:
        return None
    return compare_paired([measure(p.base) for p in pairs], [measure(p.other) for p in pairs])


def measure_noise(
    finished: FinishedRuns,
    backbone: str,
    measure: Measure = best_loss,
    variant: str = NULL,
    base: str = BASELINE,
) -> NoiseFloor | None:
    """The noise floor of a measure, from all null pairs of a backbone; None without any.

    Other runs that rounding alone sets apart can be given as `variant` and `base`.
    """
    pairs = finished.pairs(backbone, variant, base)
    return noise_floor([measure(pair.other) - measure(pair.base) for pair in pairs])


def extra_parameters(finished: FinishedRuns, backbone: str, variant: str) -> int | None:
    """Parameters of a variant beyond the baseline's; None if either was not run."""
    runs, bases = finished.runs(backbone, variant), finished.runs(backbone, BASELINE)
    if not runs or not bases:
        return None
    return int(runs[0].summary["parameters"] - bases[0].summary["parameters"])


@dataclass(frozen=True)
class NoiseCurve:
    """The noise floor along training.

    Attributes:
        steps: of the evaluations.
        rms: root mean square over all null pairs of the difference in loss, one a step.
        maximum: largest absolute difference, one a step.
    """

    steps: tuple[int, ...]
    rms: tuple[float, ...]
    maximum: tuple[float, ...]


def noise_curve(finished: FinishedRuns, backbone: str, key: str = MAIN_LOSS) -> NoiseCurve | None:
    """The noise floor of a loss at every evaluation; None without null pairs."""
    pairs = finished.pairs(backbone, NULL)
    if not pairs:
        return None
    differences = np.array(
        [np.subtract(p.other.curve(key)[1], p.base.curve(key)[1]) for p in pairs]
    )
    return NoiseCurve(
        steps=tuple(pairs[0].base.curve(key)[0]),
        rms=tuple(np.sqrt(np.square(differences).mean(0)).tolist()),
        maximum=tuple(np.abs(differences).max(0).tolist()),
    )
