"""Means with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from ember_ext.paper.statistics.paired import CONFIDENCE, MIN_PAIRS, Interval, describe


@dataclass(frozen=True)
class Spread:
    """Some values of one condition.

    Attributes:
        n: how many.
        mean: their mean.
        sd: standard deviation with ddof 1; None for a single value.
        interval: 95 % interval of the mean by Student's t; None with fewer than 3 values.
    """

    n: int
    mean: float
    sd: float | None
    interval: Interval | None


def spread(values: Sequence[float]) -> Spread:
    """Describe one value or more."""
    sample = describe(values)
    interval = None
    if sample.sd is not None and sample.n >= MIN_PAIRS:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, sample.n - 1))
        half = quantile * sample.sd / math.sqrt(sample.n)
        interval = (sample.mean - half, sample.mean + half)
    return Spread(sample.n, sample.mean, sample.sd, interval)
