"""Paired statistics against the figures that follow from the authors' published per-seed losses."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ember_ext.paper import published
from ember_ext.paper.statistics.correction import holm
from ember_ext.paper.statistics.paired import (
    compare_paired,
    compare_variances,
    describe,
    noise_floor,
    p_against_zero,
    principal_components,
    spearman,
)
from ember_ext.paper.statistics.power import detectable_difference, detectable_ratio, power

# Eight seeds of the authors' later runs; None where the variant has no run.
STANDARD = [1.5039, 1.4687, 1.4735, 1.4747, 1.4626, 1.4810, 1.5065, 1.4855]
LIF = [1.4823, 1.4664, 1.4757, 1.4774, 1.4837, 1.4979, 1.5041, 1.4704]
HEAD = [1.5165, 1.4656, None, 1.4716, 1.4674, 1.5001, 1.5027, 1.4667]
REFRACTORY_HEAD = [1.4791, 1.4578, None, 1.4688, 1.4716, 1.4870, 1.5007, 1.4707]


@pytest.mark.parametrize(
    ("backbone", "variant"), [(b, v) for b, rows in published.LOSSES.items() for v in rows]
)
def test_printed_means_and_deviations_follow_from_the_seeds(backbone: str, variant: str) -> None:
    row = published.LOSSES[backbone][variant]
    sample = describe(row.per_seed)
    assert sample.mean == pytest.approx(row.mean, abs=6e-5)
    assert sample.sd_population == pytest.approx(row.sd, abs=6e-5)
    assert sample.sd == pytest.approx(row.sd * math.sqrt(3 / 2), abs=1e-4)
    if row.percent is not None:
        base = published.LOSSES[backbone]["standard"].per_seed
        assert compare_paired(base, row.per_seed).percent == pytest.approx(row.percent, abs=6e-3)


@pytest.mark.parametrize(
    ("variant", "p", "wins"),
    [("lif-fixed", 0.16, 0), ("lif", 0.23, 3), ("lif-refractory", 0.59, 1), ("qwen-gate", 0.20, 0)],
)
def test_p_of_the_published_table(variant: str, p: float, wins: int) -> None:
    rows = published.LOSSES["transformer"]
    comparison = compare_paired(rows["standard"].per_seed, rows[variant].per_seed)
    assert comparison.t_p == pytest.approx(p, abs=5e-3)
    assert (comparison.n, comparison.wins, comparison.ties) == (3, wins, 0)


@pytest.mark.parametrize(
    ("base", "other", "n", "difference", "wins", "p", "dz"),
    [
        (STANDARD, LIF, 8, 0.01, 4, 0.97, 0.01),
        (STANDARD, HEAD, 7, 0.07, 4, 0.82, 0.09),
        (STANDARD, REFRACTORY_HEAD, 7, -0.45, 5, 0.18, -0.58),
        (LIF, REFRACTORY_HEAD, 7, -0.45, 6, 0.009, -1.45),
    ],
)
def test_the_later_eight_seeds(
    base: list[float],
    other: list[float | None],
    n: int,
    difference: float,
    wins: int,
    p: float,
    dz: float,
) -> None:
    pairs = [(a, b) for a, b in zip(base, other, strict=True) if b is not None]
    comparison = compare_paired([a for a, _ in pairs], [b for _, b in pairs])
    assert comparison.n == n
    assert comparison.percent == pytest.approx(difference, abs=5e-3)
    assert comparison.wins == wins
    assert comparison.t_p == pytest.approx(p, abs=5e-3)
    assert comparison.dz == pytest.approx(dz, abs=5e-3)
    low, high = comparison.t_interval or (0, 0)
    assert (low <= 0 <= high) == (p >= 0.05)
    low, high = comparison.bootstrap_interval or (0, 0)
    assert low < comparison.difference < high


def test_the_spread_of_the_later_eight_seeds() -> None:
    comparison = compare_paired(STANDARD, LIF)
    assert comparison.base.sd == pytest.approx(0.0159, abs=6e-5)
    assert comparison.other.sd == pytest.approx(0.0130, abs=6e-5)
    assert comparison.variance is not None
    assert comparison.variance.sd_ratio == pytest.approx(1 / 1.22, abs=5e-3)
    assert comparison.variance.f_p == pytest.approx(0.61, abs=5e-3)


def test_wilcoxon_is_exact_for_few_pairs() -> None:
    comparison = compare_paired([0.0] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert comparison.wilcoxon_p == pytest.approx(2**-5)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_pairs_have_means_and_no_test(n: int) -> None:
    comparison = compare_paired([2.0, 3.0][:n], [1.5, 3.5][:n])
    assert comparison.n == n
    assert comparison.difference == pytest.approx(-0.5 if n == 1 else 0.0)
    assert comparison.base.sd == (None if n == 1 else pytest.approx(math.sqrt(0.5)))
    assert comparison.t_p is None
    assert comparison.wilcoxon_p is None
    assert comparison.dz is None
    assert comparison.t_interval is None
    assert comparison.bootstrap_interval is None
    assert comparison.variance is None


def test_equal_pairs_are_no_evidence() -> None:
    comparison = compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (comparison.wins, comparison.ties) == (0, 3)
    assert (comparison.t_p, comparison.wilcoxon_p, comparison.dz) == (1.0, 1.0, None)
    assert comparison.t_interval == comparison.bootstrap_interval == (0.0, 0.0)
    assert comparison.variance is not None
    assert comparison.variance.sd_ratio == 1.0
    assert comparison.variance.pitman_morgan_p is None


def test_ties_count_for_neither() -> None:
    comparison = compare_paired([1.0, 2.0, 3.0, 4.0], [1.0, 1.9, 3.2, 3.7])
    assert (comparison.wins, comparison.ties, comparison.n) == (2, 1, 4)
    assert comparison.wilcoxon_p is not None
    assert 0 < comparison.wilcoxon_p <= 1


def test_one_difference_throughout_leaves_t_undefined() -> None:
    # Sums whose rounding differs, so that the differences are equal but for their last bits.
    comparison = compare_paired([1.6, 1.7, 1.8], [1.6 - 0.1, 1.7 - 0.1, 1.8 - 0.1])
    assert comparison.t_p is None
    assert comparison.dz is None
    assert comparison.t_interval == pytest.approx((-0.1, -0.1))


def test_values_without_spread_have_no_variance_test() -> None:
    assert compare_variances([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).sd_ratio is None
    constant = compare_variances([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (constant.sd_ratio, constant.f_p, constant.pitman_morgan_p) == (0.0, None, None)


def test_no_field_is_ever_nan() -> None:
    for base in ([1.0], [1.0, 1.0], [1.0] * 3, [0.0] * 3, [0.0, 0.0, 1.0], [1.0, 2.0, 4.0]):
        for shift in (0.0, 1.0):
            comparison = compare_paired(base, [b + shift for b in base])
            variance = comparison.variance
            numbers = [
                comparison.t_p,
                comparison.wilcoxon_p,
                comparison.dz,
                comparison.percent,
                *(comparison.t_interval or ()),
                *(comparison.bootstrap_interval or ()),
                *([variance.sd_ratio, variance.f_p, variance.pitman_morgan_p] if variance else []),
            ]
            assert all(math.isfinite(value) for value in numbers if value is not None)


@pytest.mark.parametrize(
    ("base", "other"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan, 1.0], [1.0, 1.0])]
)
def test_bad_samples_are_refused(base: list[float], other: list[float]) -> None:
    with pytest.raises(ValueError, match="compare_paired"):
        compare_paired(base, other)


def test_bootstrap_covers_and_repeats() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        values = (0.3 + rng.standard_normal(25)).tolist()
        comparison = compare_paired([0.0] * 25, values)
        assert (
            comparison.bootstrap_interval == compare_paired([0.0] * 25, values).bootstrap_interval
        )
        low, high = comparison.bootstrap_interval or (0, 0)
        covered += low <= 0.3 <= high
    assert 50 <= covered < 60


def test_pitman_morgan_sees_what_the_f_test_cannot() -> None:
    """Strongly paired samples of which one is the other, shrunk."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal(12)
    other = 0.7 * base + 0.05 * rng.standard_normal(12)
    variance = compare_variances(base.tolist(), other.tolist())
    assert variance.pitman_morgan_p is not None
    assert variance.f_p is not None
    assert variance.pitman_morgan_p < 1e-3 < 0.05 < variance.f_p


