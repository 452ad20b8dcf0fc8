"""Tables and numbers that the build takes from `bench/results`, so that no page has them typed.

Directives:

    ```{bench-times} cfc.csv
    :where: mode=forward
    :contenders: ncps* = ncps; ember_ext avx2 = ember-ext
    :faster: ember_ext avx2
    :share: ember_ext avx2 = share of a matrix product's rate
    ```

has a line for each configuration and a column for each contender: the median time, and below it the
range of the middle 60 % of the calls. `faster` adds how many times as fast a contender was as the
baseline of its own run, which should be the first contender. `share` adds its share of the limit
that was timed in the same turns, and `rate` its rate. Names of contenders are patterns as of files.

    ```{bench-table} ltc_memory.csv
    :columns: network; chunk_size = time steps in a chunk; peak MB
    ```

has columns of the file as they are. With `sum` it adds up a column of milliseconds over the lines
that agree in the other columns. Every line names its machine, in small type; `machine` does so for
files that do not.

The role {bench}`cfc.csv; config=...; contender=...` is one time, {bench}`speedup of cfc.csv; ...`
how many times as fast that is, and any other column is taken as it is. The role
{bench-ratio}`ms of h200/kernels.csv; pass=... / pass=...` is the sum of a column over some rows,
divided by that over others. `measurements` says what conditions look like.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import measurements  # noqa: E402
from measurements import Row  # noqa: E402

Cell = tuple[str, ...]
"""What stands in a cell: a line, and one in small type if there are two."""


def make_table(headings: list[str], lines: list[list[Cell]], numbers: int) -> nodes.table:
    """A table whose columns from `numbers` on are aligned to the right."""
    group = nodes.tgroup(cols=len(headings))
    group += [nodes.colspec(colwidth=1) for _ in headings]

    def row(cells: list[Cell]) -> nodes.row:
        result = nodes.row()
        for index, cell in enumerate(cells):
            entry = nodes.entry(classes=["bench-number"] if index >= numbers else [])
            for level, text in enumerate(cell):
                classes = ["bench-spread"] if level else []
                entry += nodes.paragraph("", text, classes=classes)
            result += entry
        return result

    group += nodes.thead("", row([(heading,) for heading in headings]))
    group += nodes.tbody("", *(row(line) for line in lines))
    return nodes.table("", group, classes=["bench"])


def named(option: str) -> list[tuple[str, str]]:
    """`pattern = heading; pattern` as pairs; a heading that is not given is the pattern."""
    pairs = []
    for part in filter(None, (part.strip() for part in option.split(";"))):
        name, _, heading = (piece.strip() for piece in part.partition(" = "))
        pairs.append((name, heading or name))
    return pairs


def machine(row: Row, fallback: str | None) -> str:
    """What a row was measured on, which must be known."""
    return measurements.machine(row) if row.get("device") else str(fallback)


class _BenchDirective(SphinxDirective):
    required_arguments = 1

    def rows(self) -> list[Row]:
        file = self.arguments[0]
        self.env.note_dependency(str(measurements.RESULTS / file))
        try:
            rows = measurements.select(measurements.read(file), self.options.get("where", ""))
        except (KeyError, OSError, ValueError) as error:
            raise self.error(f"{file}: {error!r}") from error
        if not rows:
            raise self.error(f"{file} has no rows with {self.options.get('where')!r}")
        if "device" not in rows[0] and "machine" not in self.options:
            raise self.error(f"{file} does not name its machine, and :machine: is not given")
        return rows


class BenchTimes(_BenchDirective):
    """Times of several contenders, a line for each configuration."""

    option_spec = dict.fromkeys(
        ("where", "contenders", "faster", "share", "rate"), directives.unchanged_required
    )

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = self.rows()
        contenders, faster, share, rate = (
            named(self.options.get(name, "")) for name in ("contenders", "faster", "share", "rate")
        )
        columns: list[tuple[str, str, Callable[[Row], Cell]]] = []
        for name, heading in contenders:
            columns.append((name, heading, _time))
            columns += [
                (name, "speed-up" if words == name else words, _faster)
                for pattern, words in faster
                if pattern == name
            ]
        columns += [(name, heading, _share) for name, heading in share]
        columns += [(name, heading, _rate) for name, heading in rate]
        lines = []
        for same in _grouped(rows):
            found = [(_pick(same, name), write) for name, _, write in columns]
            if contenders[1:] and found[0][0] is None:
                # Speed-ups would be those over another contender than in the other lines.
                found = [(None if write is _faster else row, write) for row, write in found]
            if any(row for row, _ in found):
                first = same[0]
                small = f"{first['mode'].replace('+', ' + ')}; {machine(first, None)}"
                cells = [write(row) if row else ("–",) for row, write in found]
                lines.append([(first["config"], small), *cells])
        for pattern, _ in contenders:
            if not any(fnmatch.fnmatchcase(row["contender"], pattern) for row in rows):
                raise self.error(f"{self.arguments[0]} has no contender {pattern!r}")
        return [make_table(["", *(heading for _, heading, _ in columns)], lines, 1)]


def _grouped(rows: list[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[column] for column in ("config", "mode", "device", "threads"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _pick(rows: list[Row], pattern: str) -> Row | None:
    found = [row for row in rows if fnmatch.fnmatchcase(row["contender"], pattern)]
    if len(found) > 1:
        raise ValueError(f"{pattern!r} is the name of several: {[r['contender'] for r in found]}")
    return found[0] if found else None


def _time(row: Row) -> Cell:
    median, low, high = (float(row[f"{which}_ms"]) for which in ("median", "low", "high"))
    return measurements.duration(median), f"{_bare(low, median)}–{_bare(high, median)}"


def _bare(milliseconds: float, like: float) -> str:
    """A time in the unit in which `like` is written."""
    unit = measurements.duration(like).split()[1]
    scale = {"µs": 1e3, "ms": 1.0, "s": 1e-3}[unit]
    return measurements.significant(scale * milliseconds)


def _faster(row: Row) -> Cell:
    return (measurements.factor(float(row["speedup"])),)


def _share(row: Row) -> Cell:
    return (measurements.share(float(row["limit_share"])),)


def _rate(row: Row) -> Cell:
    return (f"{measurements.significant(float(row['rate']))} {row['rate_unit']}",)


class BenchTable(_BenchDirective):
    """Columns of a file."""

    option_spec = dict.fromkeys(
        ("where", "columns", "sum", "machine"), directives.unchanged_required
    )

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = self.rows()
        columns = named(self.options["columns"])
        headings = [heading for _, heading in columns]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row[name] for name, _ in columns), []).append(row)
        summed = named(self.options.get("sum", ""))
        lines: list[list[Cell]] = []
        for values, same in groups.items():
            first, *others = values
            cells: list[Cell] = [(value or "–",) for value in others]
            for name, _ in summed:
                cells.append((measurements.duration(sum(float(row[name]) for row in same)),))
            lines.append([(first, machine(same[0], self.options.get("machine"))), *cells])
        headings += [heading for _, heading in summed]
        return [make_table(headings, lines, self._labels(rows, columns))]

    def _labels(self, rows: list[Row], columns: list[tuple[str, str]]) -> int:
        """How many columns at the left are not numbers."""
        for index, (name, _) in enumerate(columns):
            if all(row[name].strip(" %").replace(".", "", 1).isdigit() for row in rows):
                return index
        return len(columns)


class BenchNumber(SphinxRole):
    """One number."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The number as text."""
        head, _, where = self.text.partition(";")
        column, found, file = head.strip().rpartition(" of ")
        self.env.note_dependency(str(measurements.RESULTS / file))
        try:
            row = measurements.find(file, where)
            text = self._write(row, column if found else "median_ms")
        except (LookupError, OSError, ValueError) as error:
            problem = self.inliner.reporter.error(f"bench: {error}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, problem)], [problem]
        return [nodes.Text(text)], []

    @staticmethod
    def _write(row: Row, column: str) -> str:
        if column.endswith("_ms"):
            return measurements.duration(float(row[column]))
        if column == "speedup":
            return measurements.factor(float(row[column]))
        if column == "limit_share":
            return measurements.share(float(row[column]))
        return row[column]


class BenchRatio(SphinxRole):
    """The sum of a column over some rows, divided by that over others."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The ratio as text."""
        head, _, where = self.text.partition(";")
        column, _, file = head.strip().rpartition(" of ")
        self.env.note_dependency(str(measurements.RESULTS / file))
        try:
            above, below = (self._sum(file, column, side) for side in where.split(" / "))
            return [nodes.Text(f"{above / below:.1f}")], []
        except (ArithmeticError, LookupError, OSError, ValueError) as error:
            problem = self.inliner.reporter.error(f"bench-ratio: {error!r}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, problem)], [problem]

    @staticmethod
    def _sum(file: str, column: str, where: str) -> float:
        return sum(
            float(row[column]) for row in measurements.select(measurements.read(file), where)
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Register directives and the role."""
    app.add_directive("bench-times", BenchTimes)
    app.add_directive("bench-table", BenchTable)
    app.add_role("bench", BenchNumber())
    app.add_role("bench-ratio", BenchRatio())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
