"""The correction of p values for the number of claims that are judged together."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values by Holm's step-down method.

    An adjusted p below .05 stays so however many of the other hypotheses are true: the chance of
    one false finding or more in the whole family is at most .05, whether or not the tests depend on
    each other. See Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.

    Args:
        p_values: one a hypothesis; None for one that is decided without a test. It counts in the
            family as if its p were 1.

    Returns:
        The adjusted values, at most 1, in the same order; None where there was none.

    Raises:
        ValueError: a value is not in [0, 1].
    """
    if any(p is not None and not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"holm: p values must be in [0, 1], got {list(p_values)}")
    adjusted: list[float | None] = [None] * len(p_values)
    tested = [(p, index) for index, p in enumerate(p_values) if p is not None]
    largest = 0.0
    for rank, (p, index) in enumerate(sorted(tested)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[index] = largest
    return adjusted
