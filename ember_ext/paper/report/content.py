"""The content of a report's pages, from which both templates are filled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from ember_ext.paper.claims import Verdict
from ember_ext.paper.figures.style import MADE_FOR
from ember_ext.paper.labels import BACKBONE_LABELS, VARIANT_LABELS, variant_label
from ember_ext.paper.report.facts import facts
from ember_ext.paper.report.findings import Findings, ReportContext, Size, unplanned
from ember_ext.paper.report.sizes import size_tables, stacked_tables
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import ResultError
from ember_ext.paper.tables.claim_tables import tested_text
from ember_ext.paper.tables.table import gate_label


@dataclass(frozen=True)
class _GridRow:
    """The runs of one variant: the state of each seed's, in the order of the columns."""

    backbone: str
    variant: str
    gate: str
    finished: int
    states: tuple[str, ...]


def page_content(
    findings: Findings, context: ReportContext, sizes: Sequence[Size] = ()
) -> dict[str, Any]:
    """The values that both templates need.

    Args:
        findings: those of the report's own suite.
        context: that suite.
        sizes: all sizes that the report sets side by side, its own among them; none if it does not.
    """
    finished = findings.finished
    counts = Counter(claim.verdict for claim in findings.claims)
    family = sum(claim.corrected for claim in findings.claims)
    done = {run.name for run in finished.results}
    others = unplanned(finished, context)
    names = [*context.planned, *others]
    seeds = sorted({_parts(name)[2] for name in names})
    return {
        "suite": context.suite,
        "command": context.command,
        "planned": len(context.planned),
        "finished": len(done) - len(others),
        "others": len(others),
        "failed": sorted(context.failed.items()),
        "figures_made_for": MADE_FOR,
        "claims": findings.claims,
        "tested": {claim.key: tested_text(claim, family) for claim in findings.claims},
        "supported": counts["supported"],
        "verdicts": [(verdict, counts[verdict]) for verdict in get_args(Verdict)],
        "facts": facts(finished, context),
        "seeds": seeds,
        "grid": _grid_rows(finished, names, seeds, done, context.failed),
        # The paper has tables of its own numbers, and lacks those that start with S.
        "tables": [table for table in findings.tables if not table.number.startswith("S")],
        "statistics": [table for table in findings.tables if table.number.startswith("S")],
        "sizes": size_tables(sizes) if sizes else [],
        "stacked": stacked_tables(sizes) if sizes else [],
    }


def _parts(name: str) -> tuple[str, str, int]:
    """Backbone, variant and seed of a run's name.

    Raises:
        ResultError: it is not one.
    """
    match = re.fullmatch(rf"({'|'.join(BACKBONE_LABELS)})-(.+)-seed(-?\d+)", name)
    if match is None:
        raise ResultError(f"{name!r} is not the name of a run: <backbone>-<variant>-seed<number>")
    return match[1], match[2], int(match[3])


def _grid_rows(
    finished: FinishedRuns,
    names: Sequence[str],
    seeds: Sequence[int],
    done: set[str],
    failed: Mapping[str, str],
) -> list[_GridRow]:
    def state(name: str) -> str:
        if name in done:
            return "done"
        if name in failed:
            return "failed"
        return "missing" if name in names else "not planned"

    def place(pair: tuple[str, str]) -> tuple[int, int, str]:
        backbone, variant = pair
        known = list(VARIANT_LABELS[backbone])
        rank = known.index(variant) if variant in known else len(known)
        return list(BACKBONE_LABELS).index(backbone), rank, variant

    rows = []
    for backbone, variant in sorted({_parts(name)[:2] for name in names}, key=place):
        states = tuple(state(f"{backbone}-{variant}-seed{seed}") for seed in seeds)
        rows.append(
            _GridRow(
                BACKBONE_LABELS[backbone],
                variant_label(backbone, variant),
                gate_label(finished, backbone, variant),
                states.count("done"),
                states,
            )
        )
    return rows
