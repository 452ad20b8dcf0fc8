"""Rules about structure: entropy and thresholds by depth, roles of heads, firing of neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ember_ext.paper import published
from ember_ext.paper.claims.judging import (
    MIN_SPEARMAN,
    Finding,
    NotTestableError,
    Rule,
    differs,
    every,
    need_config,
    need_layers,
    need_resolution,
    need_runs,
    rises_on_average,
)
from ember_ext.paper.formatting import signed
from ember_ext.paper.runs.finished import BASELINE, LIF, FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.comparisons import Measure
from ember_ext.paper.statistics.depth import (
    ATTENTION_ENTROPY,
    NEURON_ENTROPY,
    THRESHOLD,
    VIRTUAL_FIRE_RATE,
    VIRTUAL_NEURON_ENTROPY,
    depth_profile,
    layer_values,
)
from ember_ext.paper.statistics.heads import (
    DEVIATES_ABOVE,
    ROLES,
    Role,
    gate_units,
    head_entropies,
    head_roles,
    uniform_entropy,
)

FEW_UNITS = 0.05
"""The share of gates up to which thresholds as a whole count as being near zero."""

MIN_THRESHOLD_RATIO = 2.5
"""The ratio from which the published factor of 3 counts as met."""

PUBLISHED_HEADS = 36
"""The heads of the paper's Transformer: 6 layers of 6."""

UNIFORM_SHARE = 0.9
"""The share of uniform attention's entropy above which a head looks at everything alike."""


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
    def judge(finished: FinishedRuns) -> Finding:
        need_layers(finished, backbone)
        need_runs(finished, backbone, LIF)
        profile = depth_profile(finished.runs(backbone, LIF), measure)
        if profile is None:
            raise NotTestableError(f"{backbone} {LIF} has no {measure}")
        what = f"{backbone} {LIF}, {name}"
        return rises_on_average(profile.rises, profile.mean_spearman, what, digits)

    return judge


def hierarchy(backbone: str) -> Rule:
    """The rule that with LIF entropy rises from layer to layer."""
    return _profile_rises(backbone, _own_entropy(backbone), "entropy", 3)


def absent_in_baseline(backbone: str) -> Rule:
    """The rule that the baseline's entropy does not rise with depth, and LIF's rises by more.

    The baseline of the CfC is measured through a gate at its initial values, LIF through its own.
    """
    measure = _fair_entropy(backbone)

    def is_flat(finished: FinishedRuns) -> Finding:
        need_layers(finished, backbone)
        need_runs(finished, backbone, BASELINE)
        profile = depth_profile(finished.runs(backbone, BASELINE), measure)
        assert profile is not None
        correlation = profile.mean_spearman
        assert correlation is not None
        evidence = f"{backbone} {BASELINE}, entropy: Spearman {signed(correlation, 2)} with depth"
        return Finding(correlation < MIN_SPEARMAN, evidence)

    def is_deep(finished: FinishedRuns) -> Finding:
        need_layers(finished, backbone)
        return differs(
            backbone,
            LIF,
            +1,
            measure=_rise(_own_entropy(backbone)),
            base_measure=_rise(measure),
            name="rise of entropy, last minus first layer",
            digits=3,
        )(finished)

    return every(is_flat, is_deep)


def narrow_then_broad(backbone: str) -> Rule:
    """The rule that LIF lowers the first layer's entropy and raises the last one's."""
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


def thresholds_rise(backbone: str) -> Rule:
    """The rule that deeper layers learn higher thresholds: in every seed, and layer by layer."""

    def in_every_seed(finished: FinishedRuns) -> Finding:
        need_layers(finished, backbone)
        need_runs(finished, backbone, LIF)
        profile = depth_profile(finished.runs(backbone, LIF), THRESHOLD)
        if profile is None:
            raise NotTestableError(f"{backbone} {LIF} has no gates")
        count = sum(rise > 0 for rise in profile.rises)
        means = ", ".join(f"{value:.4f}" for value in profile.mean)
        evidence = (
            f"{backbone} {LIF}: mean |θ| by layer {means}; higher in the last layer than in the "
            f"first in {count} of {len(profile.rises)} seeds"
        )
        return Finding(count == len(profile.rises), evidence)

    return every(in_every_seed, _profile_rises(backbone, THRESHOLD, "mean |θ|", 4))


def threshold_ratio(finished: FinishedRuns) -> Finding:
    """Whether the thresholds of the CfC's fourth layer are about 3 times those of its first."""
    need_runs(finished, "cfc", LIF)
    layers = need_config(finished, "cfc")["n_layer"]
    if layers != 4:
        raise NotTestableError(f"cfc: {layers} layers, the claim is about 4")
    profile = depth_profile(finished.runs("cfc", LIF), THRESHOLD)
    if profile is None or min(row[0] for row in profile.values) <= 0:
        raise NotTestableError("cfc lif: the first layer's mean |θ| is not above 0")
    ratios = [row[-1] / row[0] for row in profile.values]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    mean = float(np.mean(ratios))
    evidence = f"cfc lif, mean |θ| of L3 over L0 by seed: {listed}; mean {mean:.2f}"
    return Finding(mean >= MIN_THRESHOLD_RATIO and min(ratios) > 1, evidence)


