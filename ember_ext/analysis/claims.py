"""The paper's claims, each with a criterion set before any run and a verdict by it.

"Supported" asks for the right sign, p < .05 over paired seeds and more than the noise floor, or for
what else the criterion says. "Not supported" means that these runs could have shown it and did not.
What the paper makes of its findings, such as the likeness to GABA maturation, is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ember_ext.analysis import published
from ember_ext.analysis.comparisons import (
    Measure,
    compare,
    extra_parameters,
    final_loss,
    measure_noise,
)
from ember_ext.analysis.crossover import find_crossovers
from ember_ext.analysis.depth import (
    ATTENTION_ENTROPY,
    NEURON_ENTROPY,
    THRESHOLD,
    VIRTUAL_FIRE_RATE,
    VIRTUAL_NEURON_ENTROPY,
    depth_profile,
    layer_values,
)
from ember_ext.analysis.formatting import noise_text, signed
from ember_ext.analysis.grid import BASELINE, NULL, Grid
from ember_ext.analysis.heads import (
    DEVIATES_ABOVE,
    ROLES,
    Role,
    gate_units,
    head_entropies,
    head_roles,
    uniform_entropy,
)
from ember_ext.analysis.judging import (
    MIN_SPEARMAN,
    Finding,
    NotTestableError,
    Rule,
    differs,
    every,
    least_spread,
    need_config,
    need_layers,
    need_runs,
    rises_on_average,
    wins_every_seed,
)
from ember_ext.analysis.labels import BACKBONE_LABELS
from ember_ext.analysis.results import RunResult

Verdict = Literal["supported", "not supported", "not testable at this scale"]

LIF = "lif"

CRITICAL_WINDOW = 200
"""Steps around 1600 that a crossover may be off: the published evaluation interval."""

FEW_UNITS = 0.05
"""The share of gates up to which thresholds as a whole count as being near zero."""


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
        ResultError: see `Grid`.
    """
    grid = Grid(results)
    return [_judge(spec, grid) for spec in _SPECS]


def _judge(spec: _Spec, grid: Grid) -> Claim:
    verdict: Verdict
    try:
        finding = spec.rule(grid)
    except NotTestableError as reason:
        verdict, evidence = "not testable at this scale", str(reason)
    else:
        verdict = "supported" if finding.holds else "not supported"
        evidence = finding.evidence
    return Claim(spec.key, spec.statement, spec.source, verdict, evidence, spec.criterion)


# Depth: what grows from layer to layer.


def _own_entropy(backbone: str) -> str:
    return ATTENTION_ENTROPY if backbone == "transformer" else NEURON_ENTROPY


def _fair_entropy(backbone: str) -> str:
    """The measure that a model without gates has too."""
    return ATTENTION_ENTROPY if backbone == "transformer" else VIRTUAL_NEURON_ENTROPY


def _at_layer(measure: str, layer: int) -> Measure:
    def value(run: RunResult) -> float:
        values = layer_values(run, measure)
        if values is None:
            raise NotTestableError(f"{run.name} has no {measure}")
        return values[layer]

    return value


def _rise(measure: str) -> Measure:
    first, last = _at_layer(measure, 0), _at_layer(measure, -1)
    return lambda run: last(run) - first(run)


def _profile_rises(backbone: str, measure: str, name: str, digits: int) -> Rule:
    def judge(grid: Grid) -> Finding:
        need_layers(grid, backbone)
        need_runs(grid, backbone, LIF)
        profile = depth_profile(grid.runs(backbone, LIF), measure)
        if profile is None:
            raise NotTestableError(f"{backbone} {LIF} has no {measure}")
        what = f"{backbone} {LIF}, {name}"
        return rises_on_average(profile.rises, profile.mean_spearman, what, digits)

    return judge


def _hierarchy(backbone: str) -> Rule:
    return _profile_rises(backbone, _own_entropy(backbone), "entropy", 3)


