"""Figure 2: loss curves, and where LIF overtakes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ember_ext.paper.figures.style import (
    DOUBLE_COLUMN,
    LOOKS,
    legend_below,
    new_figure,
    noise_band,
    panel_title,
    say_not_run,
    styled,
)
from ember_ext.paper.labels import BACKBONE_LABELS
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.statistics.comparisons import MAIN_LOSS, noise_curve
from ember_ext.paper.statistics.crossover import find_crossovers

PUBLISHED_CROSSOVER = 1600
"""The step at which the paper sees LIF overtake, in every seed; it comes from CfC runs."""

SHOWN_FROM = 0.1
"""Vertical axes fit what comes after this share of the steps: before, the fall from the loss of an
untrained model would hide everything else."""

VARIANTS = {"standard": "-", "lif": (0, (3, 1))}
"""Line styles: the broken line lets one below it be seen."""


@styled
def figure_2_loss_curves(finished: FinishedRuns) -> Figure:
    """Draw the losses of Standard and LIF above, and their paired difference below.

    Thin lines are seeds, thick ones means over seeds. Bands around 0 are the differences between
    Standard runs that are equal up to rounding: RMS over seeds, and largest. A filled triangle
    marks the evaluation from which LIF stays below Standard to the end, a hollow one a first lead
    that was lost again.
    """
    figure = new_figure(DOUBLE_COLUMN, 4.5)
    panels = figure.subplots(2, 2, height_ratios=[1.2, 1])
    for (loss, difference), letters, (backbone, label) in zip(
        panels.T, ("ac", "bd"), BACKBONE_LABELS.items(), strict=True
    ):
        panel_title(loss, letters[0], label)
        _losses(loss, finished, backbone)
        ahead = _differences(difference, finished, backbone)
        panel_title(difference, letters[1], f"LIF minus Standard{ahead}")
    figure.align_ylabels()
    legend_below(figure, panels[1], ncols=3)
    return figure


def _losses(axes: Axes, finished: FinishedRuns, backbone: str) -> None:
    shown = []
    for variant, style in VARIANTS.items():
        runs = finished.runs(backbone, variant)
        if not runs:
            continue
        look = LOOKS[variant]
        steps = np.array(runs[0].curve(MAIN_LOSS)[0])
        losses = np.array([run.curve(MAIN_LOSS)[1] for run in runs])
        line: dict[str, Any] = {"color": look.color, "linestyle": style}
        axes.plot(steps, losses.T, **line, linewidth=0.5, alpha=0.45)
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axes.plot(steps, losses.mean(0), **line, label=f"{look.label}, {seeds}")
        shown.append(losses[:, steps >= SHOWN_FROM * steps[-1]])
    if not shown:
        say_not_run(axes, BACKBONE_LABELS[backbone])
        return
    _limit(axes, np.concatenate(shown, axis=None))
    axes.set(xlim=(0, steps[-1]), ylabel="validation loss (nats)")
    axes.legend(loc="upper right", handlelength=2.6)


def _differences(axes: Axes, finished: FinishedRuns, backbone: str) -> str:
    """Draw one panel; returns how many seeds end with LIF ahead, for its title."""
    pairs = finished.pairs(backbone, "lif")
    if not pairs:
        say_not_run(axes, "LIF beside Standard")
        return ""
    color = LOOKS["lif"].color
    steps = np.array(pairs[0].base.curve(MAIN_LOSS)[0])
    losses = np.array([[run.curve(MAIN_LOSS)[1] for run in pair] for pair in pairs])
    differences = losses[:, 1] - losses[:, 0]
    shown = [differences[:, steps >= SHOWN_FROM * steps[-1]].ravel()]
    noise = noise_curve(finished, backbone)
    if noise is not None:
        noise_band(axes, steps, noise.rms, noise.maximum)
        band = np.array(noise.maximum)
        late = band[steps >= SHOWN_FROM * steps[-1]]
        shown += [late, -late]
    axes.axhline(0, color="0.4", linewidth=0.7, zorder=1)
    axes.plot(steps, differences.T, color=color, linewidth=0.6, alpha=0.5)
    axes.plot(steps, differences.mean(0), color=color)
    if backbone == "cfc" and steps[-1] >= PUBLISHED_CROSSOVER:
        axes.axvline(PUBLISHED_CROSSOVER, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)),
                     label=f"published crossover, step {PUBLISHED_CROSSOVER}")  # fmt: skip
    lasting, lost = _crossovers(axes, finished, backbone, steps, differences)
    _limit(axes, np.concatenate([*shown, lasting, lost], axis=None))
    axes.set(xlim=(0, steps[-1]), xlabel="step", ylabel="difference (nats)")
    return f"; ends ahead: {len(lasting)} of {len(pairs)}"


def _crossovers(
    axes: Axes, finished: FinishedRuns, backbone: str, steps: np.ndarray, differences: np.ndarray
) -> tuple[list[float], list[float]]:
    """Mark the crossovers of each seed on its own curve.

    Returns:
        The differences at those that last to the end, and at those that do not.
    """
    found = find_crossovers(finished.pairs(backbone, "lif")).crossovers
    at = {int(step): i for i, step in enumerate(steps)}
    lasting, lost = [], []
    for curve, crossover in zip(differences, found, strict=True):
        if crossover.persistent is not None:
            lasting.append((crossover.persistent, curve[at[crossover.persistent]]))
        if crossover.first is not None and crossover.first != crossover.persistent:
            lost.append((crossover.first, curve[at[crossover.first]]))
    for points, face, label in (
        (lasting, LOOKS["lif"].color, "ahead from here on"),
        (lost, "white", "first lead, lost again"),
    ):
        if points:
            axes.plot(
                *zip(*points, strict=True),
                "v",
                color=LOOKS["lif"].color,
                markerfacecolor=face,
                markeredgewidth=0.8,
                clip_on=False,  # one may stand on the last step
                label=label,
                zorder=3,
            )
    return [y for _, y in lasting], [y for _, y in lost]


def _limit(axes: Axes, values: np.ndarray) -> None:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    axes.set_ylim(low - room, high + room)
