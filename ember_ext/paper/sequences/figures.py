"""Pictures of a study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ember_ext.paper.figures.style import (
    BLACK,
    BLUE,
    DOUBLE_COLUMN,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    new_figure,
    panel_title,
    styled,
)
from ember_ext.paper.sequences.labels import CELL_LABELS, sampling_label
from ember_ext.paper.sequences.published import XOR_ACCURACY
from ember_ext.paper.sequences.results import SequenceResult
from ember_ext.paper.sequences.statistics import Spread, spread

_OFFSET = 0.17
"""Between the points with and without a gate, of the distance between two cells."""

_CURVES = ((BLACK, "o"), (VERMILLION, "s"), (BLUE, "^"), (GREEN, "D"), (ORANGE, "v"))
"""Colour and marker of each cell's curves."""


@styled
def vowels_figure(results: Sequence[SequenceResult]) -> Figure:
    """Draw the accuracy of every seed on the vowels, with means and 95 % intervals."""
    drops = sorted({result.drop for result in results})
    figure = new_figure(DOUBLE_COLUMN, 2.5)
    panels = figure.subplots(1, len(drops), sharey=True, squeeze=False)[0]
    for axes, drop, letter in zip(panels, drops, "abcdefgh", strict=False):
        panel_title(axes, letter, sampling_label(drop))
        chosen = [result for result in results if result.drop == drop]
        cells = [cell for cell in CELL_LABELS if any(r.cell == cell for r in chosen)]
        for place, cell in enumerate(cells):
            for gate, offset, color in ((False, -_OFFSET, BLACK), (True, _OFFSET, VERMILLION)):
                values = [r.accuracy for r in chosen if (r.cell, r.gate) == (cell, gate)]
                _points(axes, place + offset, values, color)
        axes.set_xticks(range(len(cells)), [CELL_LABELS[cell] for cell in cells])
        axes.set_xlim(-0.5, len(cells) - 0.5)
    panels[0].set_ylabel("test accuracy (%)")
    panels[-1].legend(
        [_mark(BLACK), _mark(VERMILLION)], ["without gate", "LIF gate"], loc="lower right"
    )
    return figure


@styled
def xor_figure(results: Sequence[SequenceResult]) -> Figure:
    """Draw the accuracy of every seed on XOR, beside the published means, and the curricula."""
    cells = [cell for cell in CELL_LABELS if any(r.cell == cell for r in results)]
    figure = new_figure(DOUBLE_COLUMN, 2.6)
    left, right = figure.subplots(1, 2)
    panel_title(left, "a", "accuracy on the test streams")
    for place, cell in enumerate(cells):
        _points(left, place - 0.1, [r.accuracy for r in results if r.cell == cell], BLACK)
        known = XOR_ACCURACY.get(cell)
        if known is not None:
            left.plot(place + 0.2, known.mean, "D", color=VERMILLION, markersize=4)
    left.axhline(50, color=GREY, linewidth=0.7, linestyle=(0, (3, 3)), zorder=0)
    names = [CELL_LABELS[cell].replace(", ", ",\n") for cell in cells]
    left.set_xticks(range(len(cells)), names)
    left.set(xlim=(-0.5, len(cells) - 0.5), ylim=(33, 103), ylabel="test accuracy (%)")
    published = Line2D([], [], color=VERMILLION, marker="D", linestyle="", markersize=4)
    left.legend([_mark(BLACK), published], ["ours", "published"], loc="lower left", ncols=2)
    panel_title(right, "b", "longest streams that training has come to")
    for cell, (color, marker) in zip(cells, _CURVES, strict=False):
        for result in (r for r in results if r.cell == cell):
            limits = [entry[2] for entry in result.outcome["curve"]]
            epochs = range(1, len(limits) + 1)
            right.plot(epochs, limits, color=color, linewidth=0.8, marker=marker, markersize=3)
    # Room for the legend above, which no curve then crosses.
    longest = max(int(r.outcome["curve"][-1][2]) for r in results)
    right.set(xlabel="epoch", ylabel="steps of a stream", ylim=(0, 1.6 * longest))
    right.set_yticks(range(0, longest + 1, 5))
    looks = [Line2D([], [], color=c, marker=m, markersize=3, linewidth=0.8) for c, m in _CURVES]
    labels = [CELL_LABELS[cell] for cell in cells]
    right.legend(looks[: len(cells)], labels, loc="upper left", ncols=2)
    return figure


def _points(axes: Axes, place: float, values: Sequence[float], color: str) -> None:
    """Every seed as a faint point, and beside them the mean with its interval."""
    if not values:
        return
    found: Spread = spread(values)
    axes.plot([place - 0.06] * len(values), values, "o", color=color, alpha=0.35, markersize=2.8,
              markeredgewidth=0)  # fmt: skip
    if found.interval is not None:
        axes.plot([place + 0.06] * 2, np.clip(found.interval, 0, 100), color=color, linewidth=1)
    axes.plot(place + 0.06, found.mean, "s", color=color, markersize=3.6)


def _mark(color: str) -> Line2D:
    return Line2D([], [], color=color, marker="s", markersize=3.6, linewidth=1)