def _absent_in_baseline(backbone: str) -> Rule:
    measure = _fair_entropy(backbone)

    def is_flat(grid: Grid) -> Finding:
        need_layers(grid, backbone)
        need_runs(grid, backbone, BASELINE)
        profile = depth_profile(grid.runs(backbone, BASELINE), measure)
        assert profile is not None
        correlation = profile.mean_spearman
        assert correlation is not None
        evidence = f"{backbone} {BASELINE}, entropy: Spearman {signed(correlation, 2)} with depth"
        return Finding(correlation < MIN_SPEARMAN, evidence)

    def is_deep(grid: Grid) -> Finding:
        need_layers(grid, backbone)
        return differs(
            backbone,
            LIF,
            +1,
            measure=_rise(_own_entropy(backbone)),
            base_measure=_rise(measure),
            name="rise of entropy, last minus first layer",
            digits=3,
        )(grid)

    return every(is_flat, is_deep)


def _narrow_then_broad(backbone: str) -> Rule:
    own, fair = _own_entropy(backbone), _fair_entropy(backbone)
    return every(
        *(
            differs(
                backbone,
                LIF,
                sign,
                measure=_at_layer(own, layer),
                base_measure=_at_layer(fair, layer),
                name=f"entropy of the {name} layer",
                digits=3,
            )
            for layer, sign, name in ((0, -1, "first"), (-1, +1, "last"))
        )
    )


def _thresholds_rise(backbone: str) -> Rule:
    def in_every_seed(grid: Grid) -> Finding:
        need_layers(grid, backbone)
        need_runs(grid, backbone, LIF)
        profile = depth_profile(grid.runs(backbone, LIF), THRESHOLD)
        if profile is None:
            raise NotTestableError(f"{backbone} {LIF} has no gates")
        count = sum(rise > 0 for rise in profile.rises)
        means = ", ".join(f"{value:.4f}" for value in profile.mean)
        evidence = (
            f"{backbone} {LIF}: mean θ by layer {means}; higher in the last layer than in the "
            f"first in {count} of {len(profile.rises)} seeds"
        )
        return Finding(count == len(profile.rises), evidence)

    return every(in_every_seed, _profile_rises(backbone, THRESHOLD, "mean θ", 4))


def _threshold_ratio(grid: Grid) -> Finding:
    need_runs(grid, "cfc", LIF)
    layers = need_config(grid, "cfc")["n_layer"]
    if layers != 4:
        raise NotTestableError(f"cfc: {layers} layers, the claim is about 4")
    profile = depth_profile(grid.runs("cfc", LIF), THRESHOLD)
    if profile is None or min(row[0] for row in profile.values) <= 0:
        raise NotTestableError("cfc lif: the first layer's mean θ is not above 0")
    ratios = [row[-1] / row[0] for row in profile.values]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    mean = float(np.mean(ratios))
    evidence = f"cfc lif, mean θ of L3 over L0 by seed: {listed}; mean {mean:.2f}"
    return Finding(mean >= 2.5 and min(ratios) > 1, evidence)


