"""Figure 7: what the loss gains from the parameters that each gate adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
from ember_ext.paper.runs.finished import BASELINE, NULL, FinishedRuns
from ember_ext.paper.statistics.comparisons import (
    best_loss,
    compare,
    extra_parameters,
    measure_noise,
)

APART = 0.16
"""Between variants that add equally many parameters, in powers of ten."""

LEAST_APART = 0.12
"""Between any two. Groups of equal numbers that come closer are spread as one, at this distance."""


class Place(NamedTuple):
    """The place of a variant on the horizontal axis."""

    extra: int
    x: float


@styled
def figure_7_parameters(finished: FinishedRuns) -> Figure:
    """Draw the best validation loss, and its paired difference from Standard, against parameters.

    Above, small markers are seeds, joined across variants by thin lines, and large ones means.
    Below, means with 95 % intervals by the paired t-test, and the noise of the null pair.
    """
    figure = new_figure(DOUBLE_COLUMN, 4.4)
    panels = figure.subplots(2, 2, height_ratios=[1.2, 1])
    for (loss, difference), letters, (backbone, label) in zip(
        panels.T, ("ac", "bd"), BACKBONE_LABELS.items(), strict=True
    ):
        panel_title(loss, letters[0], label)
        panel_title(difference, letters[1], f"{label}, against Standard")
        places = _places(finished, backbone)
        if not places:
            say_not_run(loss, f"{label}, Standard")
            say_not_run(difference, f"{label}, Standard")
            continue
        _losses(loss, finished, backbone, places)
        _differences(difference, finished, backbone, places)
        for axes in (loss, difference):
            _axis(axes, places)
    figure.align_ylabels()
    legend_below(figure, panels.flat, ncols=4)
    return figure


def _places(finished: FinishedRuns, backbone: str) -> dict[str, Place]:
    """The place of each variant: log10 of its parameters, and on the left those without any."""
    found = {v: extra_parameters(finished, backbone, v) for v in LOOKS if v != NULL}
    extras = {variant: extra for variant, extra in found.items() if extra is not None}
    positive = [extra for extra in extras.values() if extra > 0]
    zero = math.floor(math.log10(min(positive))) - 1 if positive else 0
    spread = _spread({v: math.log10(e) if e > 0 else zero for v, e in extras.items()})
    return {variant: Place(extra, spread[variant]) for variant, extra in extras.items()}


def _spread(wanted: dict[str, float]) -> dict[str, float]:
    """Move what lies at one place, or too close to be told apart, to both sides."""
    by_place: dict[float, list[str]] = {}
    for variant, x in wanted.items():
        by_place.setdefault(x, []).append(variant)
    groups: list[tuple[list[str], float]] = []
    for x in sorted(by_place):
        group, apart = by_place[x], APART
        while groups:
            before, apart_before = groups[-1]
            gap = _ends(group, wanted, apart)[0] - _ends(before, wanted, apart_before)[1]
            if gap >= LEAST_APART:
                break
            group, apart = [*before, *group], LEAST_APART
            groups.pop()
        groups.append((group, apart))
    places = {}
    for group, apart in groups:
        first, _ = _ends(group, wanted, apart)
        places.update({variant: first + apart * i for i, variant in enumerate(group)})
    return places


def _ends(group: Sequence[str], wanted: Mapping[str, float], apart: float) -> tuple[float, float]:
    """Where a group begins and ends that is spread around the mean of where it belongs."""
    middle = float(np.mean([wanted[variant] for variant in group]))
    half = apart * (len(group) - 1) / 2
    return middle - half, middle + half


def _losses(axes: Axes, finished: FinishedRuns, backbone: str, places: dict[str, Place]) -> None:
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for variant, place in places.items():
        look = LOOKS[variant]
        losses = {run.seed: best_loss(run) for run in finished.runs(backbone, variant)}
        for seed, value in losses.items():
            by_seed.setdefault(seed, []).append((place.x, value))
        axes.plot([place.x] * len(losses), list(losses.values()), look.marker, color=look.color,
                  markersize=2.6, alpha=0.6)  # fmt: skip
        axes.plot(place.x, np.mean(list(losses.values())), look.marker, color=look.color,
                  markersize=6, markeredgecolor="white", markeredgewidth=0.6,
                  label=look.label, zorder=3)  # fmt: skip
    for points in by_seed.values():
        axes.plot(*zip(*sorted(points), strict=True), color="0.75", linewidth=0.5, zorder=0)
    axes.set_ylabel("best validation loss (nats)")


def _differences(
    axes: Axes, finished: FinishedRuns, backbone: str, places: dict[str, Place]
) -> None:
    base = np.mean([best_loss(run) for run in finished.runs(backbone, BASELINE)])
    noise = measure_noise(finished, backbone)
    if noise is not None:
        rms, maximum = 100 * noise.rms / base, 100 * noise.maximum / base
        everywhere = axes.get_yaxis_transform()
        noise_band(axes, [0, 1], [rms] * 2, [maximum] * 2, transform=everywhere)
    axes.axhline(0, color="0.4", linewidth=0.7, zorder=1)
    for variant, place in places.items():
        comparison = compare(finished, backbone, variant)
        if comparison is None or comparison.percent is None:
            continue
        look = LOOKS[variant]
        if variant != BASELINE and comparison.t_interval is not None:
            interval = [100 * end / comparison.base.mean for end in comparison.t_interval]
            axes.plot([place.x] * 2, interval, color=look.color, linewidth=1)
        axes.plot(place.x, comparison.percent, look.marker, color=look.color, markersize=5,
                  markeredgecolor="white", markeredgewidth=0.5, zorder=3)  # fmt: skip
    axes.set_ylabel("difference (%)")


def _axis(axes: Axes, places: dict[str, Place]) -> None:
    """Powers of ten, and 0 apart from them, left of a break."""
    positive = [math.log10(place.extra) for place in places.values() if place.extra > 0]
    if not positive:
        axes.set(xticks=[0], xticklabels=["0"], xlim=(-0.8, 0.8))
    else:
        first, last = math.floor(min(positive)), math.ceil(max(positive))
        axes.set_xticks(
            [first - 1, *range(first, last + 1)],
            ["0", *(f"$10^{power}$" for power in range(first, last + 1))],
        )
        axes.set_xlim(first - 1.5, last + 0.3)
        axes.plot(first - 0.5, 0, marker=[(-1, -1.5), (1, 1.5)], color="0.3", markersize=6,
                  transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
    axes.set_xlabel("parameters added to Standard")