def test_noise_floor() -> None:
    assert noise_floor([]) is None
    floor = noise_floor([0.003, -0.004])
    assert floor is not None
    assert floor.rms == pytest.approx(math.sqrt(12.5e-6))
    assert (floor.n, floor.maximum) == (2, 0.004)


def test_spearman() -> None:
    assert spearman([1.0, 2.0]) is None
    assert spearman([1.0, 1.0, 1.0]) is None
    assert spearman([1.0, 5.0, 9.0, 9.5]) == pytest.approx(1)
    assert spearman([4.0, 3.0, 2.0]) == pytest.approx(-1)
    # To the last digit: .8 is a cut-off.
    assert spearman([1.0, 3.0, 2.0, 4.0]) == 0.8


def test_p_against_zero() -> None:
    assert p_against_zero([1.0, 2.0]) is None
    # t = 2 / (1/√3), two degrees of freedom.
    assert p_against_zero([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)


def test_percent_of_what_is_not_above_0() -> None:
    assert compare_paired([2.0, 2.0], [1.0, 1.0]).percent == -50
    assert compare_paired([0.0, 0.0], [1.0, 1.0]).percent is None
    assert compare_paired([-0.5, -0.5], [1.0, 1.0]).percent is None


def test_principal_components() -> None:
    assert principal_components([(1.0, 2.0)]) is None
    assert principal_components([(1.0, 2.0), (1.0, 2.0)]) is None
    # Along (3, -4)/5 with a variance of 2·5²/3, and across with 2·1²/3.
    points = [(3.0, -4.0), (-3.0, 4.0), (0.8, 0.6), (-0.8, -0.6)]
    found = principal_components(points)
    assert found is not None
    assert found.shares == pytest.approx((25 / 26, 1 / 26))
    assert found.directions[0] == pytest.approx((-0.6, 0.8))
    assert found.directions[1] == pytest.approx((0.8, 0.6))


def test_power_of_paired_tests() -> None:
    """Against the examples of G*Power's manual, and scipy's noncentral t."""
    assert power(0.5, 1, 34) == pytest.approx(0.8077775, abs=1e-7)
    assert power(-0.2 * 7, 7, 199) == pytest.approx(0.8016910, abs=1e-7)
    for n, dz in itertools.product((3, 4, 8, 50, 1000), (0, 0.05, 0.5, 1.5)):
        critical, shift = stats.t.isf(0.025, n - 1), dz * math.sqrt(n)
        expected = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        if not math.isnan(expected):
            assert power(dz, 1, n) == pytest.approx(expected, abs=1e-9)
    # Where scipy has NaN.
    assert power(1e6, 1, 3) == power(40, 1, 8) == 1


@pytest.mark.parametrize("n", [3, 8, 40])
def test_smallest_detectable_difference(n: int) -> None:
    found = detectable_difference(0.002, n)
    assert found is not None
    assert power(found, 0.002, n) == pytest.approx(0.8)
    assert detectable_difference(0.004, n) == pytest.approx(2 * found)
    sample = np.random.default_rng(0).normal(found, 0.002, (4000, n))
    assert np.mean(stats.ttest_1samp(sample, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.02
    )


@pytest.mark.parametrize(("sd", "n"), [(None, 3), (0.0, 3), (0.1, 2), (0.1, 1)])
def test_no_power_without_a_test(sd: float | None, n: int) -> None:
    assert detectable_difference(sd, n) is None
    with pytest.raises(ValueError, match="sd must be above 0 and n at least 3"):
        power(1, sd or 0, n)


@pytest.mark.parametrize(("n", "n_base"), [(3, 3), (8, 3), (3, 20)])
def test_smallest_detectable_ratio(n: int, n_base: int) -> None:
    ratio = detectable_ratio(n, n_base)
    random = np.random.default_rng(0)
    own, base = random.normal(0, ratio, (20_000, n)), random.normal(0, 1, (20_000, n_base))
    quotients = np.square(own).mean(1) / np.square(base).mean(1)
    found = stats.f.sf(quotients, n, n_base) < 0.05
    assert np.mean(found) == pytest.approx(0.8, abs=0.01)


def test_holm_corrects_for_the_number_of_hypotheses() -> None:
    # By hand: 4 * .01, 3 * .013, 2 * .03, .2, none smaller than one before it.
    assert holm([0.03, 0.01, 0.2, 0.013]) == pytest.approx([0.06, 0.04, 0.2, 0.04])
    # What is decided without a test counts, and comes last.
    assert holm([0.03, None, 0.01]) == [pytest.approx(0.06), None, pytest.approx(0.03)]
    assert holm([0.5, 0.6, 1.0]) == [1, 1, 1]
    assert holm([]) == []
    assert holm([None]) == [None]
    for wrong in ([1.1], [math.nan], [-0.1]):
        with pytest.raises(ValueError, match="holm: "):
            holm(wrong)


def test_holm_keeps_false_findings_rare() -> None:
    """Of 20 true hypotheses one or more is rejected in 5 % of all families, not in 64 %."""
    families = np.random.default_rng(1).random((2000, 20))
    rejected = [min(p or 0 for p in holm(family.tolist())) < 0.05 for family in families]
    assert np.mean(rejected) == pytest.approx(0.05, abs=0.015)
