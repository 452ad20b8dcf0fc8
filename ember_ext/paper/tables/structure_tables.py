"""Tables of structure: roles of heads, firing of neurons, entropy and thresholds by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ember_ext.paper import published
from ember_ext.paper.formatting import DASH, mean_sd, number, signed
from ember_ext.paper.labels import BACKBONE_LABELS, LATER_LABELS, VARIANT_LABELS
from ember_ext.paper.runs.finished import BASELINE, NULL, FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.depth import (
    ALWAYS_ON,
    ATTENTION_ENTROPY,
    ATTENTION_SUPPORT,
    FIRE_RATE,
    FIRST_TOKEN_MASS,
    NEURON_ENTROPY,
    SELECTIVE,
    THRESHOLD,
    VIRTUAL_ALWAYS_ON,
    VIRTUAL_FIRE_RATE,
    VIRTUAL_NEURON_ENTROPY,
    VIRTUAL_SELECTIVE,
    DepthProfile,
    depth_profile,
    layer_values,
)
from ember_ext.paper.statistics.heads import (
    ROLES,
    GateLabel,
    GateUnit,
    Role,
    gate_units,
    gatherer_cut_off,
    role_counts,
    uniform_entropy,
    uniform_first_token_mass,
    uniform_support,
)
from ember_ext.paper.statistics.paired import describe, principal_components
from ember_ext.paper.tables.table import (
    ROW_HEAD,
    SEEDS_NOTE,
    Table,
    not_run,
    other_sizes_note,
    row_head,
    variants_in_order,
)
from ember_ext.paper.training.metrics import ALWAYS_ON_ABOVE, METRIC_WINDOWS, SELECTIVE_BELOW

_ROLE_COLUMNS: dict[Role, str] = {
    "pointer": "Pointers",
    "focuser": "Focusers",
    "mixed": "Mixed",
    "gatherer": "Gatherers",
}

_ATTENTION_MEASURES = {
    ATTENTION_ENTROPY: ("Entropy", 3),
    ATTENTION_SUPPORT: ("Support", 2),
    FIRST_TOKEN_MASS: ("First-token mass", 4),
}
"""Columns, and their digits."""

_WINDOWS_NOTE = (
    f"The measurements are on {METRIC_WINDOWS} random windows of the validation text. {SEEDS_NOTE}"
)

_GATE_LABELS: tuple[GateLabel, ...] = ("selective", "mild", "moderate", "pass-through")


def head_table(finished: FinishedRuns) -> Table:
    """Table 3.3a: what the heads of each layer of the Transformer do."""
    columns = (
        *ROW_HEAD,
        "Layer",
        *(_ROLE_COLUMNS[role] for role in ROLES),
        *(column for column, _ in _ATTENTION_MEASURES.values()),
        "Deviating heads",
        "Largest contrast",
        "/".join(_GATE_LABELS).capitalize(),
    )
    rows: list[tuple[str, ...]] = []
    for variant in variants_in_order(finished, "transformer", without=[NULL]):
        runs = finished.runs("transformer", variant)
        head = row_head(finished, "transformer", variant)
        if not runs:
            rows.append(not_run(head, columns))
            continue
        layers = range(int(runs[0].config["n_layer"]))
        rows += [(*head, f"L{layer}", *_head_cells(runs, [layer])) for layer in layers]
        rows.append((*head, "all", *_head_cells(runs, layers)))
    config = finished.config("transformer")
    block_size = 256 if config is None else int(config["block_size"])
    notes = (
        "Counts are means over seeds at the last evaluation. The role of a head follows from its "
        "mean attention entropy H in nats. A pointer has H < 0.1, a focuser H < 1, and a gatherer "
        f"H > {gatherer_cut_off(block_size):.2f}, which is 77% of the "
        f"{uniform_entropy(block_size):.2f} of uniform attention over windows of {block_size} (3.5 "
        "over windows of 256). All other heads are mixed.",
        "Support is the number of keys with a weight above 0.01 for a query. First-token mass is "
        "the weight of the window's first token. Both are means over queries, windows and heads, "
        f"as the entropy is. Uniform attention has {uniform_support(block_size):.2f} and "
        f"{uniform_first_token_mass(block_size):.4f}.",
        "A head deviates if its effective |θ| > 0.01, which is raw 0.1 of the released gate. The "
        "heads of LIF-fixed do so by construction. Contrast is g(1)/g(0), and 1 for an open gate. "
        "The table has the largest over heads and seeds. The labels are those of the authors' "
        "analysis, which were made for the released gate, summed over seeds.",
        _WINDOWS_NOTE,
        published.HEADS_NOTE,
    )
    return Table("3.3a", "Roles of attention heads, Transformer", columns, tuple(rows), notes)


def _head_cells(runs: Sequence[RunResult], layers: Sequence[int]) -> list[str]:
    """Roles, attention and gates of the heads of some layers."""
    roles: list[Counter[Role]] = []
    units: list[list[GateUnit]] = []
    for run in runs:
        counts = role_counts(run)
        roles.append(sum((counts[layer] for layer in layers), Counter()))
        units.append([unit for unit in gate_units(run) if unit.layer in layers])
    attention = []
    for measure, (_, digits) in _ATTENTION_MEASURES.items():
        profile = depth_profile(runs, measure)
        assert profile is not None
        means = [float(np.mean([row[layer] for layer in layers])) for row in profile.values]
        attention.append(mean_sd(describe(means), digits))
    return [
        *(f"{np.mean([count[role] for count in roles]):.1f}" for role in ROLES),
        *attention,
        *_gate_cells(units),
    ]


def _gate_cells(units: Sequence[Sequence[GateUnit]]) -> list[str]:
    everything = [unit for run in units for unit in run]
    if not everything:
        return [DASH] * 3
    labels = Counter(unit.label for unit in everything)
    return [
        f"{np.mean([sum(unit.deviates for unit in run) for run in units]):.1f}",
        f"{max(unit.contrast for unit in everything):.3f}",
        "/".join(str(labels[label]) for label in _GATE_LABELS),
    ]


def neuron_table(finished: FinishedRuns) -> Table:
    """Table 3.3b: fire rate and entropy of the neurons of each layer of the CfC."""
    measures = {
        FIRE_RATE: "Fire rate",
        NEURON_ENTROPY: "Neuron entropy",
        ALWAYS_ON: "Always on",
        SELECTIVE: "Selective",
        VIRTUAL_FIRE_RATE: "Fire rate (virtual gate)",
        VIRTUAL_NEURON_ENTROPY: "Neuron entropy (virtual gate)",
        VIRTUAL_ALWAYS_ON: "Always on (virtual gate)",
        VIRTUAL_SELECTIVE: "Selective (virtual gate)",
    }
    columns = (
        *ROW_HEAD,
        "Layer",
        *measures.values(),
        "Published fire rate",
        "Published entropy",
    )
    config = finished.config("cfc")
    comparable = config is None or published.scale_of(config) == "paper"
    rows: list[tuple[str, ...]] = []
    for variant in variants_in_order(finished, "cfc", without=[NULL]):
        runs = finished.runs("cfc", variant)
        printed = published.NEURONS.get(variant, {}) if comparable else {}
        head = row_head(finished, "cfc", variant)
        if not runs and not printed:
            rows.append(not_run(head, columns))
            continue
        profiles = [depth_profile(runs, measure) for measure in measures]
        for layer in range(int(runs[0].config["n_layer"])) if runs else sorted(printed):
            fire, entropy = printed.get(layer, (None, None))
            cells = [_layer_cell(profile, layer) for profile in profiles]
            rows.append((*head, f"L{layer}", *cells, number(fire, 3), number(entropy, 3)))
    notes = (
        "The numbers are means over neurons and seeds at the last evaluation. "
        f"{_virtual_gate_note(finished)}",
        "The fire rate is a mean over neurons. It is also the mean share of a layer's neurons that "
        "fire at a time (population sparsity). Always on is the share of neurons that fire at more "
        f"than {ALWAYS_ON_ABOVE:.0%} of the characters, and selective the share at fewer than "
        f"{SELECTIVE_BELOW:.0%}. A cell has {DASH} where a model has no gate, or where an earlier "
        "version measured it.",
        f"{_WINDOWS_NOTE} The authors' fire rates are of 320 windows.",
        "Published numbers stand beside runs of the paper's sizes only.",
        published.NEURONS_NOTE,
    )
    return Table("3.3b", "Firing of neurons, CfC", columns, tuple(rows), notes)


def _virtual_gate_note(finished: FinishedRuns) -> str:
    bases = finished.runs("cfc", BASELINE)
    preset = bases[0].config["gate_preset"] if bases else "released"
    return (
        "The virtual gate is a gate at its initial values. It measures models with and without "
        f"gates alike. The base's has the preset {preset!r}, so compare it with rows of that "
        "preset."
    )


def _layer_cell(profile: DepthProfile | None, layer: int, digits: int = 3) -> str:
    if profile is None:
        return DASH
    return mean_sd(describe([row[layer] for row in profile.values]), digits)


def depth_table(finished: FinishedRuns) -> Table:
    """Table 3.4: entropy of the first and of the last layer."""
    columns = (
        "Backbone",
        *ROW_HEAD,
        "Measured through",
        "First layer",
        "Last layer",
        "Rise",
        "Spearman",
        "Published first",
        "Published last",
    )
    rows: list[tuple[str, ...]] = []
    for backbone, label in BACKBONE_LABELS.items():
        for variant in variants_in_order(finished, backbone, without=[NULL]):
            runs = finished.runs(backbone, variant)
            if backbone == "transformer":
                measures = {"attention": ATTENTION_ENTROPY}
            elif variant == BASELINE:
                measures = {"virtual gate": VIRTUAL_NEURON_ENTROPY}
            else:
                measures = {"own gate": NEURON_ENTROPY, "virtual gate": VIRTUAL_NEURON_ENTROPY}
            printed = published.DEPTH.get((backbone, variant))
            for through, measure in measures.items():
                profile = depth_profile(runs, measure)
                first, last = printed or (None, None)
                # The published values are of each model's own measure.
                printed = None
                rows.append(
                    (
                        label,
                        *row_head(finished, backbone, variant),
                        through,
                        _layer_cell(profile, 0),
                        _layer_cell(profile, -1),
                        DASH if profile is None else mean_sd(describe(profile.rises), 3),
                        DASH if profile is None else signed(profile.mean_spearman, 2),
                        number(first, 3),
                        number(last, 3),
                    )
                )
    notes = (
        "Entropy is that of attention (Transformer) or of neurons (CfC) in nats, a mean over "
        "heads or neurons at the last evaluation. Rise is the last layer minus the first. "
        "Spearman is the rank correlation of layer and entropy, averaged over seeds. It needs 3 "
        "layers.",
        _virtual_gate_note(finished),
        _WINDOWS_NOTE,
        *other_sizes_note(finished, BACKBONE_LABELS),
        *published.DEPTH_NOTES,
    )
    return Table("3.4", "Entropy by depth", columns, tuple(rows), notes)


def threshold_table(finished: FinishedRuns) -> Table:
    """Table 4.2: the learned thresholds of each layer."""
    columns = (
        "Backbone",
        *ROW_HEAD,
        "Layer",
        "Mean |θ| at the start",
        "Mean |θ| at the end",
        "Ratio to L0",
        "Published θ",
    )
    rows: list[tuple[str, ...]] = []
    for backbone, label in BACKBONE_LABELS.items():
        for variant in _learned_gates(finished, backbone):
            runs = finished.runs(backbone, variant)
            head = (label, *row_head(finished, backbone, variant))
            profile = depth_profile(runs, THRESHOLD)
            starts = layer_values(runs[0], THRESHOLD, 0) if runs else None
            if profile is None or starts is None:
                rows.append(not_run(head, columns))
                continue
            mean = profile.mean
            known = published.THRESHOLDS.get((backbone, variant), ())
            for layer, start in enumerate(starts):
                rows.append(
                    (
                        *head,
                        f"L{layer}",
                        number(start, 5),
                        _layer_cell(profile, layer, 5),
                        number(mean[layer] / mean[0], 2) if mean[0] > 0 else DASH,
                        number(known[layer], 5) if len(known) == len(starts) else DASH,
                    )
                )
    notes = (
        f"The thresholds are effective |θ|, averaged over heads or neurons and seeds. {SEEDS_NOTE}",
        *other_sizes_note(finished, ("cfc",)),
        published.THRESHOLDS_NOTE,
    )
    return Table("4.2", "Thresholds by depth", columns, tuple(rows), notes)


def gate_table(finished: FinishedRuns) -> Table:
    """Table S3: how far the learned gates are spread, and along which of their parameters."""
    columns = (
        "Backbone",
        *ROW_HEAD,
        "Gates",
        "θ",
        "λ",
        "k",
        "First component",
        "Its direction (θ, λ, k)",
        "Second component",
    )
    rows: list[tuple[str, ...]] = []
    for backbone, label in BACKBONE_LABELS.items():
        for variant in _learned_gates(finished, backbone):
            units = [unit for run in finished.runs(backbone, variant) for unit in gate_units(run)]
            head = (label, *row_head(finished, backbone, variant))
            if not units:
                rows.append(not_run(head, columns))
                continue
            points = [(unit.threshold, unit.leak, unit.steepness) for unit in units]
            cells = [mean_sd(describe(values)) for values in zip(*points, strict=True)]
            components = principal_components(points)
            if components is None:
                cells += [DASH] * 3
            else:
                first, second, _ = (f"{share:.1%}" for share in components.shares)
                # Adding 0 turns -0 into 0.
                direction = ", ".join(signed(round(x, 2) + 0, 2) for x in components.directions[0])
                cells += [first, f"({direction})", second]
            rows.append((*head, str(len(units)), *cells))
    notes = (
        "The table has the mean ± sd of effective θ, λ and k over all heads or neurons of all "
        "seeds at the last evaluation, and the shares of their variance in principal components. "
        "The parameters are not standardised, as in the authors' analysis, so the largest "
        "decides: k.",
        published.GATES_NOTE,
    )
    return Table("S3", "Spread of the learned gates", columns, tuple(rows), notes)


def _learned_gates(finished: FinishedRuns, backbone: str) -> list[str]:
    """The variants with a learnable LIF gate: those of the paper, and others that were run."""
    learned = ("lif", "lif-text", "lif-refractory")
    later = [variant for variant in LATER_LABELS[backbone] if finished.runs(backbone, variant)]
    return [variant for variant in learned if variant in VARIANT_LABELS[backbone]] + later
