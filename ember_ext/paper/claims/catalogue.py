"""The paper's claims, each with a criterion and a verdict by it.

The criteria were set before any run. Three were amended after the first runs were seen, because
they could be met or missed for reasons that have nothing to do with the claim. Three name |θ| where
they named θ, which is the same for the released gate. The two claims on the text's gate before
training were added. Each of these says so. The claims on what section 6.3 leaves for later were
added when its conditions were built, before any run of them.

A claim is "supported" if the effect has the right sign, p < .05 over paired seeds, and a size
beyond the noise floor, unless its criterion says otherwise. The noise floor is that of one pair,
not of a mean over pairs: an effect below what rounding does to a run cannot be seen in a run,
however many seeds confirm it. A claim is "not supported" if these runs were enough to meet the
criterion and did not meet it. With few seeds only a large effect would have met it, and the
interval in the evidence says which effects are left open. The paper's interpretations, such as the
likeness to GABA maturation, are not judged.
"""

from __future__ import annotations

from dataclasses import dataclass

from ember_ext.paper import published
from ember_ext.paper.claims.judging import Rule, differs, every
from ember_ext.paper.claims.loss_rules import (
    critical_period,
    has_parameters,
    least_spread,
    lowers_both,
    parameter_ratio,
    persistence_lowers,
    refractory_lowers,
    starts_open,
    wins_every_seed,
    within_noise,
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
from ember_ext.paper.runs.finished import BASELINE, LIF


@dataclass(frozen=True)
class Spec:
    """A claim that is not judged yet; see `Claim`.

    Attributes:
        in_family: whether its p is corrected together with those of the others. A claim that a
            large p supports is not: a correction would make its support easier.
    """

    key: str
    statement: str
    source: str
    criterion: str
    rule: Rule
    in_family: bool = True


_LOSS_CRITERION = (
    "The best val loss (estimate) is {relation} on average over at least 3 common seeds. The "
    "paired t-test gives p < .05. The difference is larger than the RMS of the null pairs, which "
    "is what rounding does to one pair."
)
_LOWER = _LOSS_CRITERION.format(relation="lower than Standard's")
_HIGHER = _LOSS_CRITERION.format(relation="higher than Standard's")
_LOWER_THAN_BOTH = _LOSS_CRITERION.format(
    relation="lower than Standard's, and lower than that of LIF, which it contains,"
)
_LATER_CONDITION = (
    " (This claim and its criterion were added after the first runs, but before any run of its "
    "condition.)"
)
_HIERARCHY_CRITERION = (
    "There are at least 4 layers and 3 seeds. Entropy is higher in the last layer than in the "
    "first, with p < .05 (t-test over seeds). The rank correlation of entropy with depth is at "
    "least .8 on average."
)
_ABSENT_CRITERION = (
    "There are at least 4 layers and 3 seeds. The rank correlation is below .8 in Standard{}. The "
    "rise from the first to the last layer is larger in LIF, with paired p < .05 and by more than "
    "the null pairs' RMS."
)
_NARROW_CRITERION = (
    "LIF has a lower entropy in the first layer and a higher one in the last layer than "
    "Standard{}, over at least 3 seeds. Each difference has paired p < .05 and exceeds the null "
    "pairs' RMS."
)
_CRITICAL_CRITERION = (
    "There are 3 seeds, 1800 steps or more, and evaluations at least every 200. In every seed "
    "LIF's loss falls below Standard's at 1600 ± 200 steps and stays below to the end. The final "
    "difference is on average larger than the RMS of the null pairs."
)
_WAKE_CRITERION = (
    "There are 3 seeds, 1800 steps or more, and evaluations at least every 200. In every seed at "
    "most 5% of the gates have |θ| > .01 at every evaluation before 1600, and more than 5% have it "
    "at the end."
)
_OPEN_CRITERION = (
    "Before the first step, in each of at least 3 seeds, the loss on the whole validation text is "
    "within 0.1% of Standard's, and {}. (The second condition was added after the first runs, "
    "because the loss of an untrained model hardly depends on its gates.)"
)
_ADDED_CLAIM = " (This claim was added after the first runs, whose gates are the released ones.)"
_SIZE_OF_THRESHOLDS = (
    " (The criterion named θ in place of |θ| before the first runs. They are equal for the "
    "released gate.)"
)
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
) -> list[Spec]:
    """One claim a backbone, of equal statement and criterion but for the `wording` of {}."""
    return [
        Spec(
            f"{key}-{backbone}",
            f"{BACKBONE_LABELS[backbone]}: {statement}",
            source,
            criterion.format(wording[backbone]),
            rule,
        )
        for backbone, rule in rules.items()
    ]


