"""The paper's tables with this project's numbers beside the published ones.

The main loss is the paper's: the smallest estimate of the validation loss over all evaluations of a
run. Rows are of one variant each, so that the gate of the paper's text ("text") and that of its
released code ("released") stand apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from ember_ext.paper.runs.finished import Grid
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
        ResultError: see `Grid`.
    """
    grid = Grid(results)
    return [
        performance_table(grid, "transformer", "3.1"),
        performance_table(grid, "cfc", "3.2"),
        head_table(grid),
        neuron_table(grid),
        depth_table(grid),
        crossover_table(grid),
        parameter_table(grid),
        threshold_table(grid),
        statistics_table(grid),
        noise_table(grid),
        gate_table(grid),
    ]
