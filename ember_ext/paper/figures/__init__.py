"""The paper's seven figures, drawn from finished runs.

`draw_figures` makes all of them, and `write_figures` writes their files. A panel whose runs are
missing stays empty and says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ember_ext.paper.figures.architecture import figure_1_architecture
from ember_ext.paper.figures.depth_profile import figure_5_depth
from ember_ext.paper.figures.entropy_heatmap import figure_3_entropy
from ember_ext.paper.figures.head_roles import LOWEST, figure_4_roles
from ember_ext.paper.figures.loss_curves import SHOWN_FROM, figure_2_loss_curves
from ember_ext.paper.figures.parameters import figure_7_parameters
from ember_ext.paper.figures.style import LOOKS, Format, rendered
from ember_ext.paper.figures.thresholds import figure_6_thresholds
from ember_ext.paper.files import write_atomically
from ember_ext.paper.labels import BACKBONE_LABELS
from ember_ext.paper.runs.finished import NULL, FinishedRuns
from ember_ext.paper.statistics.heads import FOCUSER_BELOW, GATHERER_ABOVE, POINTER_BELOW

__all__ = [
    "Drawing",
    "draw_figures",
    "figure_1_architecture",
    "figure_2_loss_curves",
    "figure_3_entropy",
    "figure_4_roles",
    "figure_5_depth",
    "figure_6_thresholds",
    "figure_7_parameters",
    "write_figures",
]

FILE_FORMATS: tuple[Format, ...] = ("pdf", "png")


@dataclass(frozen=True)
class Drawing:
    """A figure and what is said of it.

    Attributes:
        number: 1 to 7, as the paper plans them.
        stem: of its files' names.
        title: a few words.
        caption: what is seen, and from which runs.
        figure: not yet rendered.
    """

    number: int
    stem: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class _Plan:
    stem: str
    title: str
    draw: Callable[[FinishedRuns], Figure]
    caption: str
    runs: dict[str, tuple[str, ...]]
    """Which variants are seen, for each backbone."""
    noise: str = ""
    """The words for the grey noise floor."""


_PAIR = ("standard", "lif")

_PLANS = (
    _Plan(
        "figure-1-architecture",
        "Where the gates sit",
        lambda _: figure_1_architecture(),
        "Each condition of the paper has at most one of the gates. (a) The LIF gate works on the "
        "attention weights p, after the softmax and before the values, and every row is scaled "
        "back to sum to 1. Qwen's gate works on the attention's output y. (b) The LIF gate of the "
        "CfC works on the hidden state h that its motor neurons put out. The figure shows the "
        "models' definition.",
        {},
    ),
    _Plan(
        "figure-2-loss-curves",
        "Loss curves and crossover",
        figure_2_loss_curves,
        "Validation loss by the paper's protocol (random batches) at every evaluation, in nats per "
        "character. Thin lines are seeds, thick lines their means. The vertical axes fit all "
        f"triangles and the values from {SHOWN_FROM:.0%} of the steps on, because the fall before "
        "would hide everything else. Earlier values may lie outside. (c, d) LIF minus Standard of "
        "the same seed: LIF is better below 0. A filled triangle is the evaluation from which LIF "
        "stays ahead to the end. A hollow one is a first lead that was lost.",
        {"transformer": (*_PAIR, NULL), "cfc": (*_PAIR, NULL)},
        "the RMS and the largest difference at each step",
    ),
    _Plan(
        "figure-3-entropy",
        "Attention entropy by layer and head",
        figure_3_entropy,
        "Mean entropy of the attention weights in use (gated ones under LIF) after the last step, "
        "on one colour scale that ends at uniform attention. Standard and LIF of one seed start "
        "from the same weights; heads of different seeds do not correspond.",
        {"transformer": _PAIR},
    ),
    _Plan(
        "figure-4-roles",
        "Roles of attention heads",
        figure_4_roles,
        "(a, b) Every head of every seed by its mean attention entropy and its support, the "
        "number of keys that get a weight above 0.01. The dotted lines are the cut-offs between "
        f"roles: a pointer is below {POINTER_BELOW:g} nats, a focuser below {FOCUSER_BELOW:g}, "
        f"and a gatherer above {GATHERER_ABOVE:.0%} of uniform attention's entropy. Entropies "
        f"below {LOWEST:g} are drawn at {LOWEST:g}. (c, d) The number of heads of a layer that "
        "have each role, mean over seeds.",
        {"transformer": _PAIR},
    ),
    _Plan(
        "figure-5-depth",
        "Entropy against depth in both backbones",
        figure_5_depth,
        "The values are those after the last step. Lines are means over seeds, dots are the "
        "seeds, and bars are their range. (a) Attention entropy, mean over a layer's heads. (b) "
        "Neuron entropy, mean over a layer's neurons. LIF is measured through its own gates, and "
        "both variants through the same virtual gate, which is a gate at its initial values. A "
        "rise that Standard shows through the virtual gate does not come from gating.",
        {"transformer": _PAIR, "cfc": _PAIR},
    ),
    _Plan(
        "figure-6-thresholds",
        "Thresholds in training",
        figure_6_thresholds,
        "Effective threshold |θ| at every evaluation, with one row for each gate preset. Thick "
        "lines are means of a layer over seeds. Thin lines, marked at their ends, are single "
        "heads (Transformer) or a layer's mean in one seed (CfC). The dashed line is the initial "
        "value.",
        {"transformer": ("lif", "lif-text"), "cfc": ("lif", "lif-text")},
    ),
    _Plan(
        "figure-7-parameters",
        "Loss against added parameters",
        figure_7_parameters,
        "(a, b) Best validation loss by the paper's protocol. Small markers are seeds, joined by "
        "lines across variants. Large markers are means over the seeds that a variant has. "
        "Variants that add equally many parameters are drawn side by side. Those that add none "
        "stand left of the break. (c, d) Difference from Standard of the same seeds: the mean, "
        "and the 95 % interval of the paired t-test where there are three seeds or more.",
        {"transformer": tuple(LOOKS), "cfc": tuple(LOOKS)},
        "the RMS and the largest difference",
    ),
)


def draw_figures(finished: FinishedRuns) -> list[Drawing]:
    """All seven figures, whatever was run."""
    return [
        Drawing(number, plan.stem, plan.title, _caption(plan, finished), plan.draw(finished))
        for number, plan in enumerate(_PLANS, start=1)
    ]


def write_figures(folder: str | os.PathLike[str], drawings: Sequence[Drawing]) -> list[Path]:
    """Write each figure as PDF (vector) and PNG (300 dpi); equal runs give equal bytes.

    Raises:
        OSError: a file cannot be written.
    """
    paths = []
    for drawing in drawings:
        for file_format in FILE_FORMATS:
            path = Path(folder) / f"{drawing.stem}.{file_format}"
            write_atomically(path, rendered(drawing.figure, file_format))
            paths.append(path)
    return paths


def _caption(plan: _Plan, finished: FinishedRuns) -> str:
    if not plan.runs:
        return plan.caption
    parts = []
    for backbone, variants in plan.runs.items():
        counts = [
            f"{LOOKS[variant].label} × {len(finished.runs(backbone, variant))}"
            for variant in variants
            if finished.runs(backbone, variant)
        ]
        parts.append(f"{BACKBONE_LABELS[backbone]} {', '.join(counts) if counts else 'not run'}")
    return f"{plan.caption}{_noise_sentence(plan, finished)} Runs: {'; '.join(parts)}."


def _noise_sentence(plan: _Plan, finished: FinishedRuns) -> str:
    if not plan.noise:
        return ""
    if not any(finished.pairs(backbone, NULL) for backbone in plan.runs):
        return " There are no runs that tell how far Standard differs from itself by rounding."
    return (
        f" Grey shows {plan.noise} between Standard runs that are equal up to rounding. It cannot "
        "be seen where it is thinner than a line."
    )
