"""Figure 4: what role each attention head has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ember_ext.paper.figures.style import (
    BLUE,
    DOUBLE_COLUMN,
    GREY,
    LOOKS,
    ORANGE,
    SMALLEST_TEXT,
    VERMILLION,
    new_figure,
    panel_title,
    say_not_run,
    styled,
    text_color,
)
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.heads import (
    FOCUSER_BELOW,
    POINTER_BELOW,
    ROLES,
    gatherer_cut_off,
    head_entropies,
    head_roles,
    role_counts,
    uniform_entropy,
)

VARIANTS = ("standard", "lif")

LOWEST = 0.01
"""Nats at the left end of the entropy axis; what is below is drawn there."""


class RoleLook(NamedTuple):
    """The look of a role: its markers have a colour and a shape, its bars a colour and a hatch."""

    color: str
    marker: str
    hatch: str


ROLE_LOOKS = {
    "pointer": RoleLook(VERMILLION, "v", "xxxx"),
    "focuser": RoleLook(ORANGE, "D", "////"),
    "mixed": RoleLook(GREY, "o", ""),
    "gatherer": RoleLook(BLUE, "s", "...."),
}


@styled
def figure_4_roles(finished: FinishedRuns) -> Figure:
    """Draw every head by entropy and support above, and the roles in each layer below.

    Dotted lines are the cut-offs that make a head pointer, focuser or gatherer. Bars are mean
    numbers of heads over seeds.
    """
    chosen = {variant: finished.runs("transformer", variant) for variant in VARIANTS}
    some = next((runs[0] for runs in chosen.values() if runs), None)
    layers = int(some.config["n_layer"]) if some else 2
    block_size = int(some.config["block_size"]) if some else 0
    figure = new_figure(DOUBLE_COLUMN, 3.1 + 0.21 * layers)
    panels = figure.subplots(2, 2, height_ratios=[2.1, 0.5 + 0.21 * layers])
    support = max((_support(run).max() for runs in chosen.values() for run in runs), default=1.0)
    for (scatter, bars), letters, variant in zip(panels.T, ("ac", "bd"), VARIANTS, strict=True):
        runs, label = chosen[variant], LOOKS[variant].label
        seeds = f", {len(runs)} seed{'s' if len(runs) > 1 else ''}" if runs else ""
        panel_title(scatter, letters[0], f"{label}{seeds}")
        panel_title(bars, letters[1], f"{label}, heads by layer")
        if not runs:
            say_not_run(scatter, f"Transformer, {label}")
            say_not_run(bars, f"Transformer, {label}")
            continue
        _scatter(scatter, runs, block_size)
        scatter.set_ylim(0.8, 1.3 * support)
        _bars(bars, runs)
    handles: list[Any] = [
        (
            Line2D([], [], color=look.color, marker=look.marker, linestyle=""),
            Patch(facecolor=look.color, edgecolor="white", hatch=look.hatch),
        )
        for look in ROLE_LOOKS.values()
    ]
    figure.legend(
        handles,
        list(ROLE_LOOKS),
        loc="outside lower center",
        ncols=len(handles),
        handlelength=3.4,
        handleheight=1.1,
        handler_map={tuple: HandlerTuple(ndivide=None)},
    )
    return figure


def _scatter(axes: Axes, runs: Sequence[RunResult], block_size: int) -> None:
    entropy = np.maximum([head_entropies(run) for run in runs], LOWEST)
    support = np.array([_support(run) for run in runs])
    roles = np.array([head_roles(run) for run in runs])
    axes.set(xscale="log", yscale="log", xlim=(0.9 * LOWEST, 1.15 * uniform_entropy(block_size)))
    for role, look in ROLE_LOOKS.items():
        chosen = roles == role
        axes.plot(entropy[chosen], support[chosen], look.marker, color=look.color, markersize=3.6,
                  markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
    for cut_off in (POINTER_BELOW, FOCUSER_BELOW, gatherer_cut_off(block_size)):
        axes.axvline(cut_off, color="0.5", linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
    axes.set(xlabel="attention entropy (nats)", ylabel="support (keys)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def _support(run: RunResult) -> np.ndarray:
    return np.array(run.evaluations[-1]["attention_support"])


def _bars(axes: Axes, runs: Sequence[RunResult]) -> None:
    by_layer = zip(*(role_counts(run) for run in runs), strict=True)
    counts = [[np.mean([c[role] for c in layer]) for role in ROLES] for layer in by_layer]
    lefts = np.zeros(len(counts))
    for role, widths in zip(ROLES, np.transpose(counts), strict=True):
        look = ROLE_LOOKS[role]
        axes.barh(range(len(counts)), widths, left=lefts, height=0.72, color=look.color,
                  edgecolor="white", linewidth=0.6, hatch=look.hatch)  # fmt: skip
        for layer, (left, width) in enumerate(zip(lefts, widths, strict=True)):
            if width >= 0.06 * sum(counts[layer]):
                # On a patch of its own, which the hatch does not cross.
                axes.text(left + width / 2, layer, f"{width:.2g}", ha="center", va="center",
                          size=SMALLEST_TEXT, color=text_color(look.color),
                          bbox={"facecolor": look.color, "linewidth": 0, "pad": 1.2})  # fmt: skip
        lefts += widths
    axes.set(xlim=(0, lefts.max()), xlabel="heads (mean over seeds)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(counts)), [f"layer {layer}" for layer in range(len(counts))])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
