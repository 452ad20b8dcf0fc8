"""The form of all tables, and the cells that every row begins with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ember_ext.paper import published
from ember_ext.paper.formatting import DASH
from ember_ext.paper.labels import VARIANT_LABELS, variant_label
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.statistics.paired import Sample, describe

ROW_HEAD = ("Condition", "Gate", "Seeds")
"""The columns of `row_head`."""

# The gate that a row is about before anything was run.
_PLANNED_GATES = {
    "lif-fixed": "released",
    "lif": "released",
    "lif-text": "text",
    "lif-refractory": "released",
    "lif-temporal": "released",
    "lif-persistent": "released",
    "sigmoid": "released",
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


def gate_label(finished: FinishedRuns, backbone: str, variant: str) -> str:
    """The gate preset of a variant; a dash if it has no gate."""
    runs = finished.runs(backbone, variant)
    if not runs:
        return _PLANNED_GATES.get(variant, DASH)
    return str(runs[0].config["gate_preset"]) if runs[0].evaluations[-1]["gates"] else DASH


def row_head(
    finished: FinishedRuns, backbone: str, variant: str, seeds: int | None = None
) -> tuple[str, str, str]:
    """Condition, gate preset and number of seeds, by default that of all the variant's runs."""
    count = len(finished.runs(backbone, variant)) if seeds is None else seeds
    return (
        variant_label(backbone, variant),
        gate_label(finished, backbone, variant),
        str(count) if count else DASH,
    )


def variants_in_order(
    finished: FinishedRuns, backbone: str, without: Sequence[str] = ()
) -> list[str]:
    """The variants of a table in order: the known ones, then others that were run."""
    known = list(VARIANT_LABELS[backbone])
    others = [v for v in finished.variants(backbone) if v not in known]
    return [variant for variant in known + others if variant not in without]


def not_run(head: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The row of what was not run: its head, and dashes in all other columns."""
    return (*head, *[DASH] * (len(columns) - len(head)))


def other_sizes_note(finished: FinishedRuns, backbones: Iterable[str]) -> list[str]:
    """A note if runs of some backbones are not of the sizes that the published numbers are of."""
    configs = [config for config in map(finished.config, backbones) if config is not None]
    if all(published.scale_of(config) == "paper" for config in configs):
        return []
    return ["The published numbers are of the paper's sizes. Our runs have other sizes."]


SEEDS_NOTE = "Rows may have different seeds: each condition has those of its runs."


def sample_of(values: Iterable[float]) -> Sample | None:
    """Mean and spread of some values; None of none."""
    present = list(values)
    return describe(present) if present else None
