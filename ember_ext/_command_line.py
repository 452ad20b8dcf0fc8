"""What all command lines share: output that no terminal refuses, and checks of flags.

Values are checked before any work is done; an error names flag, expected and got.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

SEEDS = range(-(2**63), 2**64)
"""The seeds that torch's generators take."""


class FlagError(Exception):
    """A flag whose value makes no sense."""


class Expectation(NamedTuple):
    """What a flag's value must be."""

    words: str
    holds: Callable[[float], bool]


def at_least(least: int) -> Expectation:
    """A finite number from `least` on."""
    return Expectation(
        f"finite and at least {least}", lambda value: least <= value and math.isfinite(value)
    )


ABOVE_ZERO = Expectation("finite and above 0", lambda value: value > 0 and math.isfinite(value))


def within(least: int, most: int) -> Expectation:
    """A number from `least` to `most`."""
    return Expectation(f"from {least} to {most}", lambda value: least <= value <= most)


def one_of(*choices: int) -> Expectation:
    """One of some numbers."""
    return Expectation(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


A_SEED = Expectation("from -2**63 to 2**64 - 1", lambda value: value in SEEDS)


def prepare_output() -> None:
    """Have standard output and error escape what their encoding cannot write.

    Otherwise hours of work may end in an error for a letter that a terminal does not know.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def refuse_empty(arguments: Sequence[str]) -> None:
    """Make sure that no argument is empty: as a path, "" would be the current folder.

    Raises:
        FlagError: one is.
    """
    flag = "an argument"
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            empty = bool(equals) and not value.strip()
        else:
            empty = not argument.strip(" \t")
        if empty:
            raise FlagError(f"{flag} must not be empty, got ''")


def require(flag: str, value: float | Sequence[float] | None, expected: Expectation) -> None:
    """Make sure that a flag's value, or each of several, is what is expected; None always is.

    Raises:
        FlagError: it is not.
    """
    if value is None:
        return
    for one in value if isinstance(value, Sequence) else [value]:
        if not expected.holds(one):
            raise FlagError(f"{flag} must be {expected.words}, got {one}")


def require_distinct(flag: str, values: Sequence[object]) -> None:
    """Make sure that no value of a flag comes twice.

    Raises:
        FlagError: one does.
    """
    for place, value in enumerate(values):
        if value in values[:place]:
            raise FlagError(f"{flag} must be without repeats, got {value} more than once")
