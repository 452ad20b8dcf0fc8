"""Reads the .ts files of the time series classification archives (UEA, UCR and others).

A file has comments (#), a header of lines such as `@classLabel true cat dog`, the line `@data`, and
then a line for each series. Channels are separated by colons, values by commas, and the class comes
last:

    1.5,2.5,?:0.1,0.2,0.3:cat

With `@timeStamps true` each value comes with its time:

    (0,1.5),(0.4,2.5):(0,0.1),(0.4,0.2):dog
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

_PAIR = re.compile(r"\(([^,()]+),([^,()]+)\)\s*(?:,|$)")
_YES_OR_NO = {"true": True, "false": False}


class TsError(Exception):
    """A file that cannot be read as .ts; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class TsFile:
    """The content of a file.

    Attributes:
        name: of the problem, the file's stem if the header does not have it.
        values: a tensor [T_i, C] for each series, NaN where a value is missing.
        times: a tensor [T_i] of time stamps for each series; None for a file without.
        labels: the class of each series, as it is written.
        classes: all classes, in the order of the header.
    """

    name: str
    values: list[Tensor]
    times: list[Tensor] | None
    labels: list[str]
    classes: tuple[str, ...]


def read_ts(path: Path) -> TsFile:
    """Read a .ts file of labelled series.

    Args:
        path: the file, in UTF-8.

    Raises:
        TsError: it cannot be read, has no classes, or breaks the rules of the format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TsError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TsError(f"{path} is not UTF-8 text: {error.reason}") from None
    return _Reader(path, text).read()


class _Reader:
    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()
        self._number = 0
        self._name = path.stem
        self._stamped = False
        self._classes: tuple[str, ...] = ()
        self._dimensions: int | None = None

    def read(self) -> TsFile:
        """Read the whole file."""
        start = self._header()
        values, times, labels = [], [], []
        for number, line in enumerate(self._lines[start:], start + 1):
            self._number = number
            if not line.strip() or line.startswith("#"):
                continue
            *channels, label = (part.strip() for part in line.split(":"))
            if label not in self._classes:
                self._fail(f"the class must be one of {', '.join(self._classes)}", repr(label))
            if not channels or len(channels) != (self._dimensions or len(channels)):
                expected = f"{self._dimensions or 'one or more'} channels before the class"
                self._fail(expected, len(channels))
            # All series have as many channels as the first, whatever the header leaves out.
            self._dimensions = len(channels)
            read = self._stamped_series(channels) if self._stamped else self._series(channels)
            values.append(read[0])
            times.append(read[1])
            labels.append(label)
        if not values:
            self._fail("one series or more after @data", "none")
        stamps = times if self._stamped else None
        return TsFile(self._name, values, stamps, labels, self._classes)

    def _header(self) -> int:
        """Read the header; return the number of its lines."""
        for number, line in enumerate(self._lines, 1):
            self._number = number
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            tag = words[0].lower()
            if tag == "@data":
                if not self._classes:
                    self._fail("a header line '@classLabel true' with the classes", "none")
                return self._number
            if not tag.startswith("@"):
                self._fail("a header line or @data", repr(line[:40]))
            self._tag(tag, words[1:])
        self._fail("a line @data", "the end of the file")

    def _tag(self, tag: str, words: list[str]) -> None:
        first = words[0].lower() if words else ""
        if tag == "@problemname" and words:
            self._name = " ".join(words)
        elif tag == "@timestamps":
            self._stamped = self._flag(tag, first)
        elif tag == "@classlabel" and self._flag(tag, first):
            self._classes = tuple(words[1:])
        elif tag in ("@dimensions", "@dimension"):
            if not first.isdecimal() or int(first) < 1:
                self._fail(f"{tag} and a number from 1 on", repr(first))
            self._dimensions = int(first)

    def _flag(self, tag: str, word: str) -> bool:
        if word not in _YES_OR_NO:
            self._fail(f"{tag} true or {tag} false", repr(word))
        return _YES_OR_NO[word]

    def _series(self, channels: list[str]) -> tuple[Tensor, Tensor]:
        columns = [[self._value(word) for word in text.split(",")] for text in channels]
        return self._columns(columns), torch.empty(0)

    def _stamped_series(self, channels: list[str]) -> tuple[Tensor, Tensor]:
        columns, stamps = [], []
        for text in channels:
            pairs = [match.groups() for match in _PAIR.finditer(text)]
            if not pairs or _PAIR.sub("", text).strip():
                self._fail("pairs (time,value) separated by commas", repr(text[:40]))
            stamps.append([self._value(time) for time, _ in pairs])
            columns.append([self._value(value) for _, value in pairs])
        if any(times != stamps[0] for times in stamps):
            self._fail("equal time stamps in all channels of a series", "others")
        times = torch.tensor(stamps[0], dtype=torch.float64)
        if not (times.isfinite().all() and (times.diff() > 0).all()):
            self._fail("time stamps that rise", stamps[0][:5])
        return self._columns(columns), times

    def _columns(self, columns: list[list[float]]) -> Tensor:
        counts = sorted({len(column) for column in columns})
        if len(counts) > 1:
            self._fail("equally many values in all channels of a series", counts)
        return torch.tensor(columns, dtype=torch.float32).T.contiguous()

    def _value(self, word: str) -> float:
        word = word.strip()
        if word in ("?", "NaN", "nan"):
            return math.nan
        try:
            value = float(word)
        except ValueError:
            self._fail("a number, or ? where one is missing", repr(word))
        if math.isinf(value):
            self._fail("a finite number", word)
        return value

    def _fail(self, expected: str, got: object) -> NoReturn:
        raise TsError(f"{self._path}, line {self._number}: expected {expected}, got {got}")