def thresholds_wake(backbone: str) -> Rule:
    """The rule that hardly any gate has a threshold before step 1600, and more have one later."""

    def share(run: RunResult, evaluation: int) -> float:
        units = gate_units(run, evaluation)
        if not units:
            raise NotTestableError(f"{run.name} has no gates")
        return sum(unit.deviates for unit in units) / len(units)

    def judge(finished: FinishedRuns) -> Finding:
        need_resolution(finished, backbone)
        need_runs(finished, backbone, LIF)
        before, after = [], []
        for run in finished.runs(backbone, LIF):
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
    return ", ".join(f"{value:.1%}" for value in values)


def base_is_undifferentiated(finished: FinishedRuns) -> Finding:
    """Whether all neurons of the CfC without gates fire always and alike."""
    need_runs(finished, "cfc", BASELINE)
    runs = finished.runs("cfc", BASELINE)
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


def _role_totals(runs: Sequence[RunResult]) -> str:
    roles = [role for run in runs for layer in head_roles(run) for role in layer]
    totals = ", ".join(f"{roles.count(role) / len(runs):.1f} {role}" for role in ROLES)
    return f"{totals} heads a run"


def selective_heads(run: RunResult) -> float:
    """Pointers and focusers; a gatherer is what an untrained head is too."""
    roles = [role for layer in head_roles(run) for role in layer]
    return float(roles.count("pointer") + roles.count("focuser"))


def standard_is_uniform(finished: FinishedRuns) -> Finding:
    """Whether every head of the trained baseline attends to everything alike."""
    need_runs(finished, "transformer", BASELINE)
    runs = finished.runs("transformer", BASELINE)
    uniform = uniform_entropy(int(runs[0].config["block_size"]))
    entropies = [h for run in runs for layer in head_entropies(run) for h in layer]
    evidence = (
        f"transformer {BASELINE}: {_role_totals(runs)}; entropies {min(entropies):.2f} to "
        f"{max(entropies):.2f}, uniform attention {uniform:.2f}"
    )
    return Finding(min(entropies) > UNIFORM_SHARE * uniform, evidence)


def _heads(run: RunResult) -> int:
    return int(run.config["n_layer"] * run.config["n_head"])


def _other_size(heads: int) -> str:
    return f"transformer: {heads} heads, the claim is about {PUBLISHED_HEADS}"


def all_roles_appear(finished: FinishedRuns) -> Finding:
    """Whether every LIF run has a pointer, a gatherer and a focuser; fewer than 36 may lack one."""
    need_runs(finished, "transformer", LIF)
    runs = finished.runs("transformer", LIF)
    heads = _heads(runs[0])
    wanted: set[Role] = {"pointer", "gatherer", "focuser"}
    complete = [wanted <= {role for layer in head_roles(run) for role in layer} for run in runs]
    evidence = (
        f"transformer {LIF}: {_role_totals(runs)}, all three roles in {sum(complete)} of "
        f"{len(runs)} runs"
    )
    if not all(complete) and heads < PUBLISHED_HEADS:
        raise NotTestableError(f"{_other_size(heads)}; {evidence}")
    return Finding(all(complete), evidence)


def roles_by_layer(finished: FinishedRuns) -> Finding:
    """Whether every LIF run has each role in the layer where the paper saw it."""
    need_layers(finished, "transformer", 6)
    need_runs(finished, "transformer", LIF)
    runs = finished.runs("transformer", LIF)
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


def few_heads_deviate(finished: FinishedRuns) -> Finding:
    """Whether 3 to 5 of 36 heads of every LIF run have learned a threshold."""
    need_runs(finished, "transformer", LIF)
    runs = finished.runs("transformer", LIF)
    heads = _heads(runs[0])
    if heads != PUBLISHED_HEADS:
        raise NotTestableError(_other_size(heads))
    counts = [sum(unit.deviates for unit in gate_units(run)) for run in runs]
    evidence = f"transformer {LIF}, deviating heads by seed: {', '.join(map(str, counts))}"
    return Finding(all(3 <= count <= 5 for count in counts), evidence)


def strongest_is_late(finished: FinishedRuns) -> Finding:
    """Whether the head of the largest contrast lies in the last third of the layers."""
    need_layers(finished, "transformer")
    need_runs(finished, "transformer", LIF)
    layers = need_config(finished, "transformer")["n_layer"]
    found = []
    for run in finished.runs("transformer", LIF):
        units = gate_units(run)
        if not units:
            raise NotTestableError(f"{run.name} has no gates")
        found.append(max(units, key=lambda unit: unit.contrast))
    listed = ", ".join(f"L{unit.layer} (g(1)/g(0) = {unit.contrast:.2f})" for unit in found)
    evidence = f"transformer lif, layer of the strongest gate by seed: {listed}"
    return Finding(all(unit.layer >= layers - layers // 3 for unit in found), evidence)
