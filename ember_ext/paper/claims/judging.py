"""The rules by which claims are judged: each looks at runs and says whether a claim holds there.

A rule returns a `Finding`, or raises `NotTestableError` where the runs cannot answer. A rule of
several parts fails if one part fails, even where another part is not testable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ember_ext.paper import published
from ember_ext.paper.formatting import comparison_text, noise_text, p_value, signed
from ember_ext.paper.runs.finished import BASELINE, FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.comparisons import Measure, best_loss, compare, measure_noise
from ember_ext.paper.statistics.paired import MIN_PAIRS, p_against_zero
from ember_ext.paper.statistics.power import detectable_difference, power

SIGNIFICANCE = 0.05

MIN_LAYERS = 4
"""Fewest layers over which a trend with depth can be told from two layers that differ."""

MIN_SPEARMAN = 0.8
"""Mean rank correlation with depth from which values count as rising."""

CRITICAL_WINDOW = 200
"""Steps around 1600 that a crossover may be off: the published evaluation interval."""


@dataclass(frozen=True)
class SeedTest:
    """A test over seeds that a finding rests on.

    Attributes:
        what: which numbers are compared.
        n: number of seeds.
        p: two-sided; None where all differences are one number other than 0.
        difference: mean of the differences; None if the test is of something else than a mean.
        sd: their standard deviation (ddof 1); None as `difference`.
        base: mean of what it is compared with; None if that is 0.
        published: the effect that the paper reports for its own sizes, in percent of the base, if
            it reports one.
        authors_xs: the effect that its authors' own runs of the xs sizes have, in percent; None for
            runs of other sizes, and where the authors have none.
        digits: of the numbers in tables.
        detectable_ratio: of an F-test, the smallest true ratio of RMS that it finds with a power of
            80 %; None for other tests.
    """

    what: str
    n: int
    p: float | None
    difference: float | None = None
    sd: float | None = None
    base: float | None = None
    published: float | None = None
    authors_xs: float | None = None
    digits: int = 5
    detectable_ratio: float | None = None

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that it finds with a power of 80 %; None without an sd."""
        return detectable_difference(self.sd, self.n)

    @property
    def published_power(self) -> float | None:
        """The chance of finding an effect as large as the published one, if there is one."""
        return self._power_for(self.published)

    @property
    def authors_xs_power(self) -> float | None:
        """The chance of finding an effect as large as that of the authors' xs runs, if any."""
        return self._power_for(self.authors_xs)

    def _power_for(self, effect: float | None) -> float | None:
        if effect is None or self.base is None or not self.sd:
            return None
        return power(effect / 100 * self.base, self.sd, self.n)


@dataclass(frozen=True)
class Finding:
    """The finding of a rule.

    Attributes:
        holds: whether the claim does.
        evidence: the numbers behind it.
        tests: those that it rests on, of all parts.
    """

    holds: bool
    evidence: str
    tests: tuple[SeedTest, ...] = ()


class NotTestableError(Exception):
    """These runs cannot answer; the text says why, with what numbers there are."""


class NotRunError(NotTestableError):
    """No run is of the backbone that the claim is about."""


Rule = Callable[[FinishedRuns], Finding]


def every(*rules: Rule) -> Rule:
    """The rule that all of some rules hold."""

    def judge(finished: FinishedRuns) -> Finding:
        findings, reasons = [], []
        for rule in rules:
            try:
                findings.append(rule(finished))
            except NotTestableError as reason:
                reasons.append(reason)
        tests = tuple(dict.fromkeys(test for finding in findings for test in finding.tests))
        failed = [finding.evidence for finding in findings if not finding.holds]
        if failed:
            return Finding(False, "; ".join(dict.fromkeys(failed)), tests)
        if reasons:
            was_run = findings or not all(isinstance(reason, NotRunError) for reason in reasons)
            kind = NotTestableError if was_run else NotRunError
            raise kind("; ".join(dict.fromkeys(map(str, reasons))))
        return Finding(True, "; ".join(dict.fromkeys(f.evidence for f in findings)), tests)

    return judge


def need_runs(
    finished: FinishedRuns, backbone: str, *variants: str, seeds: int = MIN_PAIRS
) -> None:
    """Require runs of all variants over enough common seeds.

    Raises:
        NotTestableError: there are fewer.
    """
    found: list[set[int]] = []
    for variant in variants:
        found.append({run.seed for run in finished.runs(backbone, variant)})
        if not found[-1]:
            kind = NotTestableError if backbone in finished.backbones else NotRunError
            raise kind(f"no run of {backbone} {variant}")
    common = len(set.intersection(*found))
    if common < seeds:
        names = " and ".join(variants)
        raise NotTestableError(f"{backbone} {names}: {seeds_missing(common, seeds)}")


def seeds_missing(got: int, needed: int = MIN_PAIRS) -> str:
    """Why too few seeds cannot answer."""
    return f"{got} of at least {needed} common seeds"


