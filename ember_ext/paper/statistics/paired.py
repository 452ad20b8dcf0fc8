"""Paired statistics over seeds, and what a difference must exceed to be more than noise.

Nothing is tested with fewer than `MIN_PAIRS` pairs; what cannot be computed is None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

MIN_PAIRS = 3
"""Fewest pairs for a test or an interval."""

CONFIDENCE = 0.95

RESAMPLES = 9999
"""The resamples of the bootstrap. Their generator has a fixed seed: equal data, equal interval."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """Some values and their spread.

    Attributes:
        n: how many.
        mean: their mean.
        sd: standard deviation with ddof 1; None for a single value.
        sd_population: with ddof 0, as the paper's first tables have it; None for a single value.
    """

    n: int
    mean: float
    sd: float | None
    sd_population: float | None


@dataclass(frozen=True)
class PairedComparison:
    """The differences of one variant from a base, pair by pair.

    Differences are other minus base, so that a gain in loss is negative.

    Attributes:
        differences: one a pair, in the order given.
        base, other: the two samples.
        difference: mean of the differences.
        percent: the difference in percent of the base's mean; None unless that is above 0.
        wins: pairs in which other is smaller; equal values count for neither.
        ties: pairs of equal values.
        t_p: two-sided p of the paired t-test. 1 if all pairs are equal; None with fewer than 3
            pairs, or if all differences are one number other than 0, where t is undefined.
        wilcoxon_p: two-sided p of Wilcoxon's signed-rank test, exact for few pairs: with n pairs
            it cannot fall below 2^(1-n), so 6 are needed for p < .05. 1 if all pairs are equal;
            None with fewer than 3.
        dz: Cohen's d of the differences, mean / sd (ddof 1); None as t_p, and if all are equal.
        t_interval: 95 % interval of the mean difference by Student's t; None with fewer than 3.
        variance: the two samples' spread compared; None with fewer than 3 pairs.
    """

    differences: tuple[float, ...]
    base: Sample
    other: Sample
    difference: float
    percent: float | None
    wins: int
    ties: int
    t_p: float | None
    wilcoxon_p: float | None
    dz: float | None
    t_interval: Interval | None
    variance: VarianceComparison | None

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.differences)

    @cached_property
    def bootstrap_interval(self) -> Interval | None:
        """95 % interval of the mean difference by the bootstrap; None with fewer than 3 pairs.

        Bias-corrected and accelerated (BCa). Over few pairs it is too narrow: prefer `t_interval`
        below about 10.
        """
        if self.t_interval is None or self.t_interval[0] == self.t_interval[1]:
            return self.t_interval
        result = stats.bootstrap(
            (np.array(self.differences),),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(0),
        )
        low, high = result.confidence_interval
        return float(low), float(high)


@dataclass(frozen=True)
class VarianceComparison:
    """Whether one of two paired samples varies less.

    Attributes:
        sd_ratio: sd of the other over sd of the base; None if the base does not vary.
        f_p: two-sided p of the F-test, which takes the samples for independent.
        pitman_morgan_p: two-sided p of the Pitman-Morgan test, made for pairs: the correlation of
            sums with differences, which is 0 just where the variances are equal; None if all
            differences are equal. Both are None if a sample does not vary.
    """

    sd_ratio: float | None
    f_p: float | None
    pitman_morgan_p: float | None


@dataclass(frozen=True)
class NoiseFloor:
    """The distance at which runs end that differ by rounding only.

    Attributes:
        n: number of null pairs.
        rms: root mean square of their differences.
        maximum: largest absolute difference.
    """

    n: int
    rms: float
    maximum: float


@dataclass(frozen=True)
class PrincipalComponents:
    """The directions in which some points vary most, from the covariance of their coordinates.

    Attributes:
        shares: of the variance, falling.
        directions: a unit vector to each share; its largest coordinate is positive.
    """

    shares: tuple[float, ...]
    directions: tuple[tuple[float, ...], ...]


def describe(values: Sequence[float]) -> Sample:
    """Mean and standard deviations of at least one value."""
    several = len(values) > 1
    return Sample(
        n=len(values),
        mean=float(np.mean(values)),
        sd=float(np.std(values, ddof=1)) if several else None,
        sd_population=float(np.std(values)) if several else None,
    )


def compare_paired(base: Sequence[float], other: Sequence[float]) -> PairedComparison:
    """Compare two samples whose i-th values belong together.

    Args:
        base: finite values, at least one.
        other: as many.

    Raises:
        ValueError: the samples are empty, of different lengths, or not finite.
    """
    if len(base) != len(other) or not base:
        raise ValueError(
            f"compare_paired: base and other must have equal lengths of at least 1, got "
            f"{len(base)} and {len(other)}"
        )
    if not np.isfinite([*base, *other]).all():
        raise ValueError(f"compare_paired: values must be finite, got {base} and {other}")
    differences = np.asarray(other, dtype=float) - np.asarray(base, dtype=float)
    mean_base = float(np.mean(base))
    difference = float(differences.mean())
    tested = len(differences) >= MIN_PAIRS
    spread = _varies(differences, scale=max(map(abs, [*base, *other])))
    t_p = wilcoxon_p = dz = t_interval = None
    if tested and not differences.any():
        t_p = wilcoxon_p = 1.0
    elif tested:
        wilcoxon_p = float(stats.wilcoxon(differences).pvalue)
    if tested and spread:
        test = stats.ttest_rel(other, base)
        t_p = float(test.pvalue)
        low, high = test.confidence_interval(CONFIDENCE)
        t_interval = (float(low), float(high))
        dz = difference / float(differences.std(ddof=1))
    elif tested:
        t_interval = (difference, difference)
    return PairedComparison(
        differences=tuple(differences.tolist()),
        base=describe(base),
        other=describe(other),
        difference=difference,
        percent=100 * difference / mean_base if mean_base > 0 else None,
        wins=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
        t_p=t_p,
        wilcoxon_p=wilcoxon_p,
        dz=dz,
        t_interval=t_interval,
        variance=compare_variances(base, other) if tested else None,
    )


def compare_variances(base: Sequence[float], other: Sequence[float]) -> VarianceComparison:
    """Compare the spread of two paired samples of at least 3 values."""
    first, second = np.asarray(base, dtype=float), np.asarray(other, dtype=float)
    scale = float(np.abs([*first, *second]).max())
    if not _varies(first, scale):
        return VarianceComparison(None, None, None)
    ratio = float(second.std(ddof=1) / first.std(ddof=1))
    if not _varies(second, scale):
        return VarianceComparison(0.0, None, None)
    freedom = len(first) - 1
    below = float(stats.f.cdf(ratio**2, freedom, freedom))
    pitman_morgan = None
    if _varies(second - first, scale) and _varies(second + first, scale):
        pitman_morgan = float(stats.pearsonr(second + first, second - first).pvalue)
    return VarianceComparison(ratio, 2 * min(below, 1 - below), pitman_morgan)


def p_against_zero(values: Sequence[float]) -> float | None:
    """Two-sided p of the t-test that the mean of some values is 0; see `PairedComparison.t_p`."""
    return compare_paired([0.0] * len(values), values).t_p


def noise_floor(differences: Sequence[float]) -> NoiseFloor | None:
    """The noise floor that differences of null pairs show; None without any."""
    if not differences:
        return None
    squares = float(np.mean(np.square(differences)))
    return NoiseFloor(len(differences), math.sqrt(squares), float(np.abs(differences).max()))


def spearman(values: Sequence[float]) -> float | None:
    """Rank correlation of values with their position: 1 rises, -1 falls throughout.

    None with fewer than 3 values, where it says nothing, or if all are equal.
    """
    if len(values) < 3 or not np.ptp(values):
        return None
    # Rounded, because one swap among 4 has .8 to all digits but the last.
    return round(float(stats.spearmanr(np.arange(len(values)), values).statistic), 12)


def principal_components(points: Sequence[Sequence[float]]) -> PrincipalComponents | None:
    """Compute those of points with two coordinates or more, which are not standardised.

    None with fewer than 2 points, or if all are equal.
    """
    if len(points) < 2 or not np.ptp(points, axis=0).any():
        return None
    variances, vectors = np.linalg.eigh(np.cov(points, rowvar=False))
    falling = vectors.T[::-1]
    signs = [np.sign(v[np.abs(v).argmax()]) for v in falling]
    shares = np.clip(variances[::-1], 0, None) / variances.clip(0).sum()
    directions = [tuple((s * v).tolist()) for s, v in zip(signs, falling, strict=True)]
    return PrincipalComponents(tuple(shares.tolist()), tuple(directions))


def _varies(values: np.ndarray, scale: float) -> bool:
    """Whether values differ by more than the rounding of their differences."""
    return bool(np.ptp(values) > 1e-12 * scale)