def _strongest_is_late(grid: Grid) -> Finding:
    need_layers(grid, "transformer")
    need_runs(grid, "transformer", LIF)
    layers = need_config(grid, "transformer")["n_layer"]
    found = []
    for run in grid.runs("transformer", LIF):
        units = gate_units(run)
        if not units:
            raise NotTestableError(f"{run.name} has no gates")
        found.append(max(units, key=lambda unit: unit.contrast))
    listed = ", ".join(f"L{unit.layer} (g(1)/g(0) = {unit.contrast:.2f})" for unit in found)
    evidence = f"transformer lif, layer of the strongest gate by seed: {listed}"
    return Finding(all(unit.layer >= layers - layers // 3 for unit in found), evidence)


# Heads: who does what.


def _role_totals(runs: Sequence[RunResult]) -> str:
    roles = [role for run in runs for layer in head_roles(run) for role in layer]
    totals = ", ".join(f"{roles.count(role) / len(runs):.1f} {role}" for role in ROLES)
    return f"{totals} heads a run"


def _specialised(run: RunResult) -> float:
    return float(sum(role != "mixed" for layer in head_roles(run) for role in layer))


def _standard_is_uniform(grid: Grid) -> Finding:
    need_runs(grid, "transformer", BASELINE)
    runs = grid.runs("transformer", BASELINE)
    uniform = uniform_entropy(int(runs[0].config["block_size"]))
    entropies = [h for run in runs for layer in head_entropies(run) for h in layer]
    evidence = (
        f"transformer {BASELINE}: {_role_totals(runs)}; entropies {min(entropies):.2f} to "
        f"{max(entropies):.2f}, uniform attention {uniform:.2f}"
    )
    return Finding(min(entropies) > 0.9 * uniform, evidence)


def _all_roles_appear(grid: Grid) -> Finding:
    need_runs(grid, "transformer", LIF)
    runs = grid.runs("transformer", LIF)
    wanted: set[Role] = {"pointer", "gatherer", "focuser"}
    complete = [wanted <= {role for layer in head_roles(run) for role in layer} for run in runs]
    evidence = (
        f"transformer {LIF}: {_role_totals(runs)}, all three roles in {sum(complete)} of "
        f"{len(runs)} runs"
    )
    return Finding(all(complete), evidence)


def _roles_by_layer(grid: Grid) -> Finding:
    need_layers(grid, "transformer", 6)
    need_runs(grid, "transformer", LIF)
    runs = grid.runs("transformer", LIF)
    places: dict[Role, slice] = {
        "pointer": slice(0, 1),
        "gatherer": slice(1, 2),
        "focuser": slice(-2, None),
    }
    counts = {
        role: sum(any(role in layer for layer in head_roles(run)[place]) for run in runs)
        for role, place in places.items()
    }
    evidence = (
        f"transformer {LIF}, {len(runs)} runs: pointer in L0 in {counts['pointer']}, gatherer in "
        f"L1 in {counts['gatherer']}, focuser in the last two layers in {counts['focuser']}"
    )
    return Finding(all(count == len(runs) for count in counts.values()), evidence)


def _few_heads_deviate(grid: Grid) -> Finding:
    need_runs(grid, "transformer", LIF)
    runs = grid.runs("transformer", LIF)
    config = runs[0].config
    if config["n_layer"] * config["n_head"] != 36:
        heads = config["n_layer"] * config["n_head"]
        raise NotTestableError(f"transformer: {heads} heads, the claim is about 36")
    counts = [sum(unit.deviates for unit in gate_units(run)) for run in runs]
    evidence = f"transformer {LIF}, deviating heads by seed: {', '.join(map(str, counts))}"
    return Finding(all(3 <= count <= 5 for count in counts), evidence)


def _base_is_undifferentiated(grid: Grid) -> Finding:
    need_runs(grid, "cfc", BASELINE)
    runs = grid.runs("cfc", BASELINE)
    fire = depth_profile(runs, VIRTUAL_FIRE_RATE)
    entropy = depth_profile(runs, VIRTUAL_NEURON_ENTROPY)
    assert fire is not None
    assert entropy is not None
    evidence = (
        f"cfc {BASELINE} through a gate at its initial values, by layer: fire rate "
        f"{', '.join(f'{value:.3f}' for value in fire.mean)}; neuron entropy "
        f"{', '.join(f'{value:.3f}' for value in entropy.mean)}"
    )
    lowest, highest = np.min(fire.values), np.max(entropy.values)
    return Finding(bool(lowest >= 0.999 and highest <= 0.01), evidence)


# Time: the critical period.


def _need_resolution(grid: Grid, backbone: str) -> None:
    """Require evaluations close enough around step 1600, and training well past it."""
    config = need_config(grid, backbone)
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


def _critical_period(backbone: str) -> Rule:
    def judge(grid: Grid) -> Finding:
        _need_resolution(grid, backbone)
        need_runs(grid, backbone, BASELINE, LIF)
        crossovers = find_crossovers(grid.pairs(backbone, LIF)).crossovers
        null = find_crossovers(grid.pairs(backbone, NULL)).crossovers
        steps = [c.persistent for c in crossovers]
        target = published.CRITICAL_STEP
        inside = [s is not None and abs(s - target) <= CRITICAL_WINDOW for s in steps]
        comparison = compare(grid, backbone, LIF, final_loss)
        assert comparison is not None
        floor = measure_noise(grid, backbone, final_loss)
        evidence = (
            f"{backbone}, persistent crossover by seed: {_steps(steps)}; first below: "
            f"{_steps([c.first for c in crossovers])}; null pairs, persistent: "
            f"{_steps([c.persistent for c in null])}; final difference "
            f"{signed(comparison.difference)}, {noise_text(floor)}"
        )
        if not all(inside):
            return Finding(False, evidence)
        if floor is None or floor.n < 3:
            raise NotTestableError(f"fewer than 3 null pairs; {evidence}")
        return Finding(comparison.difference < -floor.rms, evidence)

    return judge


def _steps(steps: Sequence[int | None]) -> str:
    return ", ".join("none" if step is None else str(step) for step in steps) or "not run"


def _thresholds_wake(backbone: str) -> Rule:
    def share(run: RunResult, evaluation: int) -> float:
        units = gate_units(run, evaluation)
        if not units:
            raise NotTestableError(f"{run.name} has no gates")
        return sum(unit.deviates for unit in units) / len(units)

    def judge(grid: Grid) -> Finding:
        _need_resolution(grid, backbone)
        need_runs(grid, backbone, LIF)
        before, after = [], []
        for run in grid.runs(backbone, LIF):
            steps, _ = run.curve()
            early = [i for i, step in enumerate(steps) if step < published.CRITICAL_STEP]
            before.append(max(share(run, i) for i in early))
            after.append(share(run, -1))
        evidence = (
            f"{backbone} {LIF}, share of gates with |θ| > {DEVIATES_ABOVE:g} by seed: at most "
            f"{_shares(before)} before {published.CRITICAL_STEP}, {_shares(after)} at the end"
        )
        return Finding(max(before) <= FEW_UNITS < min(after), evidence)

    return judge


def _shares(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.0f}%" for value in values)


# Counts, and where training starts.


def _at_paper_scale(grid: Grid, backbone: str) -> None:
    config = need_config(grid, backbone)
    if published.scale_of(config) != "paper":
        raise NotTestableError(
            f"{backbone}: {config['n_layer']} layers of {config['n_embd']}, not the paper's sizes"
        )


def _extra(grid: Grid, backbone: str, variant: str) -> int:
    extra = extra_parameters(grid, backbone, variant)
    if extra is None:
        raise NotTestableError(f"no run of {backbone} {BASELINE} or {variant}")
    return extra


def _count(backbone: str, variant: str, expected: int) -> Rule:
    def judge(grid: Grid) -> Finding:
        _at_paper_scale(grid, backbone)
        extra = _extra(grid, backbone, variant)
        return Finding(extra == expected, f"{backbone} {variant}: {extra:,} extra parameters")

    return judge


def _parameter_ratio(grid: Grid) -> Finding:
    gate, lif = _extra(grid, "transformer", "qwen-gate"), _extra(grid, "transformer", LIF)
    evidence = f"{gate:,} parameters against {lif:,}: {gate / lif:,.0f} times"
    if published.scale_of(need_config(grid, "transformer")) != "paper":
        raise NotTestableError(f"not the paper's sizes, which set the ratio; {evidence}")
    return Finding(gate / lif >= 8000, evidence)


def _starts_open(backbone: str) -> Rule:
    def judge(grid: Grid) -> Finding:
        need_runs(grid, backbone, BASELINE, LIF)
        changes = []
        for pair in grid.pairs(backbone, LIF):
            before, after = (run.evaluations[0] for run in pair)
            if before["step"] or after["step"]:
                raise NotTestableError(f"{backbone}: no evaluation before the first step")
            changes.append(100 * (after["val_loss"] / before["val_loss"] - 1))
        listed = ", ".join(f"{change:+.3f}%" for change in changes)
        evidence = f"{backbone}, loss of {LIF} against {BASELINE} before training: {listed}"
        return Finding(max(map(abs, changes)) <= 0.1, evidence)

    return judge


_LOSS_CRITERION = (
    "Best val loss (estimate) {relation} over at least 3 common seeds on average, paired t "
    "p < .05, difference larger than the RMS of the null pairs."
)
_LOWER = _LOSS_CRITERION.format(relation="lower than Standard's")
_HIGHER = _LOSS_CRITERION.format(relation="higher than Standard's")
_HIERARCHY_CRITERION = (
    "At least 4 layers and 3 seeds; entropy of the last layer above that of the first with p < .05 "
    "(t-test over seeds); rank correlation of entropy with depth at least .8 on average."
)
_ABSENT_CRITERION = (
    "At least 4 layers and 3 seeds; in Standard{through} the rank correlation is below .8; the "
    "rise from first to last layer is larger in LIF, paired p < .05 and beyond the null pairs' RMS."
)
_NARROW_CRITERION = (
    "Entropy of the first layer lower, and of the last layer higher, than Standard's{through}, "
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
    "Before the first step the loss on the whole validation text is within 0.1% of Standard's, in "
    "each of at least 3 seeds."
)


def _per_backbone(
    key: str, statement: str, source: str, criterion: str, rules: dict[str, Rule]
) -> list[_Spec]:
    """One claim a backbone, of equal statement and criterion."""
    through = {"transformer": "", "cfc": ", measured through a gate at its initial values,"}
    return [
        _Spec(
            f"{key}-{backbone}",
            f"{BACKBONE_LABELS[backbone]}: {statement}",
            source,
            criterion.format(through=through[backbone]),
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
        every(*map(_hierarchy, _BACKBONES), *map(_absent_in_baseline, _BACKBONES)),
    ),
    *_per_backbone(
        "hierarchy",
        "with LIF, entropy rises progressively from shallow to deep layers.",
        "3.3, 3.4",
        _HIERARCHY_CRITERION,
        {backbone: _hierarchy(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "hierarchy-absent",
        "this hierarchy is absent in the ungated baseline.",
        "Abstract; 3.4; 4.3",
        _ABSENT_CRITERION,
        {backbone: _absent_in_baseline(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "narrow-then-broad",
        "LIF narrows shallow layers and broadens deep ones.",
        "3.4, universal pattern",
        _NARROW_CRITERION,
        {backbone: _narrow_then_broad(backbone) for backbone in _BACKBONES},
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
        "so do gates as the text defines them (preset seed).",
        "2.1",
        _LOWER,
        {backbone: differs(backbone, "lif-seed", -1) for backbone in _BACKBONES},
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
        "Over at least 3 seeds the sd of its best val loss is the smallest of all five conditions; "
        "Pitman-Morgan p < .05 against Standard; the sds differ by more than those of the null "
        "runs and Standard.",
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
        differs("transformer", "lif-refractory", -1),
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
        _standard_is_uniform,
    ),
    _Spec(
        "roles",
        "With LIF, heads differentiate into pointers, gatherers and focusers.",
        "3.3; 4.3",
        "Each role appears in each of at least 3 LIF runs, and more heads have one than in "
        "Standard, paired p < .05 and beyond the null pairs' RMS.",
        every(
            _all_roles_appear,
            differs(
                "transformer",
                LIF,
                +1,
                measure=_specialised,
                name="heads with a role",
                digits=1,
            ),
        ),
    ),
    _Spec(
        "roles-by-layer",
        "Pointers are in L0, gatherers in L1, focusers in the last two layers.",
        "3.3",
        "At least 6 layers; so in each of at least 3 LIF runs.",
        _roles_by_layer,
    ),
    _Spec(
        "deviating-heads",
        "3-5 of 36 heads deviate significantly from pass-through.",
        "3.3",
        "36 heads; 3 to 5 with |θ| > .01 in each of at least 3 LIF runs.",
        _few_heads_deviate,
    ),
    _Spec(
        "base-undifferentiated",
        "The CfC base has fire rate 1.000 and entropy 0.000: no differentiation.",
        "3.3; 3.4",
        "In each of at least 3 base runs, measured through a gate at its initial values, fire rate "
        "at least .999 and neuron entropy at most .01 in every layer.",
        _base_is_undifferentiated,
    ),
    *_per_backbone(
        "thresholds-rise",
        "deeper layers consistently learn higher thresholds.",
        "4.2",
        "At least 4 layers and 3 LIF runs; mean θ of the last layer above the first's in every "
        "run, on average with p < .05 (t-test over seeds); rank correlation with depth at least .8 "
        "on average.",
        {backbone: _thresholds_rise(backbone) for backbone in _BACKBONES},
    ),
    _Spec(
        "threshold-ratio",
        "CfC: the threshold of L3 is 3 times that of L0.",
        "4.2",
        "4 layers and at least 3 LIF runs; ratio of mean θ at least 2.5 on average and above 1 in "
        "every run.",
        _threshold_ratio,
    ),
    _Spec(
        "late-filters",
        "Transformer: late-layer heads have the strongest filtering.",
        "4.2",
        "At least 4 layers and 3 LIF runs; the head of the largest contrast g(1)/g(0) lies in the "
        "last third of the layers in every run.",
        _strongest_is_late,
    ),
    *_per_backbone(
        "critical-period",
        "LIF overtakes at about step 1600, in every seed alike.",
        "3.5; 4.1",
        _CRITICAL_CRITERION,
        {backbone: _critical_period(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "thresholds-wake",
        "before that step thresholds are near zero, after it gating is effective.",
        "3.5; 4.1",
        _WAKE_CRITERION,
        {backbone: _thresholds_wake(backbone) for backbone in _BACKBONES},
    ),
    *_per_backbone(
        "starts-open",
        "the gate starts as a pass-through.",
        "1.3; 2.1",
        _OPEN_CRITERION,
        {backbone: _starts_open(backbone) for backbone in _BACKBONES},
    ),
    _Spec(
        "parameter-counts-transformer",
        "LIF adds 108 parameters, with refractory thresholds 180, Qwen's gate 884,736.",
        "2.2; 2.4; 3.6",
        "At the paper's sizes, counted in the models.",
        every(
            *(
                _count("transformer", variant, count)
                for variant, count in published.EXTRA_PARAMETERS.items()
            )
        ),
    ),
    _Spec(
        "parameter-count-cfc",
        "LIF adds 1,536 parameters to the CfC.",
        "2.3",
        "At the sizes that the published CfC losses come from, counted in the model.",
        _count("cfc", LIF, published.CFC_LIF_PARAMETERS),
    ),
    _Spec(
        "parameter-ratio",
        "LIF needs 8,000 times fewer parameters than Qwen's gate.",
        "Abstract; 3.6",
        "At the paper's sizes, counted in the models.",
        _parameter_ratio,
    ),
    _Spec(
        "lif-beats-qwen",
        "LIF's few parameters outperform the many of Qwen's gate (108 against 884K).",
        "1.4; 3.6",
        _LOSS_CRITERION.format(relation="lower than Qwen-gate's"),
        differs("transformer", LIF, -1, base="qwen-gate"),
    ),
)
