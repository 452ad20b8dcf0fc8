"""Draws the README's picture from `bench/results`: `python bench/picture.py`.

Writes speed.png and speed-dark.png there. Each group of bars has an axis of its own that starts at
zero, because the groups were not all measured on the same machine. `python_tests/test_readme.py`
holds the README's table to the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import measurements
from measurements import Row


@dataclass(frozen=True)
class Comparison:
    """One computation, before and after.

    Attributes:
        title: what is computed.
        size: how much of it.
        file: of `bench/results`.
        where: the rows of that file that belong to it, see `measurements`.
        before: a name for the picture, and the contender, of each that ours is compared with. The
            first is the baseline.
        ours: the contender that is this package.
    """

    title: str
    size: str
    file: str
    where: str
    before: tuple[tuple[str, str], ...]
    ours: str

    def row(self, contender: str) -> Row:
        """The one row of a contender."""
        return measurements.find(self.file, f"{self.where};contender={contender}")

    def milliseconds(self, contender: str) -> float:
        """The median time of a contender."""
        return float(self.row(contender)["median_ms"])

    def gain(self, contender: str) -> str:
        """How many times as fast as a contender ours is."""
        return measurements.factor(self.milliseconds(contender) / self.milliseconds(self.ours))


COMPARISONS = (
    Comparison(
        "LTC",
        "AutoNCP(32, 4), 32 series of 100 steps",
        "ltc.csv",
        "config=AutoNCP(32, 4) [32, 100, 20];mode=forward+backward",
        (("ncps", "ncps"),),
        "ember_ext avx512",
    ),
    Comparison(
        "CfC",
        "AutoNCP(192, 128), 64 series of 256 steps",
        "cfc.csv",
        "config=wired [64, 256, 128] -> 192;mode=forward+backward;isa=avx2",
        (("ncps", "ncps"),),
        "ember_ext avx2",
    ),
    Comparison(
        "LIF attention",
        "64 sequences, 6 heads, 256 tokens",
        "attention.csv",
        "config=[64, 6, 256, 64] dropout=0.0;mode=forward+backward",
        (("PyTorch", "eager"), ("torch.compile", "compiled")),
        "ember_ext",
    ),
)

BAR_INCHES = 0.27
TITLE_INCHES = 0.42


def draw(comparison: Comparison, axis: Any, ours: str, others: str, ink: str, faint: str) -> None:
    """The bars of one comparison, from top to bottom, with their times."""
    bars = [*comparison.before, ("ember-ext", comparison.ours)]
    longest = max(comparison.milliseconds(contender) for _, contender in bars)
    for place, (name, contender) in enumerate(bars):
        milliseconds = comparison.milliseconds(contender)
        is_ours = contender == comparison.ours
        axis.barh(place, milliseconds, 0.78, color=ours if is_ours else others)
        text = measurements.duration(milliseconds)
        if is_ours:
            text += f"   {comparison.gain(comparison.before[0][1])} as fast"
        axis.text(
            milliseconds + longest * 0.012, place, text, va="center", fontsize=11, color=ink,
            weight="bold" if is_ours else "normal",
        )  # fmt: skip
        axis.text(-longest * 0.012, place, name, ha="right", va="center", fontsize=11, color=ink)
    axis.set(xlim=(0, longest), ylim=(len(bars) - 0.5, -0.5))
    axis.axis("off")
    title = axis.set_title(
        comparison.title, loc="left", fontsize=12.5, weight="bold", color=ink, pad=5
    )
    axis.annotate(
        comparison.size, (1, 0), xycoords=title, xytext=(10, 3), textcoords="offset points",
        fontsize=10.5, color=faint,
    )  # fmt: skip


def picture(dark: bool) -> Any:
    """The figure, for a light or a dark page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ours, others, ink, faint = (
        ("#58a6ff", "#6e7681", "#f0f6fc", "#9198a1")
        if dark
        else ("#0969da", "#afb8c1", "#1f2328", "#59636e")
    )
    counts = [len(comparison.before) + 1 for comparison in COMPARISONS]
    height = sum(BAR_INCHES * count + TITLE_INCHES for count in counts) + 0.42
    figure = plt.figure(figsize=(8.4, height), facecolor="none" if dark else "white")
    top = height
    for comparison, count in zip(COMPARISONS, counts, strict=True):
        top -= TITLE_INCHES + BAR_INCHES * count
        axis = figure.add_axes((0.15, top / height, 0.71, BAR_INCHES * count / height))
        draw(comparison, axis, ours, others, ink, faint)
    note = "Time of one forward and backward pass on two CPU cores. Shorter is better."
    figure.text(0.15, 0.1 / height, note, fontsize=10.5, color=faint)
    return figure


def main() -> None:
    """Write both pictures."""
    for name, dark in (("speed.png", False), ("speed-dark.png", True)):
        picture(dark).savefig(measurements.RESULTS / name, dpi=200)


if __name__ == "__main__":
    main()
