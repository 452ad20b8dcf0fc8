"""Rules about losses: effects, spread, crossovers, the start of training, and parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scipy import stats

from ember_ext.paper import published
from ember_ext.paper.claims.judging import (
    CRITICAL_WINDOW,
    SIGNIFICANCE,
    Finding,
    NotTestableError,
    Rule,
    SeedTest,
    differs,
    every,
    need_config,
    need_resolution,
    need_runs,
    seeds_missing,
)
from ember_ext.paper.formatting import noise_text, number, p_value, signed
from ember_ext.paper.runs.finished import BASELINE, LIF, NULL, FinishedRuns
from ember_ext.paper.statistics.comparisons import (
    compare,
    extra_parameters,
    final_loss,
    measure_noise,
)
from ember_ext.paper.statistics.crossover import find_crossovers
from ember_ext.paper.statistics.heads import gate_units
from ember_ext.paper.statistics.paired import MIN_PAIRS, noise_floor
from ember_ext.paper.statistics.power import detectable_ratio

MAX_START_PERCENT = 0.1
"""Percent of the baseline's loss within which a gate that is open leaves it before training."""

MAX_START_CONTRAST = 1.1
"""g(1)/g(0) up to which a gate on attention is open: it favours no weight by more than a tenth."""

MIN_START_FIRE_RATE = 0.99
"""Fire rate from which a gate on neurons is open: the paper's word for pass-through is 1.000."""

MIN_SPREAD_SEEDS = 6
"""Fewest seeds from which two spreads that a test cannot tell apart count as alike."""

PARAMETER_RATIO = 8000

SMALLEST_LOSS = 5e-5
"""Half a unit in the last of the four digits to which the paper gives losses."""


def wins_every_seed(backbone: str, variant: str) -> Rule:
    """The rule that a variant's best loss is below the baseline's in every seed, beyond noise."""

    def judge(finished: FinishedRuns) -> Finding:
        need_runs(finished, backbone, BASELINE, variant)
        comparison = compare(finished, backbone, variant)
        assert comparison is not None
        floor = measure_noise(finished, backbone)
        listed = ", ".join(signed(difference, 5) for difference in comparison.differences)
        evidence = (
            f"{backbone}: lower in {comparison.wins} of {comparison.n} seeds, differences "
            f"{listed}; {noise_text(floor)}"
        )
        if comparison.wins < comparison.n:
            return Finding(False, evidence)
        if floor is None or floor.n < MIN_PAIRS:
            raise NotTestableError(f"fewer than {MIN_PAIRS} null pairs; {evidence}")
        return Finding(max(comparison.differences) < -floor.rms, evidence)

    return judge


def least_spread(backbone: str, variant: str, others: Sequence[str]) -> Rule:
    """The rule that a variant's losses vary least over seeds, and less than the baseline's.

    It holds if its sd is the smallest, each time over common seeds, the Pitman-Morgan test against
    the baseline gives p < .05, and the two sds differ by more than those of the null runs and the
    baseline. It takes 6 seeds to say no, unless another sd is smaller with p < .05: with 3, even a
    seventh of the spread gives p > .05, and half of the spread is not the smallest half the time.
    """

    def judge(finished: FinishedRuns) -> Finding:
        need_runs(finished, backbone, BASELINE, variant)
        # Comparisons in which another variant has the smaller spread: their seeds and p.
        smaller, listed, missing = [], [], []
        for other in (BASELINE, *others):
            against = compare(finished, backbone, variant, base=other)
            if against is None or against.n < MIN_PAIRS:
                missing.append(other)
                continue
            assert against.base.sd is not None
            assert against.other.sd is not None
            assert against.variance is not None
            if against.base.sd < against.other.sd:
                smaller.append((against.n, against.variance.pitman_morgan_p))
            listed.append(
                f"{against.other.sd:.4f} against {other} {against.base.sd:.4f} ({against.n} seeds)"
            )
            if other == BASELINE:
                seeds, p = against.n, against.variance.pitman_morgan_p
                difference = against.base.sd - against.other.sd
        evidence = (
            f"{backbone}, sd of {variant}'s best val loss: {', '.join(listed)}; Pitman-Morgan "
            f"against {BASELINE} p = {p_value(p)}"
        )
        spread = f"{backbone}, variance of the best val loss: {variant} against {BASELINE}"
        tests = (SeedTest(spread, seeds, p),)
        if any(n >= MIN_SPREAD_SEEDS or (p is not None and p < SIGNIFICANCE) for n, p in smaller):
            return Finding(False, evidence, tests)
        if smaller:
            fewest = min(n for n, _ in smaller)
            raise NotTestableError(
                f"not the smallest, but {seeds_missing(fewest, MIN_SPREAD_SEEDS)}; {evidence}"
            )
        if missing:
            raise NotTestableError(
                f"fewer than {MIN_PAIRS} common seeds with {', '.join(missing)}; {evidence}"
            )
        if p is None:
            raise NotTestableError(f"the variances cannot be compared; {evidence}")
        if p >= SIGNIFICANCE:
            if seeds < MIN_SPREAD_SEEDS:
                raise NotTestableError(f"{seeds_missing(seeds, MIN_SPREAD_SEEDS)}; {evidence}")
            return Finding(False, evidence, tests)
        null = compare(finished, backbone, NULL)
        if null is None or null.n < MIN_PAIRS or null.other.sd is None or null.base.sd is None:
            raise NotTestableError(f"fewer than {MIN_PAIRS} null pairs; {evidence}")
        noise = abs(null.other.sd - null.base.sd)
        evidence += f"; sds of {NULL} and {BASELINE} differ by {noise:.4f}"
        return Finding(difference > noise, evidence, tests)

    return judge


