"""What a study's results say together: table.csv and pictures in its folder.

They are made anew from the results alone, and the same results give the same bytes.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from ember_ext.paper.figures.style import rendered
from ember_ext.paper.files import write_atomically
from ember_ext.paper.formatting import DASH, p_value
from ember_ext.paper.sequences.confusion import plot_confusion
from ember_ext.paper.sequences.figures import vowels_figure, xor_figure
from ember_ext.paper.sequences.labels import CELL_LABELS, sampling_label, short_machine
from ember_ext.paper.sequences.published import XOR_ACCURACY
from ember_ext.paper.sequences.results import SequenceResult, paired, select
from ember_ext.paper.sequences.statistics import spread
from ember_ext.paper.sequences.study import CONDITIONS, SEEDS, Condition, StudyFolder
from ember_ext.paper.sequences.tasks import TaskName
from ember_ext.paper.statistics.correction import holm
from ember_ext.paper.statistics.paired import compare_paired

Row = dict[str, str]


def write_summary(task: TaskName, results: Sequence[SequenceResult], folder: StudyFolder) -> None:
    """Write table.csv and accuracy.png of a result or more, and what else there is to write.

    That is the vowels' confusion.png, and comparisons.csv if conditions share seeds.
    """
    write_atomically(folder.path / "table.csv", as_csv(table(task, results)))
    compared = comparisons(task, results)
    if compared:
        write_atomically(folder.path / "comparisons.csv", as_csv(compared))
    figure = vowels_figure(results) if task == "vowels" else xor_figure(results)
    write_atomically(folder.path / "accuracy.png", rendered(figure, "png"))
    first = select(results, "cfc", False, 0.0)[:1]
    if task == "vowels" and first:
        outcome = first[0].outcome
        picture = plot_confusion(outcome["confusion"], outcome["classes"], "vowels, cfc")
        write_atomically(folder.path / "confusion.png", picture)


def as_csv(rows: Sequence[Row]) -> bytes:
    """A file of one row or more."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def table(task: TaskName, results: Sequence[SequenceResult]) -> list[Row]:
    """A row for each condition of a study that has a result."""
    rows = []
    for condition in CONDITIONS[task]:
        chosen = select(results, condition.cell, condition.gate, condition.drop)
        if not chosen:
            continue
        row = _common(chosen, SEEDS[task])
        if task == "vowels":
            row |= _gate_effect(results, condition)
        else:
            known = XOR_ACCURACY.get(condition.cell)
            row["published"] = f"{known.mean:.2f} ± {known.sd:.2f}" if known else DASH
        row |= _cost(chosen)
        if task == "xor":
            # A curriculum's epochs differ in cost from run to run; `timing` has times to compare.
            del row["epoch"]
        rows.append(row)
    return rows


def comparisons(task: TaskName, results: Sequence[SequenceResult]) -> list[Row]:
    """Paired comparisons of the cells without gates: with the CfC, and of dropped with all steps.

    p is corrected by Holm's method for all comparisons of the table that have one.
    """
    ungated = [condition for condition in CONDITIONS[task] if not condition.gate]
    pairs = [(Condition("cfc", drop=c.drop), c) for c in ungated if c.cell != "cfc"]
    pairs += [(Condition(c.cell), c) for c in ungated if c.drop]
    rows: list[Row] = []
    p_values: list[float | None] = []
    for base, other in pairs:
        sides = [select(results, c.cell, c.gate, c.drop) for c in (base, other)]
        first, second = paired(*sides)
        if not first:
            continue
        found = compare_paired(first, second)
        cells = f"{CELL_LABELS[other.cell]} − {CELL_LABELS[base.cell]}"
        interval = DASH
        if found.t_interval is not None:
            interval = "{:+.2f} to {:+.2f}".format(*found.t_interval)
        rows.append({
            "comparison": CELL_LABELS[other.cell] if base.cell == other.cell else cells,
            "sampling": f"{sampling_label(other.drop)} − {sampling_label(base.drop)}"
            if base.drop != other.drop else sampling_label(other.drop),
            "seeds": str(found.n),
            "difference": f"{found.difference:+.2f}",
            "interval": interval,
            "device": _machines([*sides[0], *sides[1]]),
        })  # fmt: skip
        p_values.append(found.t_p)
    tested = iter(holm([p for p in p_values if p is not None]))
    for row, p in zip(rows, p_values, strict=True):
        row["p"] = p_value(p)
        row["holm"] = p_value(None if p is None else next(tested))
    return rows


def _common(results: Sequence[SequenceResult], planned: int) -> Row:
    first = results[0]
    found = spread([result.accuracy for result in results])
    sd = DASH if found.sd is None else f"{found.sd:.2f}"
    low, high = found.interval or (None, None)
    interval = DASH if low is None or high is None else f"{low:.2f} to {min(high, 100.0):.2f}"
    return {
        "cell": CELL_LABELS[first.cell],
        "gate": "LIF" if first.gate else "none",
        "sampling": sampling_label(first.drop),
        "seeds": str(found.n) if found.n >= planned else f"{found.n} of {planned}",
        "accuracy": f"{found.mean:.2f}",
        "sd": sd,
        "interval": interval,
    }


def _gate_effect(results: Sequence[SequenceResult], condition: Condition) -> Row:
    """What the gate changes, over the seeds that were run with and without it."""
    effect, p = DASH, DASH
    if condition.gate:
        base = select(results, condition.cell, False, condition.drop)
        other = select(results, condition.cell, True, condition.drop)
        without, with_gate = paired(base, other)
        if without:
            comparison = compare_paired(without, with_gate)
            effect = f"{comparison.difference:+.2f}"
            if comparison.t_interval is not None:
                low, high = comparison.t_interval
                effect += f" [{low:+.2f}, {high:+.2f}]"
            p = p_value(comparison.t_p)
    return {"effect": effect, "p": p}


def _cost(results: Sequence[SequenceResult]) -> Row:
    first = results[0]
    # That of the fastest run: other work on the machine can only add to a time.
    seconds = min(float(r.outcome["seconds_per_epoch"]) for r in results)
    updates = statistics.median(int(r.outcome["updates"]) for r in results)
    return {
        "updates": f"{updates:,.0f}",
        "parameters": f"{first.outcome['parameters']:,}",
        "epoch": f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms",
        "device": _machines(results),
    }


def _machines(results: Sequence[SequenceResult]) -> str:
    return " / ".join(sorted({short_machine(str(r.outcome["machine"])) for r in results}))
