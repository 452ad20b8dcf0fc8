"""Crossovers of loss curves, by the published rule and by one that asks the curve to stay below.

An evaluation before the first step does not count: nothing has been learnt yet, and the losses of a
pair differ by little more than rounding. By the published rule, a curve that is below by step 200
always was, and has no crossover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ember_ext.paper.runs.finished import Pair
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.comparisons import MAIN_LOSS
from ember_ext.paper.statistics.paired import Sample, describe

ALWAYS_UP_TO = 200
"""The step up to which a first lead means, by the published rule, that there was always one."""


@dataclass(frozen=True)
class Crossover:
    """The steps at which the other run of a pair passes below its base.

    Attributes:
        seed: of the pair.
        first: step of the first evaluation at which it is below; None if it is at none. Chance
            alone gives one early: two equal curves part to either side.
        persistent: step of the first evaluation from which it is below to the end; None if it is
            not below at the last.
    """

    seed: int
    first: int | None
    persistent: int | None

    @property
    def always(self) -> bool:
        """Whether the published rule says "always" instead of a step."""
        return self.first is not None and self.first <= ALWAYS_UP_TO


@dataclass(frozen=True)
class CrossoverSummary:
    """Crossovers over seeds.

    Attributes:
        crossovers: one a seed.
        first, persistent: the steps of those that have one, of the first leads without those that
            were always there; None if none has.
    """

    crossovers: tuple[Crossover, ...]
    first: Sample | None
    persistent: Sample | None


def find_crossover(base: RunResult, other: RunResult, key: str = MAIN_LOSS) -> Crossover:
    """Compare two runs of one seed, evaluated at the same steps, by one loss."""
    losses = zip(*base.curve(key), other.curve(key)[1], strict=True)
    below = [(step, theirs < ours) for step, ours, theirs in losses if step > 0]
    first = next((step for step, is_below in below if is_below), None)
    persistent = None
    for step, is_below in reversed(below):
        if not is_below:
            break
        persistent = step
    return Crossover(base.seed, first, persistent)


def find_crossovers(pairs: Sequence[Pair], key: str = MAIN_LOSS) -> CrossoverSummary:
    """Compare all pairs of two variants."""
    crossovers = tuple(find_crossover(pair.base, pair.other, key) for pair in pairs)
    first = [c.first for c in crossovers if c.first is not None and not c.always]
    persistent = [c.persistent for c in crossovers if c.persistent is not None]
    return CrossoverSummary(
        crossovers,
        describe(first) if first else None,
        describe(persistent) if persistent else None,
    )
