"""Tables of losses: their values, crossovers, extra parameters, tests and noise floor."""

from __future__ import annotations

from ember_ext.paper import published
from ember_ext.paper.data.sources import TINY_SHA256
from ember_ext.paper.formatting import (
    DASH,
    interval,
    mean_sd,
    number,
    p_value,
    percent,
    signed,
)
from ember_ext.paper.labels import BACKBONE_LABELS, variant_label
from ember_ext.paper.runs.finished import BASELINE, LIF, NULL, FinishedRuns
from ember_ext.paper.statistics.comparisons import (
    LOSS_MEASURES,
    best_full_loss,
    best_loss,
    compare,
    extra_parameters,
    final_full_loss,
    measure_noise,
    noise_curve,
)
from ember_ext.paper.statistics.crossover import ALWAYS_UP_TO, find_crossovers
from ember_ext.paper.statistics.paired import MIN_PAIRS, NoiseFloor, PairedComparison
from ember_ext.paper.tables.table import (
    ROW_HEAD,
    Table,
    other_sizes_note,
    row_head,
    sample_of,
    variants_in_order,
)


def performance_table(finished: FinishedRuns, backbone: str, section: str) -> Table:
    """Tables 3.1 and 3.2: the validation loss of every condition of a backbone."""
    config = finished.config(backbone)
    small_scale = config is not None and published.scale_of(config) == "xs"
    base = variant_label(backbone, BASELINE)
    columns = [
        *ROW_HEAD,
        "Val loss",
        "sd",
        "sd (ddof 0)",
        f"vs {base}",
        "Published",
        "Published sd (ddof 0)",
        f"Published vs {base}",
    ]
    if small_scale:
        columns += ["Authors' xs", f"Authors' xs vs {base}", "Ours vs authors' xs"]
    columns += ["Best, whole text", "Final, whole text"]
    rows, notes = [], []
    for variant in variants_in_order(finished, backbone, without=[NULL]):
        runs = finished.runs(backbone, variant)
        head = row_head(finished, backbone, variant)
        sample = sample_of(map(best_loss, runs))
        comparison = compare(finished, backbone, variant)
        if comparison and comparison.n < max(len(runs), len(finished.runs(backbone, BASELINE))):
            notes.append(
                f"{head[0]} ({head[1]}) and {base} are compared over the seeds of both "
                f"(n = {comparison.n}): {mean_sd(comparison.other)} and {mean_sd(comparison.base)}."
            )
        row = [
            *head,
            number(sample.mean if sample else None),
            number(sample.sd if sample else None),
            number(sample.sd_population if sample else None),
            _change(variant, comparison.percent if comparison else None, was_run=bool(runs)),
            *_published_cells(backbone, variant),
        ]
        if small_scale:
            ours = sample.mean if sample and _is_tiny(finished, backbone) else None
            row += _small_scale_cells(backbone, variant, ours)
        for measure in (best_full_loss, final_full_loss):
            row.append(mean_sd(sample_of(map(measure, runs))))
        rows.append(tuple(row))
    notes.append(
        "Val loss is the smallest estimate over the evaluations of a run, averaged over seeds. An "
        "estimate is measured on random batches, as in the paper. Here all evaluations and all "
        "conditions of a seed have the same batches, where the paper drew new ones. The column sd "
        "has ddof 1, the next one the paper's ddof 0. The last two columns are measured on the "
        "whole validation text, which has no sampling error."
    )
    if config and finished.runs(backbone, "lif-refractory"):
        notes.append(_refractory_note(str(config.get("refractory_mode"))))
    notes += [*_scale_notes(finished, backbone), *published.LOSS_NOTES[backbone]]
    if small_scale:
        notes.append(
            f"{published.XS_NOTE[backbone]} Ours vs authors' xs compares the mean over our seeds "
            "with the mean over theirs."
        )
    title = f"Validation loss, {BACKBONE_LABELS[backbone]}"
    return Table(section, title, tuple(columns), tuple(rows), tuple(notes))


def _change(variant: str, change: float | None, *, was_run: bool) -> str:
    if variant == BASELINE:
        return "baseline" if was_run else DASH
    return percent(change)


def _published_cells(backbone: str, variant: str) -> list[str]:
    row = published.LOSSES[backbone].get(variant)
    if row is None:
        return [DASH] * 3
    return [number(row.mean), number(row.sd), _change(variant, row.percent, was_run=True)]