def refractory_lowers(finished: FinishedRuns) -> Finding:
    """Whether refractory thresholds lower the Transformer's loss, and which way they look."""
    finding = differs("transformer", "lif-refractory", -1)(finished)
    mode = need_config(finished, "transformer").get("refractory_mode")
    look = (
        "look ahead, so this is not the loss of a language model"
        if mode == "look_ahead"
        else "look at the past only, while the published ones look ahead"
    )
    evidence = f"{finding.evidence}; thresholds of mode {mode!r} {look}"
    return dataclasses.replace(finding, evidence=evidence)


def lowers_both(variant: str) -> Rule:
    """The rule that a variant of the Transformer's LIF has a lower loss than Standard and LIF."""
    return every(*(differs("transformer", variant, -1, base=base) for base in (BASELINE, LIF)))


def persistence_lowers(finished: FinishedRuns) -> Finding:
    """Whether persistent heads have a lower loss than Standard and LIF, and where they look."""
    finding = lowers_both("lif-persistent")(finished)
    mode = finished.runs("transformer", "lif-persistent")[0].config.get("persistence_mode")
    look = (
        "looks ahead, so this is not the loss of a language model"
        if mode == "look_ahead"
        else "looks at the past only, while that of the released code looks ahead"
    )
    evidence = f"{finding.evidence}; memory of mode {mode!r} {look}"
    return dataclasses.replace(finding, evidence=evidence)


def within_noise(backbone: str, variant: str, base: str) -> Rule:
    """The rule that a variant differs from a base as runs do that only rounding sets apart.

    It holds unless an F-test finds the mean square of their differences in the best val loss above
    that of the null pairs, with p < .05. Differences below the digits of the paper are none. The
    evidence has the test's p, and the ratio that it would have found, whatever decides. Without any
    difference between null pairs there is no test.
    """

    def judge(finished: FinishedRuns) -> Finding:
        need_runs(finished, backbone, base, variant)
        comparison = compare(finished, backbone, variant, base=base)
        assert comparison is not None
        floor, own = measure_noise(finished, backbone), noise_floor(comparison.differences)
        assert own is not None
        listed = ", ".join(signed(difference, 5) for difference in comparison.differences)
        evidence = (
            f"{backbone}: {variant} minus {base} by seed: {listed}, RMS {number(own.rms, 5)}; "
            f"{noise_text(floor)}"
        )
        if floor is None or floor.n < MIN_PAIRS:
            raise NotTestableError(f"fewer than {MIN_PAIRS} null pairs; {evidence}")
        small = own.rms <= SMALLEST_LOSS
        if floor.rms == 0:
            return Finding(small, f"{evidence}; no F-test, because no null pair differs")
        p = float(stats.f.sf((own.rms / floor.rms) ** 2, own.n, floor.n))
        ratio = detectable_ratio(own.n, floor.n)
        evidence += (
            f"; one-sided F-test p = {p_value(p)}, which finds an RMS {ratio:.2f} times that of "
            "the null pairs with a power of 80%"
        )
        if small:
            evidence += f"; an RMS of at most {SMALLEST_LOSS:.5f} counts as none"
        test = SeedTest(
            f"{backbone}, best val loss: {variant} minus {base} against the null pairs (F-test)",
            own.n,
            p,
            detectable_ratio=ratio,
        )
        return Finding(small or p >= SIGNIFICANCE, evidence, (test,))

    return judge


