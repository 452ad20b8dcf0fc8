"""Pictures of a study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ember_ext.paper.figures.style import (
    BLACK,
    DOUBLE_COLUMN,
    GREY,
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
    figure = new_figure(DOUBLE_COLUMN, 2.5)
    left, right = figure.subplots(1, 2)
    panel_title(left, "a", "accuracy on new streams")
    for place, cell in enumerate(cells):
        _points(left, place - 0.1, [r.accuracy for r in results if r.cell == cell], BLACK)
        known = XOR_ACCURACY.get(cell)
        if known is not None:
            left.plot(place + 0.2, known.mean, "D", color=VERMILLION, markersize=4)
    left.axhline(50, color=GREY, linewidth=0.7, linestyle=(0, (3, 3)), zorder=0)
    left.set_xticks(range(len(cells)), [CELL_LABELS[cell] for cell in cells])
    left.set_xlim(-0.5, len(cells) - 0.5)
    left.set_ylabel("test accuracy (%)")
    left.legend([_mark(BLACK), Line2D([], [], color=VERMILLION, marker="D", linestyle="")],
                ["ours, five seeds or fewer", "published"], loc="lower left")  # fmt: skip
    panel_title(right, "b", "steps that training had come to")
    for number, cell in enumerate(cells):
        color = f"C{number}"
        for result in (r for r in results if r.cell == cell):
            curve = np.array(result.outcome["curve"])
            epochs = np.arange(1, len(curve) + 1)
            right.plot(epochs, curve[:, 2], color=color, linewidth=0.9, marker="o", markersize=2.5)
    right.set(xlabel="epoch", ylabel="most steps of a stream", ylim=(0, None))
    right.legend([Line2D([], [], color=f"C{i}") for i in range(len(cells))],
                 [CELL_LABELS[cell] for cell in cells], loc="best")  # fmt: skip
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
