"""Figure 6: thresholds over the course of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ember_ext.paper.figures.style import (
    DOUBLE_COLUMN,
    layer_looks,
    new_figure,
    panel_title,
    say_not_run,
    styled,
)
from ember_ext.paper.labels import BACKBONE_LABELS
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.depth import threshold_trajectories

VARIANTS = ("lif", "lif-text")

_MEAN: dict[str, Any] = {
    "linewidth": 1.6,
    "markersize": 4.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.3,
}


@styled
def figure_6_thresholds(finished: FinishedRuns) -> Figure:
    """Draw |θ| at every evaluation: a row for each preset of the gate, a column for each backbone.

    Thick lines are layer means over seeds, marked at evaluations. Thin ones, marked at their ends,
    are every head of every seed (Transformer), or the mean over a layer's neurons for every seed
    (CfC).
    """
    runs = {(v, b): finished.runs(b, v) for v in VARIANTS for b in BACKBONE_LABELS}
    rows = [v for v in VARIANTS if v == "lif" or any(runs[v, b] for b in BACKBONE_LABELS)]
    figure = new_figure(DOUBLE_COLUMN, 0.25 + 2.15 * len(rows))
    panels = figure.subplots(len(rows), 2, squeeze=False)
    letters = iter("abcd")
    for row, variant in zip(panels, rows, strict=True):
        for axes, (backbone, label) in zip(row, BACKBONE_LABELS.items(), strict=True):
            chosen = runs[variant, backbone]
            presets = sorted({str(run.config["gate_preset"]) for run in chosen})
            kind = f"{', '.join(presets)} preset" if presets else "text preset"
            named = variant == "lif-text" or presets
            panel_title(axes, next(letters), f"{label}, {kind}" if named else label)
            if not chosen:
                say_not_run(axes, f"{label} with LIF")
                continue
            _trajectories(axes, chosen, each_unit=backbone == "transformer")
            axes.set_ylabel(r"threshold $|\theta|$" if backbone == "transformer"
                            else r"mean threshold $|\theta|$")  # fmt: skip
            if variant == rows[-1]:
                axes.set_xlabel("step")
    return figure


def _trajectories(axes: Axes, runs: Sequence[RunResult], each_unit: bool) -> None:
    layer_means = []
    for run in runs:
        steps, theta = threshold_trajectories(run)
        means = theta.mean(2)
        layer_means.append(means)
        for layer, (color, marker) in enumerate(layer_looks(theta.shape[1])):
            thin = theta[:, layer] if each_unit else means[:, layer]
            axes.plot(steps, thin, color=color, linewidth=0.5, alpha=0.5)
            axes.plot(steps[-1:], thin[-1:], marker, color=color, markersize=2.6, zorder=1.9,
                      clip_on=False)  # fmt: skip
    mean = np.mean(layer_means, axis=0)
    looks = layer_looks(mean.shape[1])
    for layer, (color, marker) in enumerate(looks):
        axes.plot(steps, mean[:, layer], color="white", linewidth=2.2)
        axes.plot(steps, mean[:, layer], color=color, marker=marker, clip_on=False, **_MEAN)
    axes.axhline(mean[0, 0], color="0.5", linewidth=0.7, linestyle=(0, (3, 3)), zorder=0)
    axes.set_xlim(0, steps[-1])
    # Room for the legend, which no line then crosses.
    low, high = axes.dataLim.intervaly
    size = high - low or max(abs(high), 1e-3)
    axes.set_ylim(low - 0.05 * size, high + 0.32 * size)
    axes.legend(
        [Line2D([], [], color=color, marker=marker, **_MEAN) for color, marker in looks],
        [f"layer {layer}" for layer in range(len(looks))],
        loc="upper left",
        ncols=3,
    )
