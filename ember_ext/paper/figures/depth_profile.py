"""Figure 5: what changes with depth, in both backbones."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ember_ext.paper.figures.style import (
    DOUBLE_COLUMN,
    LOOKS,
    new_figure,
    panel_title,
    say_not_run,
    styled,
)
from ember_ext.paper.labels import BACKBONE_LABELS
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.statistics.depth import (
    ATTENTION_ENTROPY,
    NEURON_ENTROPY,
    VIRTUAL_NEURON_ENTROPY,
    DepthProfile,
    depth_profile,
)

VARIANTS = ("standard", "lif")

APART = 0.07
"""Between profiles, in layers."""

VIRTUAL: dict[str, Any] = {"linestyle": (0, (3, 1.5)), "markerfacecolor": "white"}
"""The look of a profile through the virtual gate."""


@styled
def figure_5_depth(finished: FinishedRuns) -> Figure:
    """Draw entropy against depth, side by side for the two backbones.

    Lines are means over seeds, dots the seeds, bars their range. Attention entropy of the
    Transformer; neuron entropy of the CfC, LIF through its own gates and both variants through one
    virtual gate, a gate at its initial values.
    """
    figure = new_figure(DOUBLE_COLUMN, 2.6)
    transformer, cfc = figure.subplots(1, 2)
    panel_title(transformer, "a", f"{BACKBONE_LABELS['transformer']}, attention")
    panel_title(cfc, "b", f"{BACKBONE_LABELS['cfc']}, neurons")
    drawn = False
    for variant in VARIANTS:
        profile = depth_profile(finished.runs("transformer", variant), ATTENTION_ENTROPY)
        if profile is not None:
            shift = APART * (VARIANTS.index(variant) - 0.5)
            _profile(transformer, profile, variant, LOOKS[variant].label, shift)
            drawn = True
    _finish(transformer, drawn, "Transformer", "attention entropy (nats)")
    drawn = False
    for variant in VARIANTS:
        label = LOOKS[variant].label
        for measure, gate, shift, style in (
            (NEURON_ENTROPY, "own gate", APART, {}),
            (
                VIRTUAL_NEURON_ENTROPY,
                "virtual gate",
                APART * (VARIANTS.index(variant) - 1),
                VIRTUAL,
            ),
        ):
            profile = depth_profile(finished.runs("cfc", variant), measure)
            if profile is not None:
                _profile(cfc, profile, variant, f"{label}, {gate}", shift, **style)
                drawn = True
    _finish(cfc, drawn, "CfC", "neuron entropy (nats)")
    return figure


def _profile(
    axes: Axes, profile: DepthProfile, variant: str, label: str, shift: float, **style: Any
) -> None:
    """Draw one profile, `shift` layers to the right so that ranges stand side by side."""
    look = LOOKS[variant]
    values = np.array(profile.values)
    layers = np.arange(values.shape[1]) + shift
    if len(values) > 1:
        axes.vlines(layers, values.min(0), values.max(0), color=look.color, linewidth=0.8)
        axes.plot(layers, values.T, ".", color=look.color, markersize=2.5)
    axes.plot(layers, profile.mean, color=look.color, marker=look.marker, label=label, **style)


def _finish(axes: Axes, drawn: bool, what: str, ylabel: str) -> None:
    if not drawn:
        say_not_run(axes, what)
        return
    last = round(max(np.max(line.get_xdata()) for line in axes.lines))
    axes.set(xticks=range(last + 1), xlim=(-0.2, last + 0.2), xlabel="layer", ylabel=ylabel)
    # From 0, so that the size of a trend is seen and not only its sign.
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=1)
