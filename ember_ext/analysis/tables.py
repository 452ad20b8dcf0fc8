"""The paper's tables with this project's numbers beside the published ones.

The main loss is the paper's: the smallest estimate of the validation loss over all evaluations of a
run. Rows are of one variant each, so that the gate of the paper's text ("seed") and that of its
released code ("released") stand apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ember_ext.analysis import published
from ember_ext.analysis.comparisons import (
    LOSS_MEASURES,
    best_full_loss,
    best_loss,
    compare,
    extra_parameters,
    final_full_loss,
    measure_noise,
    noise_curve,
)
from ember_ext.analysis.crossover import find_crossovers
from ember_ext.analysis.depth import (
    ATTENTION_ENTROPY,
    FIRE_RATE,
    NEURON_ENTROPY,
    THRESHOLD,
    VIRTUAL_FIRE_RATE,
    VIRTUAL_NEURON_ENTROPY,
    DepthProfile,
    depth_profile,
    layer_values,
)
from ember_ext.analysis.formatting import (
    DASH,
    interval,
    mean_sd,
    number,
    p_value,
    percent,
    signed,
)
from ember_ext.analysis.grid import BASELINE, NULL, Grid
from ember_ext.analysis.heads import (
    ROLES,
    GateLabel,
    GateUnit,
    Role,
    gate_units,
    gatherer_cut_off,
    role_counts,
    uniform_entropy,
)
from ember_ext.analysis.labels import BACKBONE_LABELS, VARIANT_LABELS, variant_label
from ember_ext.analysis.results import RunResult
from ember_ext.analysis.statistics import NoiseFloor, Sample, describe
from ember_ext.data.sources import TINY_SHA256

_GATE_LABELS: tuple[GateLabel, ...] = ("selective", "mild", "moderate", "pass-through")

# The gate that a row is about before anything was run.
_PLANNED_GATES = {
    "lif-fixed": "released",
    "lif": "released",
    "lif-seed": "seed",
    "lif-refractory": "released",
}


@dataclass(frozen=True)
class Table:
    """A table, ready to print.

    Attributes:
        number: the section of the paper that it answers to, such as "3.1"; "S1" and on for tables
            that the paper lacks.
        title: one line.
        columns: their heads.
        rows: as many cells as columns; a dash where nothing was run.
        notes: sentences that belong below the table.
    """

    number: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(results: Sequence[RunResult]) -> list[Table]:
    """All tables, also where nothing was run.

    Args:
        results: of any runs, in any order.

    Raises:
        ResultError: see `Grid`.
    """
    grid = Grid(results)
    return [
        _performance(grid, "transformer", "3.1"),
        _performance(grid, "cfc", "3.2"),
        _head_roles(grid),
        _neurons(grid),
        _depth(grid),
        _crossovers(grid),
        _parameters(grid),
        _thresholds(grid),
        _statistics(grid),
        _noise(grid),
    ]


def gate_label(grid: Grid, backbone: str, variant: str) -> str:
    """The gate preset of a variant; a dash if it has no gate."""
    runs = grid.runs(backbone, variant)
    if not runs:
        return _PLANNED_GATES.get(variant, DASH)
    return str(runs[0].config["gate_preset"]) if runs[0].evaluations[-1]["gates"] else DASH


def _rows_of(grid: Grid, backbone: str, without: Sequence[str] = ()) -> list[str]:
    """The variants of a table in order: the known ones, then others that were run."""
    known = list(VARIANT_LABELS[backbone])
    others = [v for v in grid.variants(backbone) if v not in known]
    return [variant for variant in known + others if variant not in without]


def _sample(runs: Iterable[float]) -> Sample | None:
    values = list(runs)
    return describe(values) if values else None


def _performance(grid: Grid, backbone: str, table: str) -> Table:
    config = grid.config(backbone)
    small_scale = config is not None and published.scale_of(config) == "xs"
    base = variant_label(backbone, BASELINE)
    columns = [
        "Condition",
        "Gate",
        "Seeds",
        "Val loss",
        "sd",
        "sd (ddof 0)",
        f"vs {base}",
        "Published",
        "Published sd (ddof 0)",
        f"Published vs {base}",
    ]
    if small_scale:
        columns += ["Authors' xs", f"Authors' xs vs {base}"]
    columns += ["Best, whole text", "Final, whole text"]
    rows, notes = [], []
    for variant in _rows_of(grid, backbone, without=[NULL]):
        runs = grid.runs(backbone, variant)
        sample = _sample(map(best_loss, runs))
        comparison = compare(grid, backbone, variant)
        change = None if comparison is None or variant == BASELINE else comparison.percent
        if comparison and comparison.n < len(runs):
            notes.append(
                f"{variant_label(backbone, variant)} ({gate_label(grid, backbone, variant)}): "
                f"compared over the {comparison.n} seeds that it shares with {base}."
            )
        row = [
            variant_label(backbone, variant),
            gate_label(grid, backbone, variant),
            str(len(runs)) if runs else DASH,
            number(sample.mean if sample else None),
            number(sample.sd if sample else None),
            number(sample.sd_population if sample else None),
            _change(variant, change, bool(runs)),
            *_published_cells(backbone, variant),
        ]
        if small_scale:
            row += _small_scale_cells(backbone, variant)
        for measure in (best_full_loss, final_full_loss):
            row.append(mean_sd(_sample(map(measure, runs))))
        rows.append(tuple(row))
    notes.append(
        "Val loss: the smallest estimate over the evaluations of a run (random batches, the "
        "paper's protocol), mean over seeds; sd with ddof 1, and with the paper's ddof 0. The last "
        "two columns are on the whole validation text, which has no sampling error."
    )
    if config and backbone == "transformer" and grid.runs(backbone, "lif-refractory"):
        notes.append(_refractory_note(str(config.get("refractory_mode"))))
    notes += [*_scale_notes(grid, backbone), *published.LOSS_NOTES[backbone]]
    if small_scale:
        notes.append(published.XS_NOTE[backbone])
    title = f"Validation loss, {BACKBONE_LABELS[backbone]}"
    return Table(table, title, tuple(columns), tuple(rows), tuple(notes))


def _change(variant: str, change: float | None, was_run: bool) -> str:
    if variant == BASELINE:
        return "baseline" if was_run else DASH
    return percent(change)


def _published_cells(backbone: str, variant: str) -> list[str]:
    row = published.LOSSES[backbone].get(variant)
    if row is None:
        return [DASH] * 3
    change = "baseline" if row.percent is None else percent(row.percent)
    return [number(row.mean), number(row.sd), change]


def _small_scale_cells(backbone: str, variant: str) -> list[str]:
    row = published.XS_LOSSES[backbone].get(variant)
    if row is None:
        return [DASH] * 2
    spread = "" if row.sd is None else f" ± {row.sd:.4f}"
    change = "baseline" if row.percent is None else percent(row.percent)
    return [f"{row.mean:.4f}{spread} (n = {row.n})", change]


def _refractory_note(mode: str) -> str:
    if mode == "paper":
        return "Our refractory thresholds look ahead, as the published ones do (mode 'paper')."
    return (
        f"Our refractory thresholds look at the past only (mode {mode!r}); the published ones look "
        "ahead."
    )


def _scale_notes(grid: Grid, backbone: str) -> list[str]:
    """What keeps our losses from being compared with the published ones."""
    runs = [run for run in grid.results if run.backbone == backbone]
    if not runs:
        return ["Nothing was run."]
    notes = []
    scale = published.scale_of(runs[0].config)
    if scale == "xs":
        notes.append(
            "Our runs have the authors' xs sizes; the paper's table is of a larger model, so "
            "compare our losses with the column of the authors' xs runs."
        )
    elif scale == "other":
        notes.append(
            "Our runs have neither the paper's nor the authors' xs sizes and length: their losses "
            "do not compare with published ones."
        )
    if runs[0].corpus.get("sha256") != TINY_SHA256:
        notes.append(
            f"Our corpus is {runs[0].corpus.get('name')!r}, not Tiny Shakespeare: losses do not "
            "compare with published ones."
        )
    return notes


def _head_roles(grid: Grid) -> Table:
    columns = (
        "Condition",
        "Gate",
        "Seeds",
        "Layer",
        *(f"{role.capitalize()}s" if role != "mixed" else "Mixed" for role in ROLES),
        "Entropy",
        "Deviating heads",
        "Largest contrast",
        "Selective/mild/moderate/pass-through",
    )
    rows: list[tuple[str, ...]] = []
    for variant in _rows_of(grid, "transformer", without=[NULL]):
        runs = grid.runs("transformer", variant)
        head = (
            variant_label("transformer", variant),
            gate_label(grid, "transformer", variant),
            str(len(runs)) if runs else DASH,
        )
        if not runs:
            rows.append((*head, *[DASH] * (len(columns) - len(head))))
            continue
        roles = [role_counts(run) for run in runs]
        units = [gate_units(run) for run in runs]
        profile = depth_profile(runs, ATTENTION_ENTROPY)
        assert profile is not None
        layers = len(profile.values[0])
        for layer in range(layers):
            rows.append(
                (
                    *head,
                    f"L{layer}",
                    *_role_cells([counts[layer] for counts in roles]),
                    mean_sd(describe([row[layer] for row in profile.values]), 3),
                    *_gate_cells([[u for u in run if u.layer == layer] for run in units]),
                )
            )
        rows.append(
            (
                *head,
                "all",
                *_role_cells([sum(counts, Counter()) for counts in roles]),
                mean_sd(describe([float(np.mean(row)) for row in profile.values]), 3),
                *_gate_cells(units),
            )
        )
    config = grid.config("transformer")
    block_size = 256 if config is None else int(config["block_size"])
    notes = (
        "Counts are means over seeds at the last evaluation. Roles by mean attention entropy H in "
        f"nats: pointer H < 0.1, focuser H < 1, gatherer H > {gatherer_cut_off(block_size):.2f} "
        f"(77% of the {uniform_entropy(block_size):.2f} of uniform attention over windows of "
        f"{block_size}; 3.5 over windows of 256), otherwise mixed.",
        "A head deviates if its effective |θ| > 0.01 (raw 0.1 of the released gate); those of "
        "LIF-fixed do by construction. Contrast is g(1)/g(0), 1 for an open gate; the largest over "
        "heads and seeds is given. Labels, summed over seeds, are those of the authors' analysis, "
        "made for the released gate.",
        published.HEADS_NOTE,
    )
    return Table("3.3a", "Roles of attention heads, Transformer", columns, tuple(rows), notes)


def _role_cells(counts: Sequence[Counter[Role]]) -> list[str]:
    return [f"{np.mean([count[role] for count in counts]):.1f}" for role in ROLES]


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


def _neurons(grid: Grid) -> Table:
    columns = (
        "Condition",
        "Gate",
        "Seeds",
        "Layer",
        "Fire rate",
        "Neuron entropy",
        "Fire rate (virtual gate)",
        "Neuron entropy (virtual gate)",
        "Published fire rate",
        "Published entropy",
    )
    measures = (FIRE_RATE, NEURON_ENTROPY, VIRTUAL_FIRE_RATE, VIRTUAL_NEURON_ENTROPY)
    rows: list[tuple[str, ...]] = []
    for variant in _rows_of(grid, "cfc", without=[NULL]):
        runs = grid.runs("cfc", variant)
        head = (
            variant_label("cfc", variant),
            gate_label(grid, "cfc", variant),
            str(len(runs)) if runs else DASH,
        )
        profiles = [depth_profile(runs, measure) for measure in measures]
        layers = int(runs[0].config["n_layer"]) if runs else 4
        comparable = not runs or published.scale_of(runs[0].config) == "paper"
        for layer in range(layers):
            fire, entropy = (
                published.NEURONS.get(variant, {}).get(layer, (None, None))
                if comparable
                else (None, None)
            )
            if not runs and fire is None:
                continue
            cells = [_layer_cell(profile, layer) for profile in profiles]
            rows.append((*head, f"L{layer}", *cells, number(fire, 3), number(entropy, 3)))
    notes = (
        "Means over neurons and seeds at the last evaluation. The virtual gate is one at its "
        "initial values, of the preset of each row, so that models with and without gates are "
        "measured alike.",
        "Published numbers stand beside runs of the paper's sizes only.",
        published.NEURONS_NOTE,
    )
    return Table("3.3b", "Firing of neurons, CfC", columns, tuple(rows), notes)


def _layer_cell(profile: DepthProfile | None, layer: int) -> str:
    if profile is None:
        return DASH
    return mean_sd(describe([row[layer] for row in profile.values]), 3)


def _depth(grid: Grid) -> Table:
    columns = (
        "Backbone",
        "Condition",
        "Gate",
        "Measured through",
        "Seeds",
        "First layer",
        "Last layer",
        "Rise",
        "Spearman",
        "Published first",
        "Published last",
    )
    rows: list[tuple[str, ...]] = []
    for backbone in VARIANT_LABELS:
        measures = (
            {"attention": ATTENTION_ENTROPY}
            if backbone == "transformer"
            else {"own gate": NEURON_ENTROPY, "virtual gate": VIRTUAL_NEURON_ENTROPY}
        )
        for variant in _rows_of(grid, backbone, without=[NULL]):
            runs = grid.runs(backbone, variant)
            for through, measure in measures.items():
                if through == "own gate" and variant == BASELINE:
                    continue
                profile = depth_profile(runs, measure)
                first, last = published.DEPTH.get((backbone, variant), (None, None))
                if through == "virtual gate" and variant != BASELINE:
                    first = last = None
                rows.append(
                    (
                        BACKBONE_LABELS[backbone],
                        variant_label(backbone, variant),
                        gate_label(grid, backbone, variant),
                        through,
                        str(len(runs)) if runs else DASH,
                        _layer_cell(profile, 0),
                        _layer_cell(profile, -1),
                        DASH if profile is None else mean_sd(describe(profile.rises), 3),
                        DASH if profile is None else signed(profile.mean_spearman, 2),
                        number(first, 3),
                        number(last, 3),
                    )
                )
    notes = (
        "Entropy of attention (Transformer) and of neurons (CfC), in nats, means over heads or "
        "neurons, at the last evaluation. Rise: last layer minus first. Spearman: rank correlation "
        "of layer and entropy, mean over seeds, with 3 layers or more.",
        *published.DEPTH_NOTES,
    )
    return Table("3.4", "Entropy against depth", columns, tuple(rows), notes)


def _crossovers(grid: Grid) -> Table:
    columns = (
        "Backbone",
        "Condition",
        "Gate",
        "Rule",
        "Seeds",
        "With a crossover",
        "Step by seed",
        "Mean",
        "Range",
        "Published",
    )
    rows = []
    for backbone in VARIANT_LABELS:
        for variant in ("lif", "lif-seed", NULL):
            pairs = grid.pairs(backbone, variant)
            crossovers = find_crossovers(pairs).crossovers
            for rule in ("first", "persistent"):
                by_seed = {c.seed: getattr(c, rule) for c in crossovers}
                steps = [step for step in by_seed.values() if step is not None]
                said = rule == "first" and (backbone, variant) == ("cfc", "lif")
                rows.append(
                    (
                        BACKBONE_LABELS[backbone],
                        variant_label(backbone, variant),
                        gate_label(grid, backbone, variant),
                        rule,
                        str(len(pairs)) if pairs else DASH,
                        str(len(steps)) if pairs else DASH,
                        ", ".join(f"{seed}: {number(s, 0)}" for seed, s in by_seed.items()) or DASH,
                        mean_sd(_sample(steps), 0),
                        f"{min(steps)}-{max(steps)}" if steps else DASH,
                        str(published.CRITICAL_STEP) if said else DASH,
                    )
                )
    notes = (
        "First (the published rule): the first evaluation at which the estimate of the validation "
        "loss is below the baseline's. Persistent: the first from which it stays below to the end. "
        "The null pair shows what either rule finds where there is nothing to find.",
        published.CROSSOVER_NOTE,
    )
    return Table("3.5", "Crossover with the baseline", columns, tuple(rows), notes)


def _parameters(grid: Grid) -> Table:
    columns = (
        "Backbone",
        "Mechanism",
        "Gate",
        "Extra parameters",
        "Val loss effect",
        "p",
        "Published extra parameters",
        "Published effect",
    )
    rows = []
    for backbone in VARIANT_LABELS:
        for variant in _rows_of(grid, backbone, without=[BASELINE, NULL, "lif-fixed"]):
            comparison = compare(grid, backbone, variant)
            extra = extra_parameters(grid, backbone, variant)
            printed = published.LOSSES[backbone].get(variant)
            count = published.EXTRA_PARAMETERS.get(variant) if backbone == "transformer" else None
            if (backbone, variant) == ("cfc", "lif"):
                count = published.CFC_LIF_PARAMETERS
            rows.append(
                (
                    BACKBONE_LABELS[backbone],
                    variant_label(backbone, variant),
                    gate_label(grid, backbone, variant),
                    DASH if extra is None else f"{extra:,}",
                    percent(comparison.percent if comparison else None),
                    p_value(comparison.t_p if comparison else None),
                    DASH if count is None else f"{count:,}",
                    percent(printed.percent if printed else None),
                )
            )
    notes = (
        "Effect on the smallest estimate of the validation loss, over common seeds; p of the "
        "paired t-test, from 3 seeds on.",
        published.PARAMETERS_NOTE,
    )
    return Table("3.6", "Parameters and what they buy", columns, tuple(rows), notes)


def _thresholds(grid: Grid) -> Table:
    columns = (
        "Backbone",
        "Condition",
        "Gate",
        "Seeds",
        "Layer",
        "Mean θ at the start",
        "Mean θ at the end",
        "Ratio to L0",
        "Published θ",
    )
    rows: list[tuple[str, ...]] = []
    for backbone in VARIANT_LABELS:
        for variant in ("lif", "lif-seed", "lif-refractory"):
            runs = grid.runs(backbone, variant)
            profile = depth_profile(runs, THRESHOLD)
            if profile is None:
                if variant in VARIANT_LABELS[backbone]:
                    labels = BACKBONE_LABELS[backbone], variant_label(backbone, variant)
                    gate = gate_label(grid, backbone, variant)
                    rows.append((*labels, gate, *[DASH] * (len(columns) - 3)))
                continue
            starts = layer_values(runs[0], THRESHOLD, 0)
            assert starts is not None
            known = (
                published.CFC_THRESHOLDS_RAW
                if (backbone, variant) == ("cfc", "lif") and len(profile.mean) == 4
                else ()
            )
            for layer, value in enumerate(profile.mean):
                first = profile.mean[0]
                rows.append(
                    (
                        BACKBONE_LABELS[backbone],
                        variant_label(backbone, variant),
                        gate_label(grid, backbone, variant),
                        str(len(runs)),
                        f"L{layer}",
                        number(starts[layer], 5),
                        mean_sd(describe([row[layer] for row in profile.values]), 5),
                        number(value / first, 2) if first > 0 else DASH,
                        number(known[layer] / 10, 5) if known else DASH,
                    )
                )
    notes = (
        "Effective θ, means over heads or neurons and seeds. Published: a tenth of the raw values "
        "of the authors' 4-layer CfC.",
        "In the authors' Transformer runs layer 0 has the largest thresholds, in 3 of 3 and in 7 "
        "of 8 seeds.",
    )
    return Table("4.2", "Thresholds against depth", columns, tuple(rows), notes)


def _statistics(grid: Grid) -> Table:
    columns = (
        "Backbone",
        "Condition",
        "Gate",
        "Loss",
        "Seeds",
        "Baseline",
        "Condition's",
        "Difference",
        "%",
        "Lower in",
        "t p",
        "Wilcoxon p",
        "dz",
        "95% interval (t)",
        "95% interval (BCa)",
        "sd ratio",
        "Pitman-Morgan p",
        "F p",
        "Noise floor (RMS)",
        "Beyond noise",
    )
    rows: list[tuple[str, ...]] = []
    for backbone in grid.backbones:
        for variant in _rows_of(grid, backbone, without=[BASELINE]):
            for name in ("best, estimate", "final, whole text"):
                c = compare(grid, backbone, variant, LOSS_MEASURES[name])
                if c is None:
                    continue
                floor = measure_noise(grid, backbone, LOSS_MEASURES[name])
                rows.append(
                    (
                        BACKBONE_LABELS[backbone],
                        variant_label(backbone, variant),
                        gate_label(grid, backbone, variant),
                        name,
                        str(c.n),
                        mean_sd(c.base),
                        mean_sd(c.other),
                        signed(c.difference, 5),
                        percent(c.percent),
                        f"{c.wins}/{c.n}",
                        p_value(c.t_p),
                        p_value(c.wilcoxon_p),
                        signed(c.dz, 2),
                        interval(c.t_interval),
                        interval(c.bootstrap_interval),
                        number(c.variance.sd_ratio if c.variance else None, 2),
                        p_value(c.variance.pitman_morgan_p if c.variance else None),
                        p_value(c.variance.f_p if c.variance else None),
                        number(floor.rms if floor else None, 5),
                        _beyond(c.difference, floor) if variant != NULL else DASH,
                    )
                )
    notes = (
        "Condition minus baseline over common seeds; tests and intervals from 3 pairs on. p values "
        "are two-sided and not corrected for the number of rows: of twenty null comparisons one is "
        "below .05 by chance. With n pairs Wilcoxon's p cannot fall below 2^(1-n), so under 6 "
        "pairs it is never below .05.",
        "The BCa bootstrap's interval is too narrow for few pairs; prefer t's below about 10. "
        "Pitman-Morgan compares the variances of paired samples, F takes them for independent.",
        "Beyond noise: |difference| exceeds the RMS difference of runs that differ by rounding.",
    )
    return Table("S1", "Every variant against the baseline", columns, tuple(rows), notes)


def _beyond(difference: float, floor: NoiseFloor | None) -> str:
    if floor is None:
        return DASH
    return "yes" if abs(difference) > floor.rms else "no"


def _noise(grid: Grid) -> Table:
    columns = ("Backbone", "Loss", "Null pairs", "RMS", "Largest")
    rows: list[tuple[str, ...]] = []
    for backbone in VARIANT_LABELS:
        for name, measure in LOSS_MEASURES.items():
            floor = measure_noise(grid, backbone, measure)
            if floor is not None:
                rows.append(_noise_row(backbone, name, floor.n, floor.rms, floor.maximum))
        curve = noise_curve(grid, backbone)
        if curve is not None:
            count = len(grid.pairs(backbone, NULL))
            for step, rms, largest in zip(curve.steps, curve.rms, curve.maximum, strict=True):
                rows.append(_noise_row(backbone, f"estimate at {step}", count, rms, largest))
    notes = (
        "A null pair is two runs of the baseline with equal seed, one with a relative noise of "
        "1e-7 on its initial weights: what parts them is rounding alone, and no smaller effect of "
        "a condition can be told from it in one pair.",
    )
    return Table("S2", "Noise floor", columns, tuple(rows), notes)


def _noise_row(backbone: str, name: str, count: int, rms: float, largest: float) -> tuple[str, ...]:
    return (BACKBONE_LABELS[backbone], name, str(count), number(rms, 5), number(largest, 5))
