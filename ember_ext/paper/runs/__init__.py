"""The runs behind the paper: planned, carried out in processes, and their results."""

from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import (
    ResultError,
    RunResult,
    read_result,
    read_results,
    write_result,
)
from ember_ext.paper.runs.suites import RunSpec, plan

__all__ = [
    "FinishedRuns",
    "ResultError",
    "RunResult",
    "RunSpec",
    "plan",
    "read_result",
    "read_results",
    "write_result",
]
