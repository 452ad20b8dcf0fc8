"""The material of a report: its context, and all that is computed from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ember_ext.paper.claims import Claim, claims
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.tables import Table, tables
from ember_ext.paper.tables.claim_tables import claim_tables
from ember_ext.paper.tables.table import variants_in_order


@dataclass(frozen=True)
class ReportContext:
    """The facts of a reproduction that its results do not contain.

    Attributes:
        suite: name of the suite.
        planned: names of all runs that were asked for, as `RunResult.name`.
        failed: names of runs that failed, and why.
        command: the command line that gives this report.
    """

    suite: str
    planned: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class Findings:
    """The results, and what follows from them: computed once for all files."""

    finished: FinishedRuns
    claims: list[Claim]
    tables: list[Table]

    @classmethod
    def of(cls, results: Sequence[RunResult]) -> Findings:
        """The findings of some runs.

        Raises:
            ResultError: see `FinishedRuns`.
        """
        judged = claims(results)
        return cls(FinishedRuns(results), judged, [*tables(results), *claim_tables(judged)])


@dataclass(frozen=True)
class Size:
    """The paper at one size: a suite, its runs, and what follows from them."""

    context: ReportContext
    findings: Findings


def ordered(finished: FinishedRuns) -> list[RunResult]:
    """All runs in the order of the tables."""
    return [
        run
        for backbone in finished.backbones
        for variant in variants_in_order(finished, backbone)
        for run in finished.runs(backbone, variant)
    ]


def unplanned(finished: FinishedRuns, context: ReportContext) -> list[str]:
    """Names of the finished runs that are not planned ones."""
    return sorted({run.name for run in finished.results} - set(context.planned))
