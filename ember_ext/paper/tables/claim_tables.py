"""Tables about the claims as a whole: their number, and the power of their tests."""

from __future__ import annotations

from collections.abc import Sequence

from ember_ext.paper.claims import Claim
from ember_ext.paper.claims.judging import SIGNIFICANCE, SeedTest
from ember_ext.paper.formatting import DASH, number, p_value, percent, share, signed
from ember_ext.paper.tables.table import Table


def claim_tables(claims: Sequence[Claim]) -> list[Table]:
    """Tables S4 and S5, of claims that were judged together."""
    return [correction_table(claims), power_table(claims)]


def correction_table(claims: Sequence[Claim]) -> Table:
    """Table S4: the p of every claim with a verdict, corrected for the number of them."""
    judged = [claim for claim in claims if claim.judged]
    family = sum(claim.corrected for claim in judged)
    rows = [
        (
            claim.key,
            claim.verdict,
            str(len(claim.tests) or DASH),
            p_value(claim.p),
            p_value(claim.holm_p),
            DASH if claim.holm_p is None else "yes" if claim.holm_p < SIGNIFICANCE else "no",
        )
        for claim in judged
    ]
    notes = [
        f"These runs judge {family} claims. Of {family} claims that are all false, some "
        "would still have p < .05 by chance. Holm's method corrects for that. A claim that is "
        "decided without a test counts in the number of claims, and has no p.",
        "The p of a claim with several tests is the largest of theirs, because all parts have to "
        "hold. The tests are two-sided: a small p is no support if the sign is the wrong one. "
        "The verdicts go by the p without the correction, as the criteria say.",
    ]
    notes += [_uncorrected(claim) for claim in judged if not claim.in_family]
    columns = ("Claim", "Verdict", "Tests", "p", "p (Holm)", "Below .05 after Holm")
    return Table("S4", "Claims, corrected for their number", columns, tuple(rows), tuple(notes))


def _uncorrected(claim: Claim) -> str:
    text = (
        f"{claim.key} is judged besides these and is not corrected: a large p supports it, so a "
        "correction would make its support easier."
    )
    ratios = " and ".join(map(_ratio, claim.tests))
    return f"{text} Its test would have found {ratios} with a power of 80%." if ratios else text


def _ratio(test: SeedTest) -> str:
    assert test.detectable_ratio is not None
    return f"an RMS {test.detectable_ratio:.2f} times that of the null pairs ({test.n} seeds)"


def power_table(claims: Sequence[Claim]) -> Table:
    """Table S5: the smallest effect that each t-test behind a verdict would have found."""
    tests = dict.fromkeys(
        test for claim in claims for test in claim.tests if test.detectable is not None
    )
    notes = [
        "Detectable is the smallest true difference that the t-test would have found (two-sided "
        "p < .05) with a power of 80%, given the number of seeds and the observed sd of the "
        "differences. The sd of few differences is itself uncertain: with 3 seeds the true one may "
        "be half of it or six times as large.",
        "The published effect is the one that the paper reports for its own sizes. Power for it "
        "is the power for an effect of as many percent.",
    ]
    columns = [
        "Test",
        "Seeds",
        "Difference",
        "sd of differences",
        "p",
        "Detectable",
        "Detectable, %",
        "Published effect",
        "Power for it",
    ]
    small_scale = any(test.authors_xs is not None for test in tests)
    if small_scale:
        columns += ["Authors' xs effect", "Power for that"]
        notes.append(
            "The authors' xs effect is that of their own runs of the sizes of these runs (xs). "
            "Power for that is the power for an effect of as many percent."
        )
    rows = tuple(_power_row(test, small_scale=small_scale) for test in tests)
    return Table("S5", "Power of the tests", tuple(columns), rows, tuple(notes))


def _power_row(test: SeedTest, *, small_scale: bool) -> tuple[str, ...]:
    found = test.detectable
    relative = None if found is None or not test.base else 100 * found / abs(test.base)
    row = (
        test.what,
        str(test.n),
        signed(test.difference, test.digits),
        number(test.sd, test.digits),
        p_value(test.p),
        number(found, test.digits),
        DASH if relative is None else f"{relative:.2f}%",
        percent(test.published),
        share(test.published_power),
    )
    if not small_scale:
        return row
    return (*row, percent(test.authors_xs), share(test.authors_xs_power))


def tested_text(claim: Claim, family: int) -> str:
    """The claim's p, corrected, and the power of its tests; empty if it rests on no test."""
    if not claim.tests:
        return ""
    if not claim.in_family:
        ratios = " and ".join(map(_ratio, claim.tests))
        return (
            f"p = {p_value(claim.p)}, not corrected, because a large p supports the claim. These "
            f"seeds would have found {ratios} with a power of 80%."
        )
    text = ""
    if claim.p is not None:
        text = (
            f"p = {p_value(claim.p)}, corrected for the {family} claims judged here (Holm) "
            f"{p_value(claim.holm_p)}. "
        )
    found = [_detectable(test) for test in claim.tests if test.detectable is not None]
    if not found:
        return text.strip()
    what = "a true difference of" if len(found) == 1 else "true differences of"
    return f"{text}These seeds would have found {what} {', '.join(found)} with a power of 80%."


def _detectable(test: SeedTest) -> str:
    found = test.detectable
    assert found is not None
    relative = f"{100 * found / abs(test.base):.2f}%, " if test.base else ""
    return f"{number(found, test.digits)} ({relative}{test.n} seeds)"
