"""The numbers of a report as plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ember_ext.paper.report.findings import Findings, ReportContext, Size, ordered
from ember_ext.paper.report.sizes import size_tables, sizes_as_data, stacked_tables
from ember_ext.paper.runs.finished import BASELINE, FinishedRuns
from ember_ext.paper.statistics.comparisons import (
    LOSS_MEASURES,
    compare,
    measure_noise,
    noise_curve,
)
from ember_ext.paper.statistics.crossover import find_crossovers
from ember_ext.paper.statistics.depth import PROFILE_MEASURES, depth_profiles
from ember_ext.paper.tables.claim_tables import tested_text


def numbers(
    findings: Findings, context: ReportContext, sizes: Sequence[Size] = ()
) -> dict[str, Any]:
    """Everything that the report says in numbers, as plain data, without times.

    Args:
        findings: those of the report's own suite.
        context: that suite.
        sizes: all sizes that the report sets side by side, its own among them; none if it does not.
    """
    finished = findings.finished
    runs = [
        {
            "name": run.name,
            "corpus": run.corpus,
            "gate_preset": run.config["gate_preset"],
            "steps": run.config["steps"],
            "parameters": run.summary["parameters"],
            "lif_parameters": run.summary["lif_parameters"],
            "loss": {name: measure(run) for name, measure in LOSS_MEASURES.items()},
        }
        for run in ordered(finished)
    ]
    family = sum(claim.corrected for claim in findings.claims)
    content = {
        "suite": context.suite,
        "planned": list(context.planned),
        "runs": runs,
        "claims": [
            {**dataclasses.asdict(claim), "tested": tested_text(claim, family)}
            for claim in findings.claims
        ],
        "tables": [dataclasses.asdict(table) for table in findings.tables],
        "statistics": {
            backbone: _statistics(finished, backbone) for backbone in finished.backbones
        },
    }
    if sizes:
        shown = [*size_tables(sizes), *stacked_tables(sizes)]
        content["sizes"] = sizes_as_data(sizes)
        content["size_tables"] = [dataclasses.asdict(table) for table in shown]
    return content


def _statistics(finished: FinishedRuns, backbone: str) -> dict[str, Any]:
    def data(value: Any) -> Any:
        return None if value is None else dataclasses.asdict(value)

    others = [variant for variant in finished.variants(backbone) if variant != BASELINE]
    return {
        "comparisons": {
            variant: {
                name: data(compare(finished, backbone, variant, measure))
                for name, measure in LOSS_MEASURES.items()
            }
            for variant in others
        },
        "noise_floor": {
            name: data(measure_noise(finished, backbone, measure))
            for name, measure in LOSS_MEASURES.items()
        },
        "noise_curve": data(noise_curve(finished, backbone)),
        "crossovers": {
            variant: data(find_crossovers(finished.pairs(backbone, variant))) for variant in others
        },
        "depth": {
            measure: {
                v: data(profile)
                for v, profile in depth_profiles(finished, backbone, measure).items()
            }
            for measure in PROFILE_MEASURES[backbone]
        },
    }


def to_json(value: Any) -> bytes:
    """Data as the bytes of a file: equal data give equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
