"""The loss curves of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def plot_losses(records: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw the training loss of every step and the validation loss of every evaluation.

    Args:
        records: the lines of `metrics.jsonl`.
        title: of the plot.

    Returns:
        A PNG file.
    """
    # The figure is built without pyplot, which would look for a display and keep global state.
    from matplotlib.figure import Figure

    steps = [record for record in records if record["event"] == "step"]
    evaluations = [record for record in records if record["event"] == "evaluation"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [record["step"] for record in steps],
        [record["loss"] for record in steps],
        color="0.8",
        linewidth=0.8,
        label="training batch",
    )
    axes.plot(
        [record["step"] for record in evaluations],
        [record["val_loss"] for record in evaluations],
        "o-",
        color="tab:red",
        markersize=4,
        label="validation",
    )
    best = min(evaluations, key=lambda record: record["val_loss"])
    axes.annotate(
        f"{best['val_loss']:.3f}",
        (best["step"], best["val_loss"]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
        color="tab:red",
    )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per character)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()
