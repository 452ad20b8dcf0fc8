"""The paper's tables with this project's numbers beside the published ones.

The main loss is the paper's: the smallest estimate of the validation loss over all evaluations of a
run. Rows are of one variant each, so that the gate of the paper's text ("text") and that of its
released code ("released") stand apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.tables.loss_tables import (
    crossover_table,
    noise_table,
    parameter_table,
    performance_table,
    statistics_table,
)
from ember_ext.paper.tables.structure_tables import (
    depth_table,
    gate_table,
    head_table,
    neuron_table,
    threshold_table,
)
from ember_ext.paper.tables.table import Table

__all__ = ["Table", "tables"]


def tables(results: Sequence[RunResult]) -> list[Table]:
    """All tables, also where nothing was run.

    Args:
        results: of any runs, in any order.

    Raises:
        ResultError: see `FinishedRuns`.
    """
    finished = FinishedRuns(results)
    return [
        performance_table(finished, "transformer", "3.1"),
        performance_table(finished, "cfc", "3.2"),
        head_table(finished),
        neuron_table(finished),
        depth_table(finished),
        crossover_table(finished),
        parameter_table(finished),
        threshold_table(finished),
        statistics_table(finished),
        noise_table(finished),
        gate_table(finished),
    ]
