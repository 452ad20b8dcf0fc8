"""Verdicts on made-up runs of which one knows what they must be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from synthetic_results import LATER_VARIANTS, SEEDS, Effect, synthetic_results

from ember_ext.paper.claims.judging import (
    Finding,
    NotTestableError,
    Rule,
    SeedTest,
    differs,
    every,
)
from ember_ext.paper.claims.verdicts import Claim, claims
from ember_ext.paper.formatting import DASH, p_value
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.correction import holm
from ember_ext.paper.statistics.power import detectable_difference, detectable_ratio, power
from ember_ext.paper.tables import claim_tables as tables_of_claims

SUPPORTED, REFUTED, UNTESTABLE = "supported", "not supported", "not testable at this scale"

QUIET = Effect(noise=2e-5)

PAPER_TRANSFORMER: dict[str, Any] = {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 256,
    "steps": 2000,
    "eval_interval": 500,
}
PAPER_CFC: dict[str, Any] = {
    "n_layer": 4,
    "n_embd": 256,
    "cfc_units": 384,
    "block_size": 256,
}


def judged(results: Sequence[RunResult]) -> dict[str, Claim]:
    return {claim.key: claim for claim in claims(results)}


def verdicts(results: Sequence[RunResult], *keys: str) -> list[str]:
    by_key = judged(results)
    return [by_key[key].verdict for key in keys]


def test_without_runs_nothing_is_testable() -> None:
    found = claims([])
    assert {claim.verdict for claim in found} == {UNTESTABLE}
    assert all(claim.evidence and claim.criterion and claim.statement for claim in found)
    assert len({claim.key for claim in found}) == len(found)


@pytest.mark.parametrize("backbone", ["transformer", "cfc"])
@pytest.mark.parametrize(("loss", "verdict"), [(-0.006, SUPPORTED), (0, REFUTED), (0.006, REFUTED)])
def test_effects_on_the_loss(backbone: str, loss: float, verdict: str) -> None:
    results = synthetic_results({"lif": Effect(loss=loss)}, backbone=backbone)
    keys = f"loss-{backbone}", f"wins-every-seed-{backbone}"
    assert verdicts(results, *keys) == [verdict, verdict]
    claim = judged(results)[f"loss-{backbone}"]
    assert "paired t p = " in claim.evidence
    assert "noise floor 0.0" in claim.evidence


@pytest.mark.parametrize("seeds", [SEEDS[:1], SEEDS[:2]])
def test_too_few_seeds(seeds: tuple[int, ...]) -> None:
    results = synthetic_results({"lif": Effect(loss=-0.1)}, seeds=seeds)
    results += synthetic_results({"lif": Effect(loss=-0.1)}, seeds=seeds, backbone="cfc")
    assert {claim.verdict for claim in claims(results)} == {UNTESTABLE}
    evidence = judged(results)["loss-transformer"].evidence
    assert f"{len(seeds)} of at least 3 common seeds" in evidence
    assert f"lower in {len(seeds)} of {len(seeds)}" in evidence


def test_seeds_that_no_pair_shares() -> None:
    effects = {"lif": Effect(loss=-0.1)}
    results = synthetic_results(effects, variants=("standard", "null"), seeds=(1, 2, 3))
    results += synthetic_results(effects, variants=("lif",), seeds=(3, 4, 5))
    assert verdicts(results, "loss-transformer", "seed-stability") == [UNTESTABLE] * 2


@pytest.mark.parametrize("missing", ["standard", "lif"])
def test_missing_variants(missing: str) -> None:
    effects = {"lif": Effect(loss=-0.1)}
    variants = [v for v in ("standard", "lif", "qwen-gate", "null") if v != missing]
    results = synthetic_results(effects, variants=variants)
    by_key = judged(results)
    assert by_key["loss-transformer"].verdict == UNTESTABLE
    assert f"no run of transformer {missing}" in by_key["loss-transformer"].evidence
    assert by_key["loss-cfc"].verdict == UNTESTABLE


def test_without_null_pairs_an_effect_can_be_refuted_but_not_supported() -> None:
    variants = ("standard", "lif", "qwen-gate")
    effects = {"lif": Effect(loss=-0.006), "qwen-gate": Effect(loss=-0.006)}
    results = synthetic_results(effects, variants=variants)
    keys = "loss-transformer", "wins-every-seed-transformer", "qwen-worse"
    assert verdicts(results, *keys) == [UNTESTABLE, UNTESTABLE, REFUTED]
    assert "null pairs" in judged(results)["loss-transformer"].evidence


def test_a_sure_effect_within_the_noise_is_not_supported() -> None:
    effects = {
        "standard": QUIET,
        "lif": Effect(loss=-5e-4, noise=2e-5),
        "null": Effect(noise=2e-3),
    }
    keys = "loss-transformer", "wins-every-seed-transformer"
    results = synthetic_results(effects)
    assert verdicts(results, *keys) == [REFUTED, REFUTED]
    evidence = judged(results)["loss-transformer"].evidence
    assert "lower in 3 of 3" in evidence
    assert evidence.endswith("on average no more than rounding does to one pair")
    effects["null"] = QUIET
    assert verdicts(synthetic_results(effects), *keys) == [SUPPORTED, SUPPORTED]


def test_equal_runs_are_no_gain() -> None:
    results = synthetic_results({v: Effect(noise=0) for v in ("standard", "lif", "null")})
    assert verdicts(results, "loss-transformer", "wins-every-seed-transformer") == [REFUTED] * 2


@pytest.mark.parametrize(("noise", "verdict"), [(0.125, SUPPORTED), (0.5, REFUTED)])
def test_one_difference_throughout_is_judged_by_the_noise(noise: float, verdict: str) -> None:
    results = synthetic_results()
    shifts = {"lif": -0.25, "null": noise}
    for run in results:
        for record in run.evaluations:
            loss = 1.5 + 0.25 * SEEDS.index(run.seed) + shifts.get(run.variant, 0.0)
            record["val_loss_estimate"] = loss
    claim = judged(results)["loss-transformer"]
    assert claim.verdict == verdict
    assert "paired t" not in claim.evidence


def test_chance_is_seldom_taken_for_an_effect() -> None:
    """A one-sided .025, and the noise floor on top."""
    rule = differs("transformer", "lif", -1)
    supported = 0
    for start in range(0, 600, 3):
        results = synthetic_results(
            variants=("standard", "lif", "null"),
            seeds=range(start, start + 3),
            steps=2,
            eval_interval=1,
        )
        supported += rule(FinishedRuns(results)).holds
    assert supported <= 12


def test_rows_of_table_3_1() -> None:
    effects = {
        "lif": Effect(loss=-0.006),
        "lif-text": Effect(loss=0.006),
        "lif-fixed": Effect(loss=0.006),
        "lif-refractory": Effect(loss=-0.004),
        "qwen-gate": Effect(loss=0.01),
    }
    keys = (
        "best-condition",
        "fixed-worse",
        "refractory-better",
        "qwen-worse",
        "lif-beats-qwen",
        "loss-text-gate-transformer",
    )
    results = synthetic_results(effects, seeds=range(8))
    assert verdicts(results, *keys) == [SUPPORTED] * 5 + [REFUTED]
    assert verdicts(synthetic_results(seeds=range(8)), *keys) == [REFUTED] * 6


def test_seed_stability() -> None:
    seeds = range(8)
    effects = {v: Effect(noise=1e-4) for v in ("standard", "null", "lif-fixed", "qwen-gate")}
    calm = {**effects, "lif": Effect(spread=0.2, noise=1e-4)}
    assert verdicts(synthetic_results(calm, seeds=seeds), "seed-stability") == [SUPPORTED]
    assert verdicts(synthetic_results(effects, seeds=seeds), "seed-stability") == [REFUTED]
    wild = {**effects, "lif": Effect(spread=3, noise=1e-4)}
    assert verdicts(synthetic_results(wild, seeds=seeds), "seed-stability") == [REFUTED]
    noisy = {**calm, "null": Effect(spread=3, noise=1e-4)}
    assert verdicts(synthetic_results(noisy, seeds=seeds), "seed-stability") == [REFUTED]
    calmer_yet = {**calm, "qwen-gate": Effect(spread=0.05, noise=1e-5)}
    assert verdicts(synthetic_results(calmer_yet, seeds=seeds), "seed-stability") == [REFUTED]
    some = synthetic_results(calm, seeds=seeds, variants=("standard", "lif", "null"))
    assert verdicts(some, "seed-stability") == [UNTESTABLE]
    assert verdicts(synthetic_results(calm, seeds=seeds[:3]), "seed-stability") == [UNTESTABLE]


def test_few_seeds_refute_stability_only_with_a_sure_difference() -> None:
    effects = {v: Effect(noise=1e-4) for v in ("standard", "null", "lif-fixed", "qwen-gate")}
    # A little wider than Standard, which five seeds cannot tell; then many times as wide.
    for lif, verdict in (
        (Effect(spread=1.05, noise=2e-3), UNTESTABLE),
        (Effect(spread=20, noise=1e-5), REFUTED),
    ):
        claim = judged(synthetic_results({**effects, "lif": lif}, seeds=range(5)))["seed-stability"]
        assert claim.verdict == verdict, claim.evidence
        assert ("not the smallest, but 5 of at least 6" in claim.evidence) == (lif.spread < 2)


def test_spreads_are_compared_over_common_seeds() -> None:
    effects = {v: Effect(noise=1e-5) for v in ("standard", "null", "lif-fixed", "qwen-gate")}
    effects["lif"] = Effect(spread=0.5, noise=1e-5)
    seeds = range(8)
    # The three of these whose losses happen to lie closest: LIF's lie closer on them, too.
    lucky = min(
        itertools.combinations(seeds, 3),
        key=lambda three: np.std([np.random.default_rng(s).standard_normal() for s in three]),
    )
    several = ("lif-fixed", "lif-refractory", "qwen-gate")
    results = synthetic_results(effects, seeds=seeds, variants=("standard", "lif", "null"))
    results += synthetic_results(effects, seeds=lucky, variants=several)
    claim = judged(results)["seed-stability"]
    assert claim.verdict == SUPPORTED, claim.evidence
    assert "(8 seeds)" in claim.evidence
    assert "(3 seeds)" in claim.evidence
    two = [r for r in results if r.variant not in several or r.seed in lucky[:2]]
    assert verdicts(two, "seed-stability") == [UNTESTABLE]


RISING = (1.0, 1.5, 2.0, 2.6)
FALLING = RISING[::-1]


def hierarchy(
    transformer: dict[str, Effect], cfc: dict[str, Effect], n_layer: int = 4
) -> list[RunResult]:
    return synthetic_results(transformer, n_layer=n_layer) + synthetic_results(
        cfc, n_layer=n_layer, backbone="cfc"
    )


HIERARCHY_KEYS = (
    "hierarchy-transformer",
    "hierarchy-cfc",
    "hierarchy-absent-transformer",
    "hierarchy-absent-cfc",
    "universal-hierarchy",
)


def test_a_hierarchy_of_both_backbones() -> None:
    lif = {"lif": Effect(entropy=RISING)}
    assert verdicts(hierarchy(lif, lif), *HIERARCHY_KEYS) == [SUPPORTED] * 5


def test_a_hierarchy_of_one_backbone_is_not_universal() -> None:
    lif = {"lif": Effect(entropy=RISING)}
    expected = [SUPPORTED, REFUTED, SUPPORTED, REFUTED, REFUTED]
    falling = {"lif": Effect(entropy=FALLING)}
    assert verdicts(hierarchy(lif, falling), *HIERARCHY_KEYS) == expected


def test_a_hierarchy_that_the_baseline_has_too() -> None:
    rising = Effect(entropy=RISING, virtual_entropy=RISING)
    both = {"standard": rising, "lif": rising, "null": rising}
    expected = [SUPPORTED, SUPPORTED, REFUTED, REFUTED, REFUTED]
    assert verdicts(hierarchy(both, both), *HIERARCHY_KEYS) == expected


def test_a_hierarchy_that_the_baseline_has_more_weakly() -> None:
    weak = Effect(entropy=(1.0, 1.1, 1.2, 1.3), virtual_entropy=(1.0, 1.1, 1.2, 1.3))
    effects = {"standard": weak, "null": weak, "lif": Effect(entropy=RISING)}
    expected = [SUPPORTED, SUPPORTED, REFUTED, REFUTED, REFUTED]
    assert verdicts(hierarchy(effects, effects), *HIERARCHY_KEYS) == expected


def test_no_hierarchy_at_all() -> None:
    assert verdicts(hierarchy({}, {}), *HIERARCHY_KEYS) == [REFUTED] * 5


def test_two_layers_are_no_hierarchy() -> None:
    lif = {"lif": Effect(entropy=(1.0, 3.0))}
    results = hierarchy(lif, lif, n_layer=2)
    assert verdicts(results, *HIERARCHY_KEYS) == [UNTESTABLE] * 5
    assert "2 layers, at least 4 needed" in judged(results)["universal-hierarchy"].evidence


def test_a_single_backbone_can_refute_what_is_said_of_both() -> None:
    results = synthetic_results({"lif": Effect(entropy=FALLING)}, n_layer=4)
    assert verdicts(results, "universal-hierarchy") == [REFUTED]
    results = synthetic_results({"lif": Effect(entropy=RISING)}, n_layer=4)
    assert verdicts(results, "universal-hierarchy") == [UNTESTABLE]


def test_narrow_then_broad() -> None:
    flat = {v: Effect(entropy=(2.0, 2.0)) for v in ("standard", "null")}
    key = "narrow-then-broad-transformer"
    for entropy, verdict in [((1.5, 2.5), SUPPORTED), ((2.5, 1.5), REFUTED), ((1.5, 2.0), REFUTED)]:
        results = synthetic_results({**flat, "lif": Effect(entropy=entropy)})
        assert verdicts(results, key) == [verdict]


THRESHOLD_KEYS = "thresholds-rise-cfc", "threshold-ratio"


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        ((0.01, 0.015, 0.02, 0.03), [SUPPORTED, SUPPORTED]),
        ((0.01, 0.012, 0.014, 0.016), [SUPPORTED, REFUTED]),
        ((0.01, 0.008, 0.007, 0.03), [REFUTED, SUPPORTED]),
        ((0.03, 0.02, 0.015, 0.01), [REFUTED, REFUTED]),
    ],
)
def test_thresholds_against_depth(threshold: tuple[float, ...], expected: list[str]) -> None:
    results = synthetic_results(
        {"lif": Effect(threshold=threshold)}, backbone="cfc", n_layer=4, n_embd=8
    )
    for i, run in enumerate(results):
        for gate in run.evaluations[-1]["gates"].values():
            gate["threshold"] = [value * (1 + 0.001 * i) for value in gate["threshold"]]
    assert verdicts(results, *THRESHOLD_KEYS) == expected


def test_thresholds_of_two_layers() -> None:
    results = synthetic_results({"lif": Effect(threshold=(0.01, 0.03))}, backbone="cfc")
    assert verdicts(results, *THRESHOLD_KEYS) == [UNTESTABLE] * 2


def test_late_filters() -> None:
    for threshold, verdict in [((0, 0, 0, 0.4), SUPPORTED), ((0.4, 0, 0, 0), REFUTED)]:
        results = synthetic_results({"lif": Effect(threshold=threshold)}, n_layer=4)
        assert verdicts(results, "late-filters") == [verdict]


CRITICAL_KEYS = "critical-period-transformer", "thresholds-wake-transformer"


@pytest.mark.parametrize(
    ("since", "loss", "expected"),
    [
        (1600, -0.02, [SUPPORTED, SUPPORTED]),
        (1600, 0.01, [REFUTED, SUPPORTED]),
        (800, -0.02, [REFUTED, REFUTED]),
        (2400, -0.02, [REFUTED, SUPPORTED]),
    ],
)
def test_critical_period(since: int, loss: float, expected: list[str]) -> None:
    effect = Effect(loss=loss, early=0.01, since=since, threshold=(0.1, 0.2))
    results = synthetic_results({"lif": effect})
    assert verdicts(results, *CRITICAL_KEYS) == expected


def test_thresholds_that_never_wake() -> None:
    results = synthetic_results({"lif": Effect(threshold=(0.001, 0.002))})
    assert verdicts(results, "thresholds-wake-transformer") == [REFUTED]


def test_a_crossover_of_noise_is_no_critical_period() -> None:
    effects = {
        "standard": QUIET,
        "lif": Effect(loss=-1e-4, early=1e-4, since=1600, noise=1e-6),
        "null": Effect(noise=2e-3),
    }
    claim = judged(synthetic_results(effects))["critical-period-transformer"]
    assert claim.verdict == REFUTED
    assert "1600, 1600, 1600" in claim.evidence


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"steps": 1600}, "1600 steps, at least 1800 needed"),
        ({"steps": 2000, "eval_interval": 500}, "evaluated every 500 steps, at most 200"),
    ],
)
def test_what_a_critical_period_needs(sizes: dict[str, int], reason: str) -> None:
    effect = Effect(loss=-0.02, early=0.01, since=1600)
    results = synthetic_results({"lif": effect}, **sizes)
    assert verdicts(results, *CRITICAL_KEYS) == [UNTESTABLE] * 2
    assert reason in judged(results)["critical-period-transformer"].evidence


def set_entropies(results: Sequence[RunResult], variant: str, layers: list[list[float]]) -> None:
    for run in results:
        if run.variant == variant:
            run.evaluations[-1]["attention_entropy"] = layers


ROLE_KEYS = "specialisation-absent", "roles"
ROLES = [[0.01, 3.5, 2.0, 2.0], [0.5, 2.0, 2.0, 2.0]]
ALL_GATHER = [[3.8] * 4] * 2


def test_a_role_missing_among_all_heads_of_the_paper() -> None:
    results = synthetic_results(n_layer=6, n_head=6)
    set_entropies(results, "standard", [[3.8] * 6] * 6)
    set_entropies(results, "null", [[3.8] * 6] * 6)
    set_entropies(results, "lif", [[0.01] * 6] * 6)
    assert verdicts(results, "roles") == [REFUTED]


def test_evidence_says_which_way_refractory_thresholds_look() -> None:
    results = synthetic_results({"lif-refractory": Effect(loss=-0.006)})
    claim = judged(results)["refractory-better"]
    assert claim.verdict == SUPPORTED
    assert "mode 'causal' look at the past only" in claim.evidence
    for run in results:
        run.config["refractory_mode"] = "look_ahead"
    evidence = judged(results)["refractory-better"].evidence
    assert "mode 'look_ahead' look ahead, so this is not the loss of a language model" in evidence


@pytest.mark.parametrize(
    ("standard", "lif", "expected"),
    [
        (ALL_GATHER, ROLES, [SUPPORTED, SUPPORTED]),
        (ROLES, ROLES, [REFUTED, REFUTED]),
        (ROLES, ALL_GATHER, [REFUTED, REFUTED]),
        # A role that is missing among 8 heads says nothing.
        (ALL_GATHER, [[0.01] * 4] * 2, [SUPPORTED, UNTESTABLE]),
    ],
)
def test_roles(standard: list[list[float]], lif: list[list[float]], expected: list[str]) -> None:
    results = synthetic_results()
    for variant, layers in (("standard", standard), ("null", standard), ("lif", lif)):
        set_entropies(results, variant, layers)
    assert verdicts(results, *ROLE_KEYS) == expected


def test_paper_scale_roles_and_heads() -> None:
    layers = [[0.01] * 6, [4.0] * 6, [2.0] * 6, [2.0] * 6, [2.0] * 6, [0.5] * 6]
    results = synthetic_results(
        {"lif": Effect(threshold=(0.001,) * 6)}, variants=("standard", "lif"), **PAPER_TRANSFORMER
    )
    set_entropies(results, "lif", layers)
    for run in results:
        for gate in list(run.evaluations[-1]["gates"].values())[:2]:
            gate["threshold"][0] = gate["threshold"][3] = 0.2
    keys = "roles-by-layer", "deviating-heads"
    assert verdicts(results, *keys) == [SUPPORTED, SUPPORTED]
    set_entropies(results, "lif", layers[::-1])
    for run in results:
        for gate in run.evaluations[-1]["gates"].values():
            gate["threshold"][0] = 0.2
    assert verdicts(results, *keys) == [REFUTED, REFUTED]


def test_an_undifferentiated_base() -> None:
    key = "base-undifferentiated"
    assert verdicts(synthetic_results(backbone="cfc"), key) == [REFUTED]
    results = synthetic_results(backbone="cfc")
    for run in results:
        run.evaluations[-1]["virtual_fire_rate"] = [1.0, 1.0]
        run.evaluations[-1]["virtual_neuron_entropy"] = [0.0, 0.001]
    assert verdicts(results, key) == [SUPPORTED]


def test_counts_at_the_papers_sizes() -> None:
    keys = "parameter-counts-transformer", "parameter-ratio", "parameter-count-cfc"
    results = synthetic_results(seeds=SEEDS[:1], **PAPER_TRANSFORMER)
    results += synthetic_results(seeds=SEEDS[:1], backbone="cfc", **PAPER_CFC)
    assert verdicts(results, *keys) == [SUPPORTED, SUPPORTED, REFUTED]
    by_key = judged(results)
    assert "884,736 parameters against 108: 8,192 times" in by_key["parameter-ratio"].evidence
    assert "3,072" in by_key["parameter-count-cfc"].evidence
    small = synthetic_results() + synthetic_results(backbone="cfc")
    assert verdicts(small, *keys) == [UNTESTABLE] * 3


@pytest.mark.parametrize("backbone", ["transformer", "cfc"])
@pytest.mark.parametrize("variant", ["lif", "lif-text"])
def test_the_start_of_training(backbone: str, variant: str) -> None:
    def results() -> list[RunResult]:
        runs = synthetic_results(backbone=backbone)
        for run in runs:
            if backbone == "cfc" and run.variant == variant:
                run.evaluations[0]["fire_rate"] = [1.0, 0.995]
            elif run.variant == variant:
                for gate in run.evaluations[0]["gates"].values():
                    gate["leak"] = [0.9] * 4
        return runs

    key = f"starts-open-{backbone}" if variant == "lif" else f"starts-open-text-gate-{backbone}"
    preset = "released" if variant == "lif" else "text"
    assert f"preset {preset}: loss of {variant} " in judged(results())[key].evidence
    assert verdicts(results(), key) == [SUPPORTED]
    changed, closed = results(), results()
    for run in changed:
        if run.variant == variant:
            run.evaluations[0]["val_loss"] *= 1.01
    assert verdicts(changed, key) == [REFUTED]
    for run in closed:
        if run.variant == variant and backbone == "cfc":
            run.evaluations[0]["fire_rate"] = [1.0, 0.1]
        elif run.variant == variant:
            run.evaluations[0]["gates"]["blocks.1.attn.gate"]["leak"][2] = 0.5
    assert verdicts(closed, key) == [REFUTED]


def test_every_rule_must_hold() -> None:
    def rule(outcome: bool | None) -> Rule:
        def judge(_: FinishedRuns) -> Finding:
            if outcome is None:
                raise NotTestableError("cannot tell")
            return Finding(outcome, f"found {outcome}")

        return judge

    finished = FinishedRuns([])
    assert every(rule(True), rule(True))(finished) == Finding(True, "found True")
    assert every(rule(True), rule(None), rule(False))(finished) == Finding(False, "found False")
    with pytest.raises(NotTestableError, match="cannot tell"):
        every(rule(True), rule(None))(finished)


def test_verdicts_come_with_their_tests() -> None:
    """The p of the evidence, corrected for all claims that are judged, and what would be found."""
    effects = {"lif": Effect(loss=-0.006), "qwen-gate": Effect(loss=0.01)}
    found = judged(synthetic_results(effects))
    family = sum(claim.judged for claim in found.values())
    loss = found["loss-transformer"]
    (test,) = loss.tests
    assert (test.n, test.p, loss.p) == (3, loss.p, test.p)
    assert f"paired t p = {p_value(loss.p)}" in loss.evidence
    assert test.published == -0.75
    assert test.detectable == detectable_difference(test.sd, 3)
    assert test.base is not None
    assert test.sd is not None
    assert test.published_power == power(0.0075 * test.base, test.sd, 3)
    values = [claim.p for claim in found.values() if claim.judged]
    assert family > sum(p is not None for p in values) > 3
    corrected = [claim.holm_p for claim in found.values() if claim.judged]
    assert corrected == holm(values)
    assert min(p for p in corrected if p is not None) == family * min(
        p for p in values if p is not None
    )
    # All parts have to hold, so the least sure one decides.
    best = found["best-condition"]
    assert len(best.tests) == 4
    assert best.p == max(test.p or 0 for test in best.tests)
    for claim in found.values():
        if not claim.judged:
            assert (claim.tests, claim.p, claim.holm_p) == ((), None, None)


def test_claims_about_what_was_not_run() -> None:
    """A size that lacks a backbone says nothing of it; a missing condition is another thing."""
    cfc = judged(synthetic_results(backbone="cfc", variants=("standard", "lif", "null")))
    of_transformers = [c for c in cfc.values() if c.statement.startswith("Transformer")]
    assert of_transformers
    assert not any(claim.was_run for claim in of_transformers)
    assert not cfc["parameter-ratio"].was_run
    assert not cfc["seed-stability"].was_run
    assert cfc["universal-hierarchy"].was_run
    assert cfc["loss-text-gate-cfc"].was_run
    assert all(c.was_run for c in cfc.values() if c.statement.startswith("CfC"))
    assert not any(claim.was_run for claim in claims([]))
    assert all(c.was_run or not c.judged for c in judged(synthetic_results()).values())


def later_results(**effects: Effect) -> list[RunResult]:
    """Runs of the conditions that the paper leaves for later, and of those they are held to."""
    variants = ("standard", "lif", "null", *LATER_VARIANTS)
    named = {name.replace("_", "-"): effect for name, effect in effects.items()}
    return synthetic_results(named, variants=variants)


@pytest.mark.parametrize(
    ("key", "condition"),
    [("temporal-better", "lif_temporal"), ("persistent-better", "lif_persistent")],
)
def test_memory_across_layers_has_to_beat_lif_too(key: str, condition: str) -> None:
    better, worse = Effect(loss=-0.006), Effect(loss=0.006)
    assert verdicts(later_results(**{condition: better}), key) == [SUPPORTED]
    assert verdicts(later_results(**{condition: worse}), key) == [REFUTED]
    assert verdicts(later_results(**{condition: better, "lif": better}), key) == [REFUTED]
    without = [run for run in later_results() if run.variant != condition.replace("_", "-")]
    assert verdicts(without, key) == [UNTESTABLE]


def test_evidence_says_which_way_persistent_heads_look() -> None:
    results = later_results(lif_persistent=Effect(loss=-0.006))
    evidence = judged(results)["persistent-better"].evidence
    assert "mode 'causal' looks at the past only" in evidence
    for run in results:
        run.config["persistence_mode"] = "look_ahead"
    evidence = judged(results)["persistent-better"].evidence
    assert "mode 'look_ahead' looks ahead, so this is not the loss of a language model" in evidence


@pytest.mark.parametrize(
    ("sigmoid", "noise", "verdict"),
    [
        (Effect(noise=1e-5), 2e-3, SUPPORTED),
        (Effect(loss=0.02), 2e-3, REFUTED),
        (Effect(noise=0.02), 1e-4, REFUTED),
        (Effect(), 0.0, REFUTED),
        (Effect(noise=1e-5), 0.0, SUPPORTED),
    ],
)
def test_a_control_within_the_noise(sigmoid: Effect, noise: float, verdict: str) -> None:
    effects = {"standard": Effect(noise=0), "lif": Effect(noise=0), "null": Effect(noise=noise)}
    assert verdicts(later_results(**effects, sigmoid=sigmoid), "sigmoid-is-lif") == [verdict]


@pytest.mark.parametrize(
    ("sigmoid", "holds"),
    [(Effect(noise=1e-5), True), (Effect(noise=1e-3), True), (Effect(noise=0.03), False)],
)
def test_a_control_has_a_test_of_its_own(sigmoid: Effect, holds: bool) -> None:
    """Its p and the ratio that it would have found, whether it supports the claim or not."""
    effects = {"standard": Effect(noise=0), "lif": Effect(noise=0), "null": Effect(noise=2e-3)}
    found = judged(later_results(**effects, sigmoid=sigmoid))
    claim = found["sigmoid-is-lif"]
    assert (claim.verdict == SUPPORTED) is holds
    (test,) = claim.tests
    assert (test.n, test.detectable) == (3, None)
    assert test.p is not None
    assert (test.p >= 0.05) is holds
    assert test.detectable_ratio == detectable_ratio(3, 3)
    assert f"F-test p = {p_value(test.p)}" in claim.evidence
    assert f"{test.detectable_ratio:.2f} times that of the null pairs" in claim.evidence
    # Its p is not corrected, and does not count in the correction of the others.
    assert (claim.p, claim.holm_p) == (test.p, None)
    others = [c for c in found.values() if c.judged and c is not claim]
    assert [c.holm_p for c in others] == holm([c.p for c in others])
    (table, _) = tables_of_claims.claim_tables(list(found.values()))
    row = next(cells for cells in table.rows if cells[0] == claim.key)
    assert row[2:] == ("1", p_value(test.p), DASH, DASH)
    assert f"judge {len(others)} claims" in table.notes[0]
    assert table.notes[-1].startswith("sigmoid-is-lif is judged besides these and is not corrected")
    assert f"an RMS {test.detectable_ratio:.2f} times" in table.notes[-1]
    said = tables_of_claims.tested_text(claim, len(others))
    assert said.startswith(f"p = {p_value(test.p)}, not corrected")
    assert "Holm" not in said


def test_other_claims_need_no_note_on_the_correction() -> None:
    assert len(tables_of_claims.claim_tables(claims(synthetic_results()))[0].notes) == 2


def test_small_runs_are_held_to_the_authors_small_runs() -> None:
    """Theirs have a twelfth of the effect of the paper's own sizes."""

    def of(key: str, **sizes: Any) -> SeedTest:
        backbone = "cfc" if key.endswith("cfc") else "transformer"
        (test,) = judged(synthetic_results(backbone=backbone, **sizes))[key].tests
        return test

    test = of("loss-transformer")
    assert (test.published, test.authors_xs) == (-0.75, -0.069)
    assert test.base is not None
    assert test.sd is not None
    assert test.authors_xs_power == pytest.approx(power(0.00069 * test.base, test.sd, 3))
    assert test.published_power is not None
    assert test.authors_xs_power < test.published_power
    assert of("loss-cfc").authors_xs == 0.10
    assert of("qwen-worse").authors_xs is None
    other = of("loss-transformer", steps=2800)
    assert (other.published, other.authors_xs, other.authors_xs_power) == (-0.75, None, None)


def test_parameters_of_the_sizes_that_the_text_states() -> None:
    sizes = {"n_layer": 4, "n_embd": 128, "block_size": 256}
    claim = judged(synthetic_results(backbone="cfc", **sizes))["parameter-count-cfc"]
    assert claim.verdict == UNTESTABLE
    assert (
        "4 layers of 128, which are the sizes that the paper's text states, not" in claim.evidence
    )
    small = judged(synthetic_results(backbone="cfc"))["parameter-count-cfc"]
    assert small.evidence == "cfc: 2 layers of 128, not the paper's sizes"


def test_a_control_without_null_pairs() -> None:
    results = [run for run in later_results() if run.variant != "null"]
    claim = judged(results)["sigmoid-is-lif"]
    assert claim.verdict == UNTESTABLE
    assert "fewer than 3 null pairs" in claim.evidence
