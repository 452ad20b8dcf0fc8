"""Draws the times of a CSV file; `python bench/plots.py` draws all of `bench/results` again.

Times are dots on a logarithmic axis. Bars would have to start at zero, which such an axis has not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import measurements
from measurements import Row

LINE_INCHES = 0.15
TITLE_INCHES = 0.25
AXIS_INCHES = 0.55
LEGEND_INCHES = 0.85


def plot_csv(path: Path, image: Path) -> None:
    """Draw the times of a CSV file as dots with their spread, one panel for each mode.

    Only those of the device that comes last: times of two devices do not compare. The picture is
    made to be read at 8 inches of width, that of a README's column.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    rows = measurements.read(path.name, path.parent)
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    contenders = [name for name in names if not is_ours(name)] + [*filter(is_ours, names)]
    shown = list(dict.fromkeys(map(kind, contenders)))
    colours = colours_of(shown)
    panels = [_Panel.of([row for row in rows if row["mode"] == mode], contenders) for mode in modes]
    # The first mode on the left, all others below one another on the right.
    columns = [column for column in (panels[:1], panels[1:]) if column]
    height = LEGEND_INCHES + max(sum(panel.inches for panel in column) for column in columns)
    figure = plt.figure(figsize=(8, height), dpi=200)
    for place, column in enumerate(columns):
        top = height - LEGEND_INCHES
        for panel in column:
            left, width = 0.2 + 4 * place, 8 / len(columns) - 0.4
            bottom = top - TITLE_INCHES - panel.lines * LINE_INCHES
            axis = figure.add_axes(
                (left / 8, bottom / height, width / 8, panel.lines * LINE_INCHES / height)
            )
            panel.draw(axis, colours)
            top -= panel.inches
    first = rows[0]
    title = f"{first['op']} on {measurements.machine(first)}"
    if any(is_ours(row["contender"]) and row["speedup"] != "1.0" for row in rows):
        title += "; 2x is twice as fast as the topmost"
    figure.legend(
        [
            Line2D([], [], color=colours[name], marker=marker_of(name), linestyle="")
            for name in shown
        ],
        shown,
        title=title,
        ncols=min(4, len(shown)),
        loc="upper center",
        fontsize=8,
        title_fontsize=9,
    )
    figure.savefig(image)
    plt.close(figure)


def is_ours(contender: str) -> bool:
    """Whether a contender is this package."""
    return contender.startswith("ember_ext")


def kind(contender: str) -> str:
    """A contender's name without what it did of the work: "ncps" for "ncps, by 7 of the steps"."""
    return contender.partition(", by ")[0]


def colours_of(contenders: Sequence[str]) -> dict[str, str]:
    """A colour for each contender; blues are ours.

    Those of Okabe and Ito can be told apart with any colour vision.
    """
    others = ("#999999", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#000000")
    ours = [name for name in contenders if is_ours(name)]
    rest = [name for name in contenders if not is_ours(name)]
    return dict(zip(rest, cycle(others), strict=False)) | dict(
        zip(ours, cycle(("#0072B2", "#56B4E9")), strict=False)
    )


def marker_of(contender: str) -> str:
    """Ours are discs, yardsticks vertical strokes, all others squares."""
    return "o" if is_ours(contender) else "|" if contender.endswith("alone") else "s"


@dataclass(frozen=True)
class _Panel:
    """The dots of one mode: those of a configuration below its name.

    Attributes:
        mode: its name.
        names: configurations, each with the place of its name.
        dots: rows of the CSV file, each with its place.
        lines: how many lines of text all takes.
    """

    mode: str
    names: list[tuple[str, float]]
    dots: list[tuple[Row, float]]
    lines: float

    @classmethod
    def of(cls, rows: Sequence[Row], contenders: Sequence[str]) -> _Panel:
        names: list[tuple[str, float]] = []
        dots: list[tuple[Row, float]] = []
        place = 0.0
        for config in dict.fromkeys(row["config"] for row in rows):
            names.append((config, place))
            group = [row for row in rows if row["config"] == config]
            # The baseline of the speed-ups first.
            for row in sorted(
                group, key=lambda row: (row["speedup"] != "1.0", contenders.index(row["contender"]))
            ):
                place += 1
                dots.append((row, place))
            place += 1.5
        return cls(rows[0]["mode"], names, dots, place)

    @property
    def inches(self) -> float:
        """Its height, title and axis included."""
        return TITLE_INCHES + self.lines * LINE_INCHES + AXIS_INCHES

    def draw(self, axis: Any, colours: Mapping[str, str]) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        for row, place in self.dots:
            median, low, high = (float(row[key]) for key in ("median_ms", "low_ms", "high_ms"))
            colour = colours[kind(row["contender"])]
            axis.plot([low, high], [place, place], color=colour, linewidth=1)
            axis.plot(median, place, marker_of(row["contender"]), color=colour, markersize=4.5)
            words = f" {measurements.duration(median)}"
            if is_ours(row["contender"]) and row["speedup"] != "1.0":
                words += f", {measurements.factor(float(row['speedup']))}"
            axis.annotate(words, (max(median, high), place), va="center", fontsize=6.5,
                          xytext=(2, 0), textcoords="offset points")  # fmt: skip
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        # Room for the words at the right.
        axis.set_xlim(low, high * (high / low) ** 0.25)
        low, high = axis.get_xlim()
        # Labels of more decades would run into each other.
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axis.xaxis.set_major_formatter(lambda x, _: _round_time(x))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_ylim(self.lines - 0.7, -0.7)
        axis.set_yticks([])
        for name, place in self.names:
            axis.annotate(
                name, (0, place), xycoords=("axes fraction", "data"), va="center", fontsize=7.5,
                xytext=(3, 0), textcoords="offset points",
            )  # fmt: skip
        axis.set_title(self.mode.replace("+", " + "), fontsize=9)
        axis.set_xlabel("median time, and the middle 60 %", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)


def _round_time(milliseconds: float) -> str:
    """A tick of an axis: "200 µs", "1 ms", "50 s"."""
    number, unit = measurements.duration(milliseconds).split()
    return f"{float(number):g} {unit}"


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    for file in files or sorted(measurements.RESULTS.glob("*.csv")):
        if files or file.with_suffix(".png").exists():
            plot_csv(file, file.with_suffix(".png"))