_BACKBONES = ("transformer", "cfc")

SPECS: tuple[Spec, ...] = (
    Spec(
        "universal-hierarchy",
        "LIF gating induces progressive specialisation with depth, regardless of backbone, and "
        "absent in ungated baselines.",
        "Core claim; abstract; 3.4",
        "The claims hierarchy-* and hierarchy-absent-* below hold for both backbones.",
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
        "The best val loss (estimate) is lower than Standard's in every one of at least 3 common "
        "seeds, each time by more than the RMS of the null pairs.",
        {backbone: wins_every_seed(backbone, LIF) for backbone in _BACKBONES},
    ),
    Spec(
        "seed-stability",
        "Learnable LIF has the smallest variance across seeds: it regularises.",
        "3.1; 4.3",
        "The sd of its best val loss is smaller than each other condition's, each time over at "
        "least 3 common seeds. The Pitman-Morgan test against Standard gives p < .05. The two sds "
        "differ by more than those of the null runs and Standard. Six seeds can refute the claim, "
        "and so can another sd that is smaller with p < .05. (Common seeds and the last sentence "
        "were added after the first runs. Variants may have different seeds, and 3 seeds hardly "
        "ever tell two spreads apart.)",
        least_spread("transformer", LIF, ("lif-fixed", "lif-refractory", "qwen-gate")),
    ),
    Spec(
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
    Spec(
        "fixed-worse",
        "LIF with a fixed threshold is worse than Standard.",
        "3.1",
        _HIGHER,
        differs("transformer", "lif-fixed", +1),
    ),
    Spec(
        "refractory-better",
        "LIF with refractory thresholds lowers the validation loss.",
        "3.1; 3.6",
        _LOWER,
        refractory_lowers,
    ),
    Spec(
        "qwen-worse",
        "Qwen's gate raises the validation loss.",
        "3.1; 3.6",
        _HIGHER,
        differs("transformer", "qwen-gate", +1),
    ),
    Spec(
        "specialisation-absent",
        "Standard has no specialisation: all heads are alike, with an entropy near 4.5.",
        "3.3; 4.3",
        "In each of at least 3 trained Standard runs, every head has more than 90% of the entropy "
        "of uniform attention.",
        standard_is_uniform,
    ),
    Spec(
        "roles",
        "With LIF, heads differentiate into pointers, gatherers and focusers.",
        "3.3; 4.3",
        "Each role appears in each of at least 3 LIF runs. More heads are pointers or focusers "
        "than in Standard, with paired p < .05 (or by the same number in every seed) and by more "
        "than the null pairs' RMS. A missing role refutes nothing if there are fewer than the "
        "paper's 36 heads. (The last sentence and the words in brackets were added after the "
        "first runs.)",
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
    Spec(
        "roles-by-layer",
        "Pointers are in L0, gatherers in L1, focusers in the last two layers.",
        "3.3",
        "There are at least 6 layers, and the roles are in these layers in each of at least 3 LIF "
        "runs.",
        roles_by_layer,
    ),
    Spec(
        "deviating-heads",
        "3-5 of 36 heads deviate significantly from pass-through.",
        "3.3",
        "There are 36 heads, and 3 to 5 of them have |θ| > .01 in each of at least 3 LIF runs.",
        few_heads_deviate,
    ),
    Spec(
        "base-undifferentiated",
        "The CfC base has fire rate 1.000 and entropy 0.000: no differentiation.",
        "3.3; 3.4",
        "Every layer has a fire rate of at least .999 and a neuron entropy of at most .01 in each "
        "of at least 3 base runs, measured through a gate at its initial values.",
        base_is_undifferentiated,
    ),
    *_per_backbone(
        "thresholds-rise",
        "deeper layers consistently learn higher thresholds.",
        "4.2",
        "There are at least 4 layers and 3 LIF runs. The mean |θ| of the last layer is above the "
        "first's in every run, and on average with p < .05 (t-test over seeds). The rank "
        "correlation "
        "with depth is at least .8 on average." + _SIZE_OF_THRESHOLDS,
        {backbone: thresholds_rise(backbone) for backbone in _BACKBONES},
    ),
    Spec(
        "threshold-ratio",
        "CfC: the threshold of L3 is 3 times that of L0.",
        "4.2",
        "There are 4 layers and at least 3 LIF runs. The ratio of mean |θ| is at least 2.5 on "
        "average "
        "and above 1 in every run." + _SIZE_OF_THRESHOLDS,
        threshold_ratio,
    ),
    Spec(
        "late-filters",
        "Transformer: late-layer heads have the strongest filtering.",
        "4.2",
        "There are at least 4 layers and 3 LIF runs. The head with the largest contrast g(1)/g(0) "
        "lies in the last third of the layers in every run.",
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
        "thresholds are near zero before step 1600, and gating is effective after it.",
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
    Spec(
        "parameter-counts-transformer",
        "LIF adds 108 parameters, LIF with refractory thresholds 180, and Qwen's gate 884,736.",
        "2.2; 2.4; 3.6",
        "The models have the paper's sizes, and their parameters are counted.",
        every(
            *(
                has_parameters("transformer", variant, count)
                for variant, count in published.EXTRA_PARAMETERS["transformer"].items()
            )
        ),
    ),
    Spec(
        "parameter-count-cfc",
        "LIF adds 1,536 parameters to the CfC.",
        "2.3",
        "The model has the sizes that the published CfC losses come from, and its parameters are "
        "counted.",
        has_parameters("cfc", LIF, published.EXTRA_PARAMETERS["cfc"][LIF]),
    ),
    Spec(
        "parameter-ratio",
        "LIF needs 8,000 times fewer parameters than Qwen's gate.",
        "Abstract; 3.6",
        "The models have the paper's sizes, and their parameters are counted.",
        parameter_ratio,
    ),
    Spec(
        "lif-beats-qwen",
        "LIF's few parameters outperform the many of Qwen's gate (108 against 884K).",
        "1.4; 3.6",
        _LOSS_CRITERION.format(relation="lower than Qwen-gate's"),
        differs("transformer", LIF, -1, base="qwen-gate"),
    ),
    Spec(
        "temporal-better",
        "LIF with a membrane potential that is carried across layers lowers the validation loss.",
        "6.3; released code",
        _LOWER_THAN_BOTH + _LATER_CONDITION,
        lowers_both("lif-temporal"),
    ),
    Spec(
        "persistent-better",
        "LIF with heads that remember what they fired in earlier layers lowers the validation "
        "loss.",
        "6.3; released code",
        _LOWER_THAN_BOTH + _LATER_CONDITION,
        persistence_lowers,
    ),
    Spec(
        "sigmoid-is-lif",
        "The sigmoid control, which is LIF by other operations, ends no further from LIF than "
        "rounding takes two runs.",
        "Released code",
        "Over at least 3 common seeds and 3 null pairs, the mean square of the differences in the "
        "best val loss (estimate) between Sigmoid and LIF is not larger than that of the null "
        "pairs by an F-test with p < .05 (one-sided), or its root is at most .00005, which the "
        "paper's four digits do not show. With 3 of each, the test takes 3.05 times the RMS."
        + _LATER_CONDITION,
        within_noise("transformer", "sigmoid", LIF),
        in_family=False,
    ),
)