def _small_scale_cells(backbone: str, variant: str, ours: float | None) -> list[str]:
    """The authors' xs runs; `ours` is a mean loss that compares with theirs, if there is one."""
    row = published.XS_LOSSES[backbone].get(variant)
    if row is None:
        return [DASH] * 3
    spread = "" if row.sd is None else f" ± {row.sd:.4f}"
    loss = f"{row.mean:.4f}{spread} (n = {row.n})"
    difference = None if ours is None else 100 * (ours - row.mean) / row.mean
    return [loss, _change(variant, row.percent, was_run=True), percent(difference)]


def _refractory_note(mode: str) -> str:
    if mode == "look_ahead":
        return f"Our refractory thresholds look ahead, as the published ones do (mode {mode!r})."
    return (
        f"Our refractory thresholds look at the past only (mode {mode!r}). The published ones look "
        "ahead."
    )


def _is_tiny(finished: FinishedRuns, backbone: str) -> bool:
    """Whether a backbone's runs are of the published corpus; they are all of one."""
    runs = [run for run in finished.results if run.backbone == backbone]
    return bool(runs) and runs[0].corpus.get("sha256") == TINY_SHA256


def _scale_notes(finished: FinishedRuns, backbone: str) -> list[str]:
    """Notes on whether our losses compare with the published ones."""
    runs = [run for run in finished.results if run.backbone == backbone]
    if not runs:
        return ["Nothing was run."]
    notes = []
    scale = published.scale_of(runs[0].config)
    if scale == "xs" and _is_tiny(finished, backbone):
        notes.append(
            "Our runs have the authors' xs sizes. The paper's table is of a larger model, so "
            "compare our losses with the column of the authors' xs runs."
        )
    elif scale == "stated":
        notes.append(
            "Our runs have the sizes that the paper's text states. The published losses come from "
            "a wider CfC, so they do not compare with ours."
        )
    elif scale == "other":
        notes.append(
            "Our runs have neither the paper's nor the authors' xs sizes and length. Their losses "
            "do not compare with published ones."
        )
    if not _is_tiny(finished, backbone):
        notes.append(
            f"Our corpus is {runs[0].corpus.get('name')!r}, not Tiny Shakespeare. Its losses do "
            "not compare with published ones."
        )
    return notes


def crossover_table(finished: FinishedRuns) -> Table:
    """Table 3.5: when LIF passes below the baseline, and when the null runs do."""
    columns = (
        "Backbone",
        *ROW_HEAD,
        "Rule",
        "With a crossover",
        "Step by seed",
        "Mean",
        "Range",
        "Published",
    )
    rows = []
    for backbone, label in BACKBONE_LABELS.items():
        for variant in ("lif", "lif-text", NULL):
            pairs = finished.pairs(backbone, variant)
            summary = find_crossovers(pairs)
            first = ["always" if c.always else c.first for c in summary.crossovers]
            persistent = [c.persistent for c in summary.crossovers]
            for rule, steps, sample in (
                ("first", first, summary.first),
                ("persistent", persistent, summary.persistent),
            ):
                found = [step for step in steps if isinstance(step, int)]
                listed = ", ".join(
                    f"{pair.base.seed}: {DASH if step is None else step}"
                    for pair, step in zip(pairs, steps, strict=True)
                )
                said = (backbone, variant, rule) == ("cfc", "lif", "first")
                rows.append(
                    (
                        label,
                        *row_head(finished, backbone, variant, seeds=len(pairs)),
                        rule,
                        str(len(found)) if pairs else DASH,
                        listed or DASH,
                        mean_sd(sample, 0),
                        f"{min(found)}-{max(found)}" if found else DASH,
                        str(published.CRITICAL_STEP) if said else DASH,
                    )
                )
    notes = (
        'The rule "first" is the published one: the first evaluation at which the estimate of the '
        "validation loss is below the baseline's. One at step 0 does not count, because nothing is "
        f"learnt yet. One up to step {ALWAYS_UP_TO} means that the loss was always below. The rule "
        '"persistent" is the first evaluation from which the loss stays below to the end. The null '
        "pairs show what either rule finds where there is nothing to find.",
        published.CROSSOVER_NOTE,
        *other_sizes_note(finished, ("cfc",)),
    )
    return Table("3.5", "Crossover with the baseline", columns, tuple(rows), notes)


