"""The confusion matrix of a run as a picture. It needs nothing that training does not."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> bytes:
    """Draw how many series of each class were taken for which; colours show shares of the row.

    Args:
        confusion: for each true class the number of series by class given.
        classes: their names.
        title: of the picture; the accuracy comes below it.

    Returns:
        A PNG file.
    """
    # The figure is built without pyplot, which would look for a display and keep global state.
    from matplotlib.figure import Figure

    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 1.8 + 0.42 * max(len(classes), 4)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    rotation = 90 if max(map(len, classes)) > 3 else 0
    axes.set_xticks(range(len(classes)), classes, rotation=rotation)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="class given", ylabel="true class")
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"{title}\n{right} of {total} right ({right / max(total, 1):.1%})", fontsize=10)
    axes.tick_params(length=0)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()
