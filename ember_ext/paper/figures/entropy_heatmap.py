"""Figure 3: attention entropy of every head."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ember_ext.paper.figures.style import (
    DOUBLE_COLUMN,
    LOOKS,
    SMALLEST_TEXT,
    new_figure,
    say_not_run,
    styled,
    text_color,
)
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.statistics.heads import head_entropies, uniform_entropy

VARIANTS = ("standard", "lif")
COLORMAP = "viridis"

FITTING = 16
"""Heads side by side, in all panels of a row, that leave room for numbers of four characters."""


@styled
def figure_3_entropy(finished: FinishedRuns) -> Figure:
    """Draw the final entropy by layer and head, Standard and LIF of one seed side by side.

    The one colour scale of all panels goes from 0 to the entropy of uniform attention. Seeds are
    not averaged: a head has no counterpart in a model that started from other weights.
    """
    by_variant = {v: {run.seed: run for run in finished.runs("transformer", v)} for v in VARIANTS}
    seeds = sorted(set().union(*by_variant.values()))
    if not seeds:
        return _nothing()
    pairs = 1 if len(seeds) <= 3 else 2
    rows = math.ceil(len(seeds) / pairs)
    some = next(iter((by_variant["standard"] or by_variant["lif"]).values()))
    layers = int(some.config["n_layer"])
    figure = new_figure(DOUBLE_COLUMN, 0.55 + rows * (0.5 + 0.24 * layers))
    panels = figure.subplots(rows, 2 * pairs, squeeze=False)
    limit = uniform_entropy(int(some.config["block_size"]))
    scale = ScalarMappable(Normalize(0, limit), COLORMAP)
    for i, axes in enumerate(panels.flat):
        if i // 2 >= len(seeds):
            axes.set_axis_off()
            continue
        seed, variant = seeds[i // 2], VARIANTS[i % 2]
        axes.set_title(f"{LOOKS[variant].label}, seed {seed}")
        run = by_variant[variant].get(seed)
        if run is None:
            say_not_run(axes, f"{LOOKS[variant].label}, seed {seed}")
        else:
            entropy = np.array(head_entropies(run))
            write = _two_decimals if 2 * pairs * entropy.shape[1] <= FITTING else _three_characters
            _heatmap(axes, entropy, limit, write)
        if i % (2 * pairs) == 0 and run is not None:
            axes.set_ylabel("layer")
        if i // (2 * pairs) == rows - 1 and run is not None:
            axes.set_xlabel("head")
    bar = figure.colorbar(scale, ax=panels, fraction=0.025, pad=0.01, aspect=12 * rows)
    bar.set_label("entropy (nats)")
    bar.outline.set_linewidth(0.6)
    return figure


def _heatmap(axes: Axes, entropy: np.ndarray, limit: float, write: Callable[[float], str]) -> None:
    """Draw `entropy`, [layers, heads], the first layer on top."""
    image = axes.imshow(entropy, cmap=COLORMAP, vmin=0, vmax=limit, aspect="auto")
    layers, heads = entropy.shape
    axes.set(xticks=range(heads), yticks=range(layers))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # White gaps, so that equal neighbours stay apart.
    axes.set_xticks(np.arange(heads - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(layers - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    if heads > 8:
        return
    for (layer, head), value in np.ndenumerate(entropy):
        axes.text(head, layer, write(value), ha="center", va="center", size=SMALLEST_TEXT,
                  color=text_color(image.to_rgba(value)))  # fmt: skip


def _two_decimals(value: float) -> str:
    return f"{value:.2f}"


def _three_characters(value: float) -> str:
    """A number from 0 to 10: .03 or 3.1."""
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2f}".removeprefix("0")


def _nothing() -> Figure:
    figure = new_figure(DOUBLE_COLUMN, 1.6)
    for axes, variant in zip(figure.subplots(1, 2), VARIANTS, strict=True):
        say_not_run(axes, f"Transformer, {LOOKS[variant].label}")
    return figure