def critical_period(backbone: str) -> Rule:
    """The rule that LIF falls below the baseline at step 1600 ± 200 in every seed, and stays there.

    On average the final difference has to exceed the noise floor besides.
    """

    def judge(finished: FinishedRuns) -> Finding:
        need_resolution(finished, backbone)
        need_runs(finished, backbone, BASELINE, LIF)
        crossovers = find_crossovers(finished.pairs(backbone, LIF)).crossovers
        null = find_crossovers(finished.pairs(backbone, NULL)).crossovers
        steps = [c.persistent for c in crossovers]
        target = published.CRITICAL_STEP
        inside = [s is not None and abs(s - target) <= CRITICAL_WINDOW for s in steps]
        comparison = compare(finished, backbone, LIF, final_loss)
        assert comparison is not None
        floor = measure_noise(finished, backbone, final_loss)
        evidence = (
            f"{backbone}, persistent crossover by seed: {_steps(steps)}; first below: "
            f"{_steps([c.first for c in crossovers])}; null pairs, persistent: "
            f"{_steps([c.persistent for c in null])}; final difference "
            f"{signed(comparison.difference, 5)}, {noise_text(floor)}"
        )
        if not all(inside):
            return Finding(False, evidence)
        if floor is None or floor.n < MIN_PAIRS:
            raise NotTestableError(f"fewer than {MIN_PAIRS} null pairs; {evidence}")
        return Finding(comparison.difference < -floor.rms, evidence)

    return judge


def _steps(steps: Sequence[int | None]) -> str:
    return ", ".join("none" if step is None else str(step) for step in steps) or "not run"


def starts_open(backbone: str, variant: str) -> Rule:
    """The rule that gates let everything pass before training, and leave the loss as it is.

    The loss alone says little: an untrained model's hardly depends on what its layers do.
    """

    def judge(finished: FinishedRuns) -> Finding:
        need_runs(finished, backbone, BASELINE, variant)
        changes = []
        pairs = finished.pairs(backbone, variant)
        for pair in pairs:
            before, after = (run.evaluations[0] for run in pair)
            if before["step"] or after["step"]:
                raise NotTestableError(f"{backbone}: no evaluation before the first step")
            changes.append(100 * (after["val_loss"] / before["val_loss"] - 1))
        if backbone == "transformer":
            contrast = max(unit.contrast for _, run in pairs for unit in gate_units(run, 0))
            is_open = contrast <= MAX_START_CONTRAST
            gates = f"largest contrast g(1)/g(0) of a gate {contrast:.3f}"
        else:
            rate = min(rate for _, run in pairs for rate in run.evaluations[0]["fire_rate"])
            is_open = rate >= MIN_START_FIRE_RATE
            gates = f"smallest fire rate of a layer {number(rate)}"
        listed = ", ".join(f"{change:+.3f}%" for change in changes)
        preset = pairs[0].other.config["gate_preset"]
        evidence = (
            f"{backbone} before training, preset {preset}: loss of {variant} against {BASELINE} "
            f"{listed}; {gates}"
        )
        return Finding(is_open and max(map(abs, changes)) <= MAX_START_PERCENT, evidence)

    return judge


def _at_paper_scale(finished: FinishedRuns, backbone: str) -> None:
    config = need_config(finished, backbone)
    scale = published.scale_of(config)
    if scale == "stated":
        raise NotTestableError(
            f"{backbone}: {config['n_layer']} layers of {config['n_embd']}, which are the sizes "
            "that the paper's text states, not those that the published losses come from"
        )
    if scale != "paper":
        raise NotTestableError(
            f"{backbone}: {config['n_layer']} layers of {config['n_embd']}, not the paper's sizes"
        )


def _extra(finished: FinishedRuns, backbone: str, variant: str) -> int:
    need_config(finished, backbone)
    extra = extra_parameters(finished, backbone, variant)
    if extra is None:
        raise NotTestableError(f"no run of {backbone} {BASELINE} or {variant}")
    return extra


def has_parameters(backbone: str, variant: str, expected: int) -> Rule:
    """The rule that a variant of the paper's sizes adds some number of parameters."""

    def judge(finished: FinishedRuns) -> Finding:
        _at_paper_scale(finished, backbone)
        extra = _extra(finished, backbone, variant)
        return Finding(extra == expected, f"{backbone} {variant}: {extra:,} extra parameters")

    return judge


def parameter_ratio(finished: FinishedRuns) -> Finding:
    """Whether Qwen's gate adds 8,000 times the parameters of LIF at the paper's sizes."""
    gate, lif = _extra(finished, "transformer", "qwen-gate"), _extra(finished, "transformer", LIF)
    evidence = f"{gate:,} parameters against {lif:,}: {gate / lif:,.0f} times"
    if published.scale_of(need_config(finished, "transformer")) != "paper":
        raise NotTestableError(f"not the paper's sizes, which set the ratio; {evidence}")
    return Finding(gate / lif >= PARAMETER_RATIO, evidence)
