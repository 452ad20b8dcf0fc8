"""The power of tests over few pairs: which effect some seeds would have found.

Of a two-sided t-test of n differences with standard deviation sd, the statistic follows a
noncentral t distribution with n - 1 degrees of freedom and noncentrality
difference / sd * sqrt(n). See Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

from ember_ext.paper.statistics.paired import MIN_PAIRS

POWER = 0.8
"""The chance from which a test counts as one that would have found an effect."""

ALPHA = 0.05
"""The two-sided p below which an effect counts as found."""

NODES = 400
"""Points of the integral over the sample's standard deviation, which is exact to 10 digits."""


def power(difference: float, sd: float, n: int) -> float:
    """The chance that a two-sided paired t-test finds a true difference.

    Args:
        difference: the true mean of the differences.
        sd: their standard deviation, above 0.
        n: the number of pairs, at least `MIN_PAIRS`.

    Raises:
        ValueError: sd or n are smaller than that.
    """
    if not sd > 0 or n < MIN_PAIRS:
        raise ValueError(f"power: sd must be above 0 and n at least {MIN_PAIRS}, got {sd} and {n}")
    return _power(abs(difference) / sd, n)


def detectable_difference(sd: float | None, n: int) -> float | None:
    """The smallest true difference that a two-sided paired t-test finds with a power of 80 %.

    None with fewer than `MIN_PAIRS` pairs, or where the differences do not vary: then there is no
    t-test.

    Args:
        sd: standard deviation of the differences; None if there is none.
        n: the number of pairs.
    """
    if sd is None or not sd > 0 or n < MIN_PAIRS:
        return None
    return sd * _detectable(n)


def detectable_ratio(n: int, n_base: int) -> float:
    """The smallest true ratio of two RMS that a one-sided F-test finds with a power of 80 %.

    The test compares mean squares of values with mean 0: with a true ratio r of the RMS, their
    ratio is r² times one that follows an F distribution.

    Args:
        n: number of values whose RMS may be the larger one.
        n_base: number of the others.
    """
    critical, reached = stats.f.isf((ALPHA, POWER), n, n_base)
    return math.sqrt(critical / reached)


@lru_cache
def _detectable(n: int) -> float:
    """`detectable_difference` in units of the standard deviation."""
    # With 3 pairs 80 % take about 3.3 of them.
    return float(optimize.brentq(lambda d: _power(d, n) - POWER, 0.0, 100.0))


def _power(dz: float, n: int) -> float:
    """The chance that |T| passes its critical value, from the definition of T.

    Finding the effect with the wrong sign counts, too: without an effect the sum is `ALPHA`.
    `scipy.stats.nct` gives NaN far from the centre, so the integral over the sample's sd, in units
    of the true one, is taken here.
    """
    freedom, shift = n - 1, dz * math.sqrt(n)
    ratios, chances = _sample_sds(freedom)
    limits = float(stats.t.isf(ALPHA / 2, freedom)) * ratios
    found = special.ndtr(shift - limits) + special.ndtr(-shift - limits)
    return float(min(1.0, found @ chances))


@lru_cache
def _sample_sds(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample sds in units of the true one, and their probabilities."""
    # Beyond 12 of its own standard deviations nothing is left.
    reach = 12 / math.sqrt(freedom)
    low, high = max(0.0, 1 - reach), 1 + reach
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    ratios = low + (high - low) * (nodes + 1) / 2
    half = freedom / 2
    log_density = (
        math.log(2)
        + half * math.log(half)
        - math.lgamma(half)
        + (freedom - 1) * np.log(ratios)
        - half * ratios**2
    )
    return ratios, weights * (high - low) / 2 * np.exp(log_density)
