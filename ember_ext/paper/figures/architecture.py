"""Figure 1: where the gates sit in both backbones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ember_ext.paper.figures.style import (
    BLUE,
    DOUBLE_COLUMN,
    SMALLEST_TEXT,
    VERMILLION,
    styled,
)

PLAIN = "#F2F2F2"
LIF = "#F9DDCB"
QWEN = "#CFE3F1"


class Box(NamedTuple):
    """One step of a block: centre and width in the units of the axes."""

    x: float
    width: float
    text: str
    fill: str = PLAIN
    edge: str = "0.35"


HEIGHT = 0.62
_SMALL: dict[str, Any] = {"ha": "center", "va": "center", "size": SMALLEST_TEXT, "color": "0.25"}


@styled
def figure_1_architecture() -> Figure:
    """Draw one block of each backbone with the position of each gate."""
    height = 3.85
    figure = Figure(figsize=(DOUBLE_COLUMN, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, DOUBLE_COLUMN), ylim=(0, height))
    axes.set_axis_off()
    _transformer(axes, y=2.84)
    _cfc(axes, y=1.02)
    _legend(axes)
    return figure


def _transformer(axes: Axes, y: float) -> None:
    axes.text(0.08, y + 0.85, r"$\bf{a}$  Transformer block, attention half", va="center", size=8)
    boxes = [
        Box(0.62, 0.42, "Layer-\nNorm"),
        Box(1.36, 0.72, "softmax\n" r"$(QK^{\top}/\sqrt{d}\,)$"),
        Box(2.23, 0.66, "LIF gate\n" r"$p\cdot g(p)$", LIF, VERMILLION),
        Box(3.00, 0.56, "row sum\nback to 1", LIF, VERMILLION),
        Box(3.68, 0.50, "dropout"),
        Box(4.27, 0.40, r"$\times\,V$"),
        Box(5.01, 0.76, "Qwen gate\n" r"$y\odot\sigma(Wx)$", QWEN, BLUE),
        Box(5.77, 0.48, "c_proj,\ndropout"),
    ]
    _chain(axes, boxes, y)
    _label(axes, boxes[1], boxes[2], y, "$p$")
    _label(axes, boxes[3], boxes[4], y, "$w$")
    # The values go round the softmax and its gate; the normalised input reaches Qwen's gate.
    _detour(axes, boxes[0], boxes[5], y, y - 0.56, "values $V$")
    _detour(axes, boxes[0], boxes[6], y, y - 0.74, "$x$", offset=-0.08)
    _label(axes, boxes[5], boxes[6], y, "$y$")
    _residual(axes, boxes, y)


def _cfc(axes: Axes, y: float) -> None:
    axes.text(0.08, y + 0.85, r"$\bf{b}$  CfC block, recurrent half", va="center", size=8)
    boxes = [
        Box(0.62, 0.42, "Layer-\nNorm"),
        Box(1.43, 0.60, "inter\nneurons"),
        Box(2.33, 0.66, "command\nneurons"),
        Box(3.24, 0.60, "motor\nneurons"),
        Box(4.22, 0.72, "LIF gate\n" r"$h\cdot g(|h|)$", LIF, VERMILLION),
        Box(5.01, 0.50, r"$\|h\|_2$" "\nkept*", LIF, VERMILLION),
        Box(5.71, 0.50, "dropout"),
    ]
    _chain(axes, boxes, y)
    for box in boxes[1:4]:
        _recurrence(axes, box, y)
    _label(axes, boxes[3], boxes[4], y, "$h$")
    left, right = boxes[1].x - boxes[1].width / 2 - 0.07, boxes[3].x + boxes[3].width / 2 + 0.07
    axes.add_patch(
        FancyBboxPatch(
            (left, y - 0.44),
            right - left,
            0.88,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor="none",
            edgecolor="0.6",
            linestyle=(0, (4, 2)),
            linewidth=0.7,
        )
    )
    axes.text(
        (left + right) / 2, y - 0.53, "wired CfC: each group keeps its state over time", **_SMALL
    )
    _residual(axes, boxes, y)


def _legend(axes: Axes) -> None:
    axes.text(
        0.08,
        0.2,
        r"$g(u)=\lambda+(1-\lambda)\,\sigma(k(u-\theta))$, with one learnt $(\theta,\lambda,k)$ "
        "for each head (a) or neuron (b).   *text preset only; released: none.",
        va="center",
        size=7,
    )


def _chain(axes: Axes, boxes: Sequence[Box], y: float) -> None:
    """Boxes from left to right, arrows between them."""
    for box in boxes:
        axes.add_patch(
            FancyBboxPatch(
                (box.x - box.width / 2, y - HEIGHT / 2),
                box.width,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.05",
                facecolor=box.fill,
                edgecolor=box.edge,
                linewidth=0.8,
                zorder=2,
            )
        )
        axes.text(box.x, y, box.text, ha="center", va="center", size=7, zorder=3, linespacing=1.3)
    for left, right in itertools.pairwise(boxes):
        _arrow(axes, (left.x + left.width / 2, y), (right.x - right.width / 2, y))


def _residual(axes: Axes, boxes: Sequence[Box], y: float) -> None:
    """The residual stream: into the first box, past all of them, into the sum."""
    first, last = boxes[0], boxes[-1]
    total, top = last.x + last.width / 2 + 0.26, y + 0.52
    start = 0.12
    branch = (start + first.x - first.width / 2) / 2
    _arrow(axes, (start, y), (first.x - first.width / 2, y))
    axes.plot([branch, branch, total, total], [y, top, top, y + 0.09], color="0.25", linewidth=0.8)
    _arrow(axes, (total, y + 0.2), (total, y + 0.085))
    _arrow(axes, (last.x + last.width / 2, y), (total - 0.085, y))
    axes.text(total, y, "+", ha="center", va="center", size=9, zorder=3)
    axes.plot(total, y, "o", markersize=11, markerfacecolor="white", markeredgecolor="0.25",
              markeredgewidth=0.8, zorder=2)  # fmt: skip
    _arrow(axes, (total + 0.085, y), (total + 0.36, y))
    axes.text(total + 0.36, y - 0.1, "to\nMLP", **{**_SMALL, "va": "top"})
    axes.text((branch + total) / 2, top + 0.08, "residual stream", **_SMALL)


def _detour(
    axes: Axes, source: Box, target: Box, y: float, low: float, text: str, offset: float = 0.08
) -> None:
    """A line from below one box to below another."""
    x = source.x + offset
    axes.plot([x, x, target.x], [y - HEIGHT / 2, low, low], color="0.25", linewidth=0.8)
    _arrow(axes, (target.x, low), (target.x, y - HEIGHT / 2))
    axes.text(x + 0.08, low + 0.075, text, **{**_SMALL, "ha": "left"})


def _recurrence(axes: Axes, box: Box, y: float) -> None:
    """A small loop above a box."""
    axes.add_patch(
        FancyArrowPatch(
            (box.x + 0.12, y + HEIGHT / 2 - 0.01),
            (box.x - 0.12, y + HEIGHT / 2 - 0.01),
            connectionstyle="arc3,rad=0.55",
            arrowstyle="-|>,head_length=2.2,head_width=1.3",
            color="0.25",
            linewidth=0.8,
            zorder=4,
        )
    )


def _label(axes: Axes, left: Box, right: Box, y: float, text: str) -> None:
    """Name what flows from one box to the next."""
    middle = (left.x + left.width / 2 + right.x - right.width / 2) / 2
    axes.text(middle, y + 0.1, text, ha="center", va="center", size=7)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=3,head_width=1.7",
            color="0.25",
            linewidth=0.8,
            shrinkA=0,
            shrinkB=0,
            zorder=1.5,
        )
    )
