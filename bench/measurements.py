"""Reads what the scripts of this folder measured: the one reader of `bench/results`.

The documentation's tables, the README's picture and the tests that hold both to the files use it.
It needs nothing but Python.

A condition on rows is written `column=value`, `column~part` where the value contains a text, or
`column!~part` where it does not. Several are joined by semicolons, and all must hold.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, str]


def read(file: str, folder: Path = RESULTS) -> list[Row]:
    """All rows of a file of `bench/results`, such as "cfc.csv" or "h200/kernels.csv"."""
    with (folder / file).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def select(rows: Iterable[Row], where: str) -> list[Row]:
    """The rows for which all conditions hold.

    Raises:
        ValueError: a condition has another form.
        KeyError: there is no such column.
    """
    chosen = list(rows)
    for condition in filter(None, (part.strip() for part in where.split(";"))):
        parts = re.fullmatch(r"([^=~!]+)(=|~|!~)(.*)", condition)
        if parts is None:
            raise ValueError(f"condition {condition!r} is none of column=, column~ and column!~")
        column, sign, text = parts.groups()
        if sign == "=":
            chosen = [row for row in chosen if row[column] == text]
        else:
            chosen = [row for row in chosen if (text in row[column]) == (sign == "~")]
    return chosen


def find(file: str, where: str) -> Row:
    """The one row of a file for which all conditions hold.

    Raises:
        LookupError: there are none or several.
    """
    rows = select(read(file), where)
    if len(rows) != 1:
        raise LookupError(f"{file} has {len(rows)} rows with {where!r}, expected 1")
    return rows[0]


def machine(row: Row) -> str:
    """What a row was measured on.

    Raises:
        KeyError: the file does not say.
    """
    parts = [row["device"]]
    if row.get("threads"):
        parts.append(f"{row['threads']} threads" if row["threads"] != "1" else "1 thread")
    return ", ".join(parts)


def significant(value: float, digits: int = 3) -> str:
    """A number to so many digits, without an exponent: 0.943, 29.8, 7324 as 7320."""
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = 0
    while rounded != round(rounded, decimals) and decimals < 12:
        decimals += 1
    whole = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 0
    if whole:
        decimals = max(decimals, digits - whole)
    return f"{rounded:.{max(decimals, 0)}f}"


def duration(milliseconds: float) -> str:
    """A time with its unit, to three digits: "943 µs", "29.8 ms", "7.32 s"."""
    if milliseconds < 0.9995:
        return f"{significant(1e3 * milliseconds)} µs"
    if milliseconds < 999.5:
        return f"{significant(milliseconds)} ms"
    return f"{significant(1e-3 * milliseconds)} s"


def factor(ratio: float) -> str:
    """How many times as fast, to two digits below 10 and in whole numbers above: "8.9x", "94x"."""
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def share(ratio: float) -> str:
    """A share in per cent: "91 %"."""
    return f"{100 * ratio:.0f} %"
