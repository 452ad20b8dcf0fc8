"""The style of every figure: sizes, fonts, colours, markers, and files that are the same each time.

Figures are made for the full width of a page, `DOUBLE_COLUMN`: set in one column of two, at half
their size, their text is too small to read.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

P = ParamSpec("P")
Format = Literal["pdf", "png", "svg"]

DOUBLE_COLUMN = 6.8
"""Width in inches of every figure: that of a page, or of both columns where it has two."""

SMALLEST_TEXT = 7.0
"""Points, at that width."""

MADE_FOR = (
    f"The figures are made for a width of {DOUBLE_COLUMN:g} in, the full width of a page (both "
    f"columns where there are two). Their text has {SMALLEST_TEXT:g} pt or more at this width, "
    "except exponents."
)
"""For readers and for the files themselves."""

PNG_DPI = 300

# Okabe and Ito's palette, which the common kinds of colour blindness keep apart.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#8C8C8C"

# The palette has no more. These two are darker than its other warm and green colours.
BROWN = "#7A3B00"
OLIVE = "#8A8A00"


class Look(NamedTuple):
    """The look of one variant; marker and colour each tell it from the others."""

    label: str
    color: str
    marker: str


LOOKS = {
    "standard": Look("Standard", BLACK, "o"),
    "lif": Look("LIF", VERMILLION, "s"),
    "lif-fixed": Look("LIF-fixed", ORANGE, "D"),
    "lif-refractory": Look("LIF-refractory", PURPLE, "^"),
    "qwen-gate": Look("Qwen-gate", BLUE, "v"),
    "lif-text": Look("LIF, text preset", GREEN, "p"),
    "null": Look("Standard again", GREY, "X"),
    "lif-temporal": Look("LIF-temporal", SKY, "<"),
    "lif-persistent": Look("LIF-persistent", BROWN, ">"),
    "sigmoid": Look("Sigmoid (LIF again)", OLIVE, "P"),
}
"""The looks of all variants, in the order of legends."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # part of matplotlib, so the same on every machine
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": SMALLEST_TEXT,
    "ytick.labelsize": SMALLEST_TEXT,
    "legend.fontsize": SMALLEST_TEXT,
    "figure.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.3,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # TrueType, embedded: text can be searched, and publishers take it
    "svg.fonttype": "path",
    "svg.hashsalt": "ember-ext",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw a figure in the common style, whatever the user's own settings of matplotlib are."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.style.context(["default", _STYLE]):
            figure = draw(*args, **kwargs)
            # Laid out once, so that files of every format look alike and are quick to write.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that keeps labels from overlapping.

    It is made without pyplot, which would look for a display and keep global state.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04)  # type: ignore[union-attr,call-arg]
    return figure


def rendered(figure: Figure, file_format: Format) -> bytes:
    """The figure as a file, without its date: equal figures give equal bytes."""
    metadata = {
        "pdf": {"Subject": MADE_FOR, "CreationDate": None},
        "svg": {"Description": MADE_FOR, "Date": None},
        "png": {"Description": MADE_FOR},
    }
    file = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]):
        figure.savefig(file, format=file_format, dpi=PNG_DPI, metadata=metadata[file_format])
    return file.getvalue()


def panel_title(axes: Axes, letter: str, text: str) -> None:
    """Name a panel by a letter, for the caption, and a few words."""
    bold = rf"$\bf{{{letter}}}$"
    axes.set_title(f"{bold}  {text}", pad=5)


def noise_band(axes: Axes, x: ArrayLike, rms: ArrayLike, maximum: ArrayLike, **where: Any) -> None:
    """Draw how far null pairs part, to either side of 0: at most, and as a root mean square."""
    for size, shade, label in (
        (np.asarray(maximum), "0.91", "null pairs: largest"),
        (np.asarray(rms), "0.78", "null pairs: RMS"),
    ):
        axes.fill_between(x, -size, size, color=shade, linewidth=0, label=label, zorder=0, **where)


def legend_below(figure: Figure, panels: Iterable[Axes], ncols: int) -> None:
    """One legend for several panels, each label once, under the figure.

    A band that is too thin to be seen in any panel is said to be.
    """
    handles: dict[str, Artist] = {}
    seen: set[str] = set()
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
            thin = (
                isinstance(handle, PolyCollection)
                and _thickness(figure, axes, handle) < THINNEST_BAND
            )
            if not thin:
                seen.add(label)
    if handles:
        labels = [label if label in seen else f"{label} (too thin to see)" for label in handles]
        figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=ncols)


THINNEST_BAND = 1.5
"""Points: what shows on both sides of the zero line."""


def _thickness(figure: Figure, axes: Axes, band: PolyCollection) -> float:
    """Points that a band around 0 takes at its widest, once the limits of its axes are set."""
    low, high = axes.get_ylim()
    widest = max(np.ptp(np.asarray(path.vertices)[:, 1]) for path in band.get_paths())
    height = 72 * figure.get_figheight() * axes.get_position().height
    return float(height * widest / (high - low))


def say_not_run(axes: Axes, what: str) -> None:
    """Say in an empty panel what is missing."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.spines[:].set(color="0.8", linestyle=(0, (4, 3)))
    axes.text(
        0.5,
        0.5,
        f"{what}: not run",
        transform=axes.transAxes,
        ha="center",
        va="center",
        color="0.4",
    )


def text_color(background: Any) -> str:
    """Black or white, whichever has the higher contrast with a colour, as WCAG 2 defines it."""
    rgb = np.array(to_rgb(background))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def layer_looks(layers: int) -> list[tuple[Any, str]]:
    """A colour and a marker for each layer; colours go from dark to light in equal steps."""
    colors = [colormaps["viridis"](0.85 * i / max(1, layers - 1)) for i in range(layers)]
    return list(zip(colors, itertools.cycle("osD^vPX*"), strict=False))
