"""The format of numbers in tables and in the evidence of claims."""

from __future__ import annotations

from ember_ext.paper.runs.results import SIGNIFICANT_DIGITS
from ember_ext.paper.statistics.paired import Interval, NoiseFloor, PairedComparison, Sample

DASH = "–"
"""Stands for a number of nothing that was run, or one that is not defined."""


def number(value: float | None, digits: int = 4) -> str:
    """A plain number; in scientific notation where the digits would show nothing but zeros."""
    if value is None:
        return DASH
    fixed = f"{value:.{digits}f}"
    return f"{value:.0e}" if value and not float(fixed) else fixed


def signed(value: float | None, digits: int = 4) -> str:
    """A difference, always with its sign."""
    return DASH if value is None else f"{value:+.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A difference that is given in percent."""
    return DASH if value is None else f"{value:+.{digits}f}%"


def share(value: float | None) -> str:
    """A part of the whole, in whole percent; never 100 % or 0 % unless it is."""
    if value is None:
        return DASH
    if 0.995 <= value < 1 - 1e-9:
        return ">99%"
    return "<1%" if 1e-9 < value < 0.005 else f"{value:.0%}"


def p_value(value: float | None) -> str:
    """A p value, with the digits that mean something."""
    if value is None:
        return DASH
    return "<.001" if value < 0.001 else f"{value:.3f}".replace("0.", ".", 1)


def interval(value: Interval | None, digits: int = 4) -> str:
    """A confidence interval of a difference."""
    return DASH if value is None else f"[{value[0]:+.{digits}f}, {value[1]:+.{digits}f}]"


def mean_sd(sample: Sample | None, digits: int = 4) -> str:
    """Mean and standard deviation (ddof 1)."""
    if sample is None:
        return DASH
    spread = "" if sample.sd is None else f" ± {sample.sd:.{digits}f}"
    return f"{sample.mean:.{digits}f}{spread}"


def comparison_text(comparison: PairedComparison, other: str, base: str, digits: int = 4) -> str:
    """A comparison in one sentence, as evidence; `digits` are those of the means."""
    c = comparison
    change = "" if c.percent is None else f" ({percent(c.percent)})"
    text = (
        f"{other} {mean_sd(c.other, digits)}, {base} {mean_sd(c.base, digits)}: "
        f"{signed(c.difference, digits + 1)}{change}, lower in {c.wins} of {c.n}"
    )
    if c.t_p is None:
        return text
    return f"{text}, paired t p = {p_value(c.t_p)}, 95% interval {interval(c.t_interval, digits)}"


def noise_text(floor: NoiseFloor | None, digits: int = 4) -> str:
    """A noise floor in one clause, as evidence."""
    if floor is None:
        return "no null pairs"
    pairs = f"{floor.n} null {'pair' if floor.n == 1 else 'pairs'}"
    if floor.maximum == 0:
        return f"noise floor 0 to the {SIGNIFICANT_DIGITS} digits kept ({pairs})"
    return (
        f"noise floor {number(floor.rms, digits + 1)} (RMS of {pairs}; largest "
        f"{number(floor.maximum, digits + 1)})"
    )
