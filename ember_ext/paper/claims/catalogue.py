"""The paper's claims, each with a criterion and a verdict by it.

The criteria were set before any run. After the first runs were seen, three were amended, because
they could be met or missed for reasons that have nothing to do with the claim; three were put in
|θ| for θ, which is the same for the released gate; and the two claims on the text's gate before
training were added. Each says so.

"Supported" asks for the right sign, p < .05 over paired seeds and more than the noise floor, or for
what else the criterion says. The noise floor is that of one pair, not of a mean over pairs: an
effect below what rounding alone does to a run is none that a reader could see in a run of theirs,
however many seeds confirm it. "Not supported" means that these runs were enough to meet the
criterion and did not; with few seeds only a large effect would have, and the interval in the
evidence says which effects are left open.
What the paper makes of its findings, such as the likeness to GABA maturation, is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ember_ext.paper import published
from ember_ext.paper.claims.judging import NotTestableError, Rule, differs, every
from ember_ext.paper.claims.loss_rules import (
    critical_period,
    has_parameters,
    least_spread,
    parameter_ratio,
    refractory_lowers,
    starts_open,
    wins_every_seed,
)
from ember_ext.paper.claims.structure_rules import (
    absent_in_baseline,
    all_roles_appear,
    base_is_undifferentiated,
    few_heads_deviate,
    hierarchy,
    narrow_then_broad,
    roles_by_layer,
    selective_heads,
    standard_is_uniform,
    strongest_is_late,
    threshold_ratio,
    thresholds_rise,
    thresholds_wake,
)
from ember_ext.paper.labels import BACKBONE_LABELS
from ember_ext.paper.runs.finished import BASELINE, LIF, FinishedRuns
from ember_ext.paper.runs.results import RunResult

Verdict = Literal["supported", "not supported", "not testable at this scale"]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what the runs say of it.

    Attributes:
        key: a short name.
        statement: the claim, as the paper has it.
        source: where the paper makes it.
        verdict: by the criterion.
        evidence: the numbers behind the verdict, or why there is none.
        criterion: what has to hold for "supported", and for a verdict at all.
    """

    key: str
    statement: str
    source: str
    verdict: Verdict
    evidence: str
    criterion: str


@dataclass(frozen=True)
class _Spec:
    key: str
    statement: str
    source: str
    criterion: str
    rule: Rule


def claims(results: Sequence[RunResult]) -> list[Claim]:
    """Judge every claim of the paper by some runs.

    Args:
        results: of any runs, in any order; what they cannot answer is not testable.

    Raises:
        ResultError: see `FinishedRuns`.
    """
    finished = FinishedRuns(results)
    return [_judge(spec, finished) for spec in _SPECS]


def _judge(spec: _Spec, finished: FinishedRuns) -> Claim:
    verdict: Verdict
    try:
        finding = spec.rule(finished)
    except NotTestableError as reason:
        verdict, evidence = "not testable at this scale", str(reason)
    else:
        verdict = "supported" if finding.holds else "not supported"
        evidence = finding.evidence
    return Claim(spec.key, spec.statement, spec.source, verdict, evidence, spec.criterion)


_LOSS_CRITERION = (
    "Best val loss (estimate) {relation} over at least 3 common seeds on average, paired t "
    "p < .05, difference larger than the RMS of the null pairs, which is what rounding does to one "
    "pair."
)
_LOWER = _LOSS_CRITERION.format(relation="lower than Standard's")
_HIGHER = _LOSS_CRITERION.format(relation="higher than Standard's")
_HIERARCHY_CRITERION = (
    "At least 4 layers and 3 seeds; entropy of the last layer above that of the first with p < .05 "
    "(t-test over seeds); rank correlation of entropy with depth at least .8 on average."
)
_ABSENT_CRITERION = (
    "At least 4 layers and 3 seeds; in Standard{} the rank correlation is below .8; the "
    "rise from first to last layer is larger in LIF, paired p < .05 and beyond the null pairs' RMS."
)
_NARROW_CRITERION = (
    "Entropy of the first layer lower, and of the last layer higher, than Standard's{}, "
    "over at least 3 seeds, each with paired p < .05 and beyond the null pairs' RMS."
)
_CRITICAL_CRITERION = (
    "Trained to 1800 steps or more, evaluated at least every 200, 3 seeds; in every seed LIF's "
    "loss falls below Standard's at 1600 ± 200 steps and stays below to the end, and the final "
    "difference is on average larger than the RMS of the null pairs."
)
_WAKE_CRITERION = (
    "Trained to 1800 steps or more, evaluated at least every 200, 3 seeds; in every seed at most "
    "5% of the gates have |θ| > .01 at every evaluation before 1600, and more than 5% at the end."
)
_OPEN_CRITERION = (
    "Before the first step, in each of at least 3 seeds, the loss on the whole validation text is "
    "within 0.1% of Standard's, and {}. (The second condition was added after the first runs: the "
    "loss of an untrained model hardly depends on its gates.)"
)
_ADDED_CLAIM = " (The claim was added after the first runs, whose gates are the released ones.)"
_SIZE_OF_THRESHOLDS = " (|θ| was θ before the first runs: the same for the released gate.)"
_OPEN_GATES = {
    "transformer": "no gate favours one weight over another by more than 10% (g(1)/g(0) ≤ 1.1)",
    "cfc": "the fire rate of every layer is at least .99 (the paper's pass-through is 1.000)",
}