def need_config(finished: FinishedRuns, backbone: str) -> dict[str, Any]:
    """The configuration of a backbone's runs.

    Raises:
        NotRunError: it has none.
    """
    config = finished.config(backbone)
    if config is None:
        raise NotRunError(f"no run of {backbone}")
    return config


def need_layers(finished: FinishedRuns, backbone: str, layers: int = MIN_LAYERS) -> None:
    """Require models of some depth.

    Raises:
        NotTestableError: they have fewer layers, or there are none.
    """
    got = need_config(finished, backbone)["n_layer"]
    if got < layers:
        raise NotTestableError(f"{backbone}: {got} layers, at least {layers} needed")


def need_resolution(finished: FinishedRuns, backbone: str) -> None:
    """Require evaluations close enough around step 1600, and training well past it.

    Raises:
        NotTestableError: they are further apart, it ends sooner, or there are no runs.
    """
    config = need_config(finished, backbone)
    past = published.CRITICAL_STEP + CRITICAL_WINDOW
    if config["steps"] < past:
        raise NotTestableError(
            f"{backbone}: {config['steps']} steps, at least {past} needed to pass "
            f"{published.CRITICAL_STEP}"
        )
    if config["eval_interval"] > CRITICAL_WINDOW:
        raise NotTestableError(
            f"{backbone}: evaluated every {config['eval_interval']} steps, at most "
            f"{CRITICAL_WINDOW} needed"
        )


def differs(
    backbone: str,
    variant: str,
    sign: int,
    *,
    base: str = BASELINE,
    measure: Measure = best_loss,
    base_measure: Measure | None = None,
    name: str = "best val loss",
    digits: int = 4,
) -> Rule:
    """The rule that a variant lies below (-1) or above (+1) a base, beyond chance and noise.

    It holds if the mean difference over common seeds has the sign, its paired t-test gives p < .05,
    and it exceeds the RMS difference of null pairs in the same measure. Where all seeds differ by
    the same, as counts may, chance has no part and the noise floor alone decides.

    Args:
        backbone: "transformer" or "cfc".
        variant: what is compared.
        sign: -1 or 1.
        base: what it is compared with.
        measure: of the variant.
        base_measure: of the base and of null pairs; by default `measure`.
        name: what the evidence calls the measure.
        digits: of its numbers.
    """
    of_base = base_measure or measure

    def by_variant(run: RunResult) -> float:
        return measure(run) if run.variant == variant else of_base(run)

    def judge(finished: FinishedRuns) -> Finding:
        need_runs(finished, backbone, base, variant, seeds=1)
        comparison = compare(finished, backbone, variant, by_variant, base)
        assert comparison is not None
        floor = measure_noise(finished, backbone, of_base)
        evidence = (
            f"{backbone}, {name}: {comparison_text(comparison, variant, base, digits)}; "
            f"{noise_text(floor, digits)}"
        )
        if comparison.n < MIN_PAIRS:
            raise NotTestableError(f"{seeds_missing(comparison.n)}; {evidence}")
        printed, small = None, None
        if measure is best_loss and base == BASELINE:
            printed = published.LOSSES[backbone].get(variant)
            if published.scale_of(need_config(finished, backbone)) == "xs":
                small = published.XS_LOSSES[backbone].get(variant)
        test = SeedTest(
            f"{backbone}, {name}: {variant} against {base}",
            comparison.n,
            comparison.t_p,
            comparison.difference,
            float(np.std(comparison.differences, ddof=1)),
            comparison.base.mean or None,
            printed.percent if printed else None,
            small.percent if small else None,
            digits + 1,
        )
        if sign * comparison.difference <= 0:
            return Finding(False, evidence, (test,))
        if comparison.t_p is not None and comparison.t_p >= SIGNIFICANCE:
            return Finding(False, evidence, (test,))
        if floor is None or floor.n < MIN_PAIRS:
            raise NotTestableError(f"fewer than {MIN_PAIRS} null pairs; {evidence}")
        if abs(comparison.difference) <= floor.rms:
            evidence += "; on average no more than rounding does to one pair"
            return Finding(False, evidence, (test,))
        return Finding(True, evidence, (test,))

    return judge


def rises_on_average(
    rises: Sequence[float], correlation: float | None, what: str, digits: int
) -> Finding:
    """Whether values rise from the first layer to the last, and in between.

    It holds if the mean rise is above 0 with p < .05 (t-test over seeds) or equal in all seeds, and
    the mean rank correlation with depth is at least 0.8.
    """
    mean, p = float(np.mean(rises)), p_against_zero(rises)
    evidence = (
        f"{what}: last minus first layer {signed(mean, digits)} over {len(rises)} seeds, "
        f"p = {p_value(p)}, Spearman {signed(correlation, 2)}"
    )
    rising = mean > 0 and correlation is not None and correlation >= MIN_SPEARMAN
    sd = float(np.std(rises, ddof=1))
    test = SeedTest(f"{what}: last minus first layer", len(rises), p, mean, sd, digits=digits + 1)
    return Finding(rising and (p is None or p < SIGNIFICANCE), evidence, (test,))
