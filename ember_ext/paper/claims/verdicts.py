"""Verdicts on the paper's claims: each follows from a criterion, by what some runs show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ember_ext.paper.claims.catalogue import SPECS, Spec
from ember_ext.paper.claims.judging import NotRunError, NotTestableError, SeedTest
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.correction import holm

Verdict = Literal["supported", "not supported", "not testable at this scale"]

UNTESTABLE: Verdict = "not testable at this scale"


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
        tests: those that a verdict rests on; none where there is no verdict, or no test.
        p: the largest of theirs, because a claim of several parts holds only if all of them do.
            None without a test.
        holm_p: the same, corrected for the number of claims that these runs judge.
        was_run: whether any run is of a backbone that the claim is about.
        in_family: whether it counts among the claims that are corrected together; see `Spec`.
    """

    key: str
    statement: str
    source: str
    verdict: Verdict
    evidence: str
    criterion: str
    tests: tuple[SeedTest, ...] = ()
    p: float | None = None
    holm_p: float | None = None
    was_run: bool = True
    in_family: bool = True

    @property
    def judged(self) -> bool:
        """Whether there is a verdict."""
        return self.verdict != UNTESTABLE

    @property
    def corrected(self) -> bool:
        """Whether there is a verdict whose p is corrected for the number of claims."""
        return self.judged and self.in_family


def claims(results: Sequence[RunResult]) -> list[Claim]:
    """Judge every claim of the paper by some runs.

    Args:
        results: of any runs, in any order; what they cannot answer is not testable.

    Raises:
        ResultError: see `FinishedRuns`.
    """
    finished = FinishedRuns(results)
    found = [_judge(spec, finished) for spec in SPECS]
    corrected = iter(holm([claim.p for claim in found if claim.corrected]))
    return [
        dataclasses.replace(claim, holm_p=next(corrected)) if claim.corrected else claim
        for claim in found
    ]


def _judge(spec: Spec, finished: FinishedRuns) -> Claim:
    said = (spec.key, spec.statement, spec.source)
    try:
        finding = spec.rule(finished)
    except NotTestableError as reason:
        was_run = not isinstance(reason, NotRunError)
        return Claim(
            *said,
            UNTESTABLE,
            str(reason),
            spec.criterion,
            was_run=was_run,
            in_family=spec.in_family,
        )
    verdict: Verdict = "supported" if finding.holds else "not supported"
    p = max((test.p for test in finding.tests if test.p is not None), default=None)
    return Claim(
        *said,
        verdict,
        finding.evidence,
        spec.criterion,
        finding.tests,
        p,
        in_family=spec.in_family,
    )