_THROUGH = {"transformer": "", "cfc": " (measured through a gate at its initial values)"}


def _per_backbone(
    key: str,
    statement: str,
    source: str,
    criterion: str,
    rules: dict[str, Rule],
    wording: dict[str, str] = _THROUGH,
) -> list[_Spec]:
    """One claim a backbone, of equal statement and criterion but for the `wording` of {}."""
    return [
        _Spec(
            f"{key}-{backbone}",
            f"{BACKBONE_LABELS[backbone]}: {statement}",
            source,
            criterion.format(wording[backbone]),
            rule,
        )
        for backbone, rule in rules.items()
    ]


_BACKBONES = ("transformer", "cfc")

_SPECS: tuple[_Spec, ...] = (
    _Spec(
        "universal-hierarchy",
        "LIF gating induces progressive specialisation with depth, regardless of backbone, and "
        "absent in ungated baselines.",
        "Core claim; abstract; 3.4",
        "Both backbones: the claims hierarchy-* and hierarchy-absent-* below all hold.",
        every(*map(hierarchy, _BACKBONES), *map(absent_in_baseline, _BACKBONES)),
    ),
    *_per_backbone(
        "hierarchy",
        "with LIF, entropy rises progressively from shallow to deep layers.",
        "3.3, 3.4",
        _HIERARCHY_CRITERION,
        {backbone: hierarchy(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "hierarchy-absent",
        "this hierarchy is absent in the ungated baseline.",
        "Abstract; 3.4; 4.3",
        _ABSENT_CRITERION,
        {backbone: absent_in_baseline(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "narrow-then-broad",
        "LIF narrows shallow layers and broadens deep ones.",
        "3.4, universal pattern",
        _NARROW_CRITERION,
        {backbone: narrow_then_broad(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "loss",
        "learnable LIF gates lower the validation loss.",
        "3.1, 3.2",
        _LOWER,
        {backbone: differs(backbone, LIF, -1) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "loss-text-gate",
        "gates as the text defines them (preset text) lower the validation loss.",
        "2.1",
        _LOWER,
        {backbone: differs(backbone, "lif-text", -1) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "wins-every-seed",
        "LIF beats the baseline in every seed.",
        "Abstract; 3.2",
        "Best val loss (estimate) lower than Standard's in every one of at least 3 common seeds, "
        "each time by more than the RMS of the null pairs.",
        {backbone: wins_every_seed(backbone, LIF) for backbone in _BACKBONES},
    ),
    _Spec(
        "seed-stability",
        "Learnable LIF has the smallest variance across seeds: it regularises.",
        "3.1; 4.3",
        "The sd of its best val loss is smaller than each other condition's, each time over at "
        "least 3 common seeds; Pitman-Morgan p < .05 against Standard; the sds differ by more than "
        "those of the null runs and Standard. Refuted from 6 seeds on, or by another sd that is "
        "smaller with p < .05. (Common seeds and the last sentence were added after the first "
        "runs: variants may have different seeds, and 3 hardly ever tell two spreads apart.)",
        least_spread("transformer", LIF, ("lif-fixed", "lif-refractory", "qwen-gate")),
    ),
    _Spec(
        "best-condition",
        "Learnable LIF is the best of the five conditions.",
        "3.1",
        _LOSS_CRITERION.format(relation="lower than each other condition's"),
        every(
            *(
                differs("transformer", LIF, -1, base=base)
                for base in (BASELINE, "lif-fixed", "lif-refractory", "qwen-gate")
            )
        ),
    ),
    _Spec(
        "fixed-worse",
        "With a fixed threshold LIF is worse than Standard.",
        "3.1",
        _HIGHER,
        differs("transformer", "lif-fixed", +1),
    ),
    _Spec(
        "refractory-better",
        "LIF with refractory thresholds lowers the validation loss.",
        "3.1; 3.6",
        _LOWER,
        refractory_lowers,
    ),
    _Spec(
        "qwen-worse",
        "Qwen's gate raises the validation loss.",
        "3.1; 3.6",
        _HIGHER,
        differs("transformer", "qwen-gate", +1),
    ),
    _Spec(
        "specialisation-absent",
        "Standard has no specialisation: all heads are alike, with an entropy near 4.5.",
        "3.3; 4.3",
        "In each of at least 3 trained Standard runs, every head has more than 90% of the entropy "
        "of uniform attention.",
        standard_is_uniform,
    ),
    _Spec(
        "roles",
        "With LIF, heads differentiate into pointers, gatherers and focusers.",
        "3.3; 4.3",
        "Each role appears in each of at least 3 LIF runs, and more heads are pointers or focusers "
        "than in Standard, paired p < .05 (or by the same number in every seed) and beyond the "
        "null pairs' RMS. With fewer than the paper's 36 heads a missing role refutes nothing. "
        "(Added after the first runs: the last sentence, and what stands in brackets above.)",
        every(
            all_roles_appear,
            differs(
                "transformer",
                LIF,
                +1,
                measure=selective_heads,
                name="pointers and focusers",
                digits=1,
            ),
        ),
    ),
    _Spec(
        "roles-by-layer",
        "Pointers are in L0, gatherers in L1, focusers in the last two layers.",
        "3.3",
        "At least 6 layers; so in each of at least 3 LIF runs.",
        roles_by_layer,
    ),
    _Spec(
        "deviating-heads",
        "3-5 of 36 heads deviate significantly from pass-through.",
        "3.3",
        "36 heads; 3 to 5 with |θ| > .01 in each of at least 3 LIF runs.",
        few_heads_deviate,
    ),
    _Spec(
        "base-undifferentiated",
        "The CfC base has fire rate 1.000 and entropy 0.000: no differentiation.",
        "3.3; 3.4",
        "In each of at least 3 base runs, measured through a gate at its initial values, fire rate "
        "at least .999 and neuron entropy at most .01 in every layer.",
        base_is_undifferentiated,
    ),
    *_per_backbone(
        "thresholds-rise",
        "deeper layers consistently learn higher thresholds.",
        "4.2",
        "At least 4 layers and 3 LIF runs; mean |θ| of the last layer above the first's in every "
        "run, on average with p < .05 (t-test over seeds); rank correlation with depth at least .8 "
        "on average." + _SIZE_OF_THRESHOLDS,
        {backbone: thresholds_rise(backbone) for backbone in _BACKBONES},
    ),
    _Spec(
        "threshold-ratio",
        "CfC: the threshold of L3 is 3 times that of L0.",
        "4.2",
        "4 layers and at least 3 LIF runs; ratio of mean |θ| at least 2.5 on average and above 1 "
        "in every run." + _SIZE_OF_THRESHOLDS,
        threshold_ratio,
    ),
    _Spec(
        "late-filters",
        "Transformer: late-layer heads have the strongest filtering.",
        "4.2",
        "At least 4 layers and 3 LIF runs; the head of the largest contrast g(1)/g(0) lies in the "
        "last third of the layers in every run.",
        strongest_is_late,
    ),
    *_per_backbone(
        "critical-period",
        "LIF overtakes at about step 1600, in every seed alike.",
        "3.5; 4.1",
        _CRITICAL_CRITERION,
        {backbone: critical_period(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "thresholds-wake",
        "before that step thresholds are near zero, after it gating is effective.",
        "3.5; 4.1",
        _WAKE_CRITERION,
        {backbone: thresholds_wake(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "starts-open",
        "the gate starts as a pass-through.",
        "1.3; 2.1",
        _OPEN_CRITERION,
        {backbone: starts_open(backbone, LIF) for backbone in _BACKBONES},
        _OPEN_GATES,
    ),
    *_per_backbone(
        "starts-open-text-gate",
        "the gate as the text defines it (preset text) starts as a pass-through.",
        "1.3; 2.1",
        _OPEN_CRITERION + _ADDED_CLAIM,
        {backbone: starts_open(backbone, "lif-text") for backbone in _BACKBONES},
        _OPEN_GATES,
    ),
    _Spec(
        "parameter-counts-transformer",
        "LIF adds 108 parameters, with refractory thresholds 180, Qwen's gate 884,736.",
        "2.2; 2.4; 3.6",
        "At the paper's sizes, counted in the models.",
        every(
            *(
                has_parameters("transformer", variant, count)
                for variant, count in published.EXTRA_PARAMETERS["transformer"].items()
            )
        ),
    ),
    _Spec(
        "parameter-count-cfc",
        "LIF adds 1,536 parameters to the CfC.",
        "2.3",
        "At the sizes that the published CfC losses come from, counted in the model.",
        has_parameters("cfc", LIF, published.EXTRA_PARAMETERS["cfc"][LIF]),
    ),
    _Spec(
        "parameter-ratio",
        "LIF needs 8,000 times fewer parameters than Qwen's gate.",
        "Abstract; 3.6",
        "At the paper's sizes, counted in the models.",
        parameter_ratio,
    ),
    _Spec(
        "lif-beats-qwen",
        "LIF's few parameters outperform the many of Qwen's gate (108 against 884K).",
        "1.4; 3.6",
        _LOSS_CRITERION.format(relation="lower than Qwen-gate's"),
        differs("transformer", LIF, -1, base="qwen-gate"),
    ),
)