def parameter_table(finished: FinishedRuns) -> Table:
    """Table 3.6: parameters of each mechanism, and its effect on the loss."""
    columns = (
        "Backbone",
        *ROW_HEAD,
        "Extra parameters",
        "Val loss effect",
        "p",
        "Published extra parameters",
        "Published effect",
    )
    rows = []
    for backbone, label in BACKBONE_LABELS.items():
        for variant in variants_in_order(finished, backbone, without=[BASELINE, NULL, "lif-fixed"]):
            comparison = compare(finished, backbone, variant)
            extra = extra_parameters(finished, backbone, variant)
            printed = published.LOSSES[backbone].get(variant)
            count = published.EXTRA_PARAMETERS[backbone].get(variant)
            rows.append(
                (
                    label,
                    *row_head(finished, backbone, variant, seeds=comparison.n if comparison else 0),
                    DASH if extra is None else f"{extra:,}",
                    percent(comparison.percent if comparison else None),
                    p_value(comparison.t_p if comparison else None),
                    DASH if count is None else f"{count:,}",
                    percent(printed.percent if printed else None),
                )
            )
    notes = (
        "The effect is on the smallest estimate of the validation loss, over common seeds. The p "
        "value is that of the paired t-test, which needs 3 seeds.",
        published.PARAMETERS_NOTE,
    )
    return Table("3.6", "Extra parameters and their effect", columns, tuple(rows), notes)


def statistics_table(finished: FinishedRuns) -> Table:
    """Table S1: every variant against the baseline, with tests, intervals and the noise floor."""
    columns = (
        "Backbone",
        *ROW_HEAD,
        "Loss",
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
    for backbone in finished.backbones:
        for variant in variants_in_order(finished, backbone, without=[BASELINE]):
            for name in ("best, estimate", "final, whole text"):
                c = compare(finished, backbone, variant, LOSS_MEASURES[name])
                if c is None:
                    continue
                floor = measure_noise(finished, backbone, LOSS_MEASURES[name])
                variance = c.variance
                rows.append(
                    (
                        BACKBONE_LABELS[backbone],
                        *row_head(finished, backbone, variant, seeds=c.n),
                        name,
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
                        number(variance.sd_ratio if variance else None, 2),
                        p_value(variance.pitman_morgan_p if variance else None),
                        p_value(variance.f_p if variance else None),
                        number(floor.rms if floor else None, 5),
                        DASH if variant == NULL else _beyond(c, floor),
                    )
                )
    notes = (
        "A difference is condition minus baseline, over common seeds. Tests and intervals need 3 "
        "pairs. The p values are two-sided. They are not corrected for the number of rows: one of "
        "twenty null comparisons is below .05 by chance. Wilcoxon's p cannot fall below 2^(1-n) "
        "for n pairs, so it is never below .05 with fewer than 6.",
        "The interval of the BCa bootstrap is too narrow for few pairs. Prefer the interval of t "
        "below about 10 pairs. The Pitman-Morgan test compares the variances of paired samples. "
        "The F-test takes the samples for independent.",
        "A difference is beyond noise if it exceeds the RMS difference of runs that differ by "
        "rounding. This needs 3 pairs of either kind.",
    )
    return Table("S1", "Every variant against the baseline", columns, tuple(rows), notes)


def _beyond(comparison: PairedComparison, floor: NoiseFloor | None) -> str:
    if floor is None or min(floor.n, comparison.n) < MIN_PAIRS:
        return DASH
    return "yes" if abs(comparison.difference) > floor.rms else "no"


def noise_table(finished: FinishedRuns) -> Table:
    """Table S2: how far apart runs are that differ by rounding."""
    columns = ("Backbone", "Loss", "Null pairs", "RMS", "Largest")
    rows: list[tuple[str, ...]] = []

    def add(backbone: str, name: str, count: int, rms: float, largest: float) -> None:
        label = BACKBONE_LABELS[backbone]
        rows.append((label, name, str(count), number(rms, 5), number(largest, 5)))

    for backbone in finished.backbones:
        for name, measure in LOSS_MEASURES.items():
            floor = measure_noise(finished, backbone, measure)
            if floor is not None:
                add(backbone, name, floor.n, floor.rms, floor.maximum)
        curve = noise_curve(finished, backbone)
        if curve is not None:
            count = len(finished.pairs(backbone, NULL))
            for step, rms, largest in zip(curve.steps, curve.rms, curve.maximum, strict=True):
                add(backbone, f"estimate at {step}", count, rms, largest)
    notes = [
        "A null pair is two baseline runs of one seed. One of them has a relative noise of 1e-7 on "
        "its initial weights, so only rounding sets them apart. A smaller effect of a condition "
        "cannot be told from it in one pair.",
    ]
    for name, measure in LOSS_MEASURES.items():
        floor = measure_noise(finished, "transformer", measure, "sigmoid", LIF)
        if floor is not None:
            add("transformer", f"{name}: Sigmoid and LIF", floor.n, floor.rms, floor.maximum)
    if finished.pairs("transformer", "sigmoid", LIF):
        notes.append(
            "Sigmoid and LIF of one seed are such a pair, too: one function by other operations, "
            "which round differently at every step. Verdicts take their noise floor from the null "
            "pairs alone."
        )
    return Table("S2", "Noise floor", columns, tuple(rows), tuple(notes))
