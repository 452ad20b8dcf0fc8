"""Verdicts on the paper's claims: each follows from a criterion, by what some runs show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ember_ext.paper.claims.catalogue import SPECS, Spec
from ember_ext.paper.claims.judging import NotTestableError
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult

Verdict = Literal["supported", "not supported", "not testable at this scale"]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what the runs say of it.

    Attributes:
        key: a short name.
        statement: the claim, as the paper has it.
        source: where the paper makes it.
        verdict: by the criterion.
        evidence: the numbers behind the verdict, or why there is none.
        criterion: what has to hold for "supported", and for a verdict at all.
    """

    key: str
    statement: str
    source: str
    verdict: Verdict
    evidence: str
    criterion: str


def claims(results: Sequence[RunResult]) -> list[Claim]:
    """Judge every claim of the paper by some runs.

    Args:
        results: of any runs, in any order; what they cannot answer is not testable.

    Raises:
        ResultError: see `FinishedRuns`.
    """
    finished = FinishedRuns(results)
    return [_judge(spec, finished) for spec in SPECS]


def _judge(spec: Spec, finished: FinishedRuns) -> Claim:
    verdict: Verdict
    try:
        finding = spec.rule(finished)
    except NotTestableError as reason:
        verdict, evidence = "not testable at this scale", str(reason)
    else:
        verdict = "supported" if finding.holds else "not supported"
        evidence = finding.evidence
    return Claim(spec.key, spec.statement, spec.source, verdict, evidence, spec.criterion)
