"""The seven figures on made-up runs: what they show, that all of it is on the page, equal bytes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic_results import (
    LATER_VARIANTS,
    TRANSFORMER_VARIANTS,
    Effect,
    synthetic_results,
)

from ember_ext.paper.figures import (
    Drawing,
    draw_figures,
    figure_2_loss_curves,
    figure_3_entropy,
    figure_4_roles,
    figure_5_depth,
    figure_6_thresholds,
    figure_7_parameters,
    write_figures,
)
from ember_ext.paper.figures.style import (
    DOUBLE_COLUMN,
    LOOKS,
    MADE_FOR,
    SMALLEST_TEXT,
    rendered,
    text_color,
)
from ember_ext.paper.runs.finished import FinishedRuns
from ember_ext.paper.runs.results import RunResult
from ember_ext.paper.statistics.comparisons import MAIN_LOSS, best_loss, compare

EFFECTS = {
    "lif": Effect(loss=-0.01, since=1600, early=0.01, entropy=(1.0, 2.5), threshold=(0.02, 0.05))
}


def both(**options: Any) -> list[RunResult]:
    return synthetic_results(EFFECTS, **options) + synthetic_results(
        EFFECTS, backbone="cfc", **options
    )


SHAPES: dict[str, list[RunResult]] = {
    "three seeds": both(),
    "one seed": both(seeds=[42]),
    "six layers": synthetic_results(
        EFFECTS | {"lif": Effect(entropy=(0.03, 0.3, 3.5, 3.6, 2.0, 0.9))},
        variants=["standard", "lif"],
        seeds=range(4),
        n_layer=6,
        n_head=6,
    ),
    "later conditions": synthetic_results(
        EFFECTS, variants=(*TRANSFORMER_VARIANTS, *LATER_VARIANTS)
    ),
    "no Transformer": synthetic_results(backbone="cfc", variants=["standard", "lif"], seeds=[42]),
    "no LIF": synthetic_results(variants=["standard", "qwen-gate"], seeds=[42, 668]),
    "no Standard": synthetic_results(variants=["lif"], seeds=[1], steps=20, eval_interval=10),
    "nothing": [],
}


@functools.cache
def drawings_of(shape: str) -> list[Drawing]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return draw_figures(FinishedRuns(SHAPES[shape]))


@pytest.fixture(scope="module")
def finished() -> FinishedRuns:
    return FinishedRuns(SHAPES["three seeds"])


def texts(figure: Figure) -> Iterator[Text]:
    """Every text that is seen."""
    # An axis also keeps ticks that lie outside its limits.
    unseen: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            room = 1e-9 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - room <= tick.get_loc() <= high + room:
                    unseen |= {tick.label1, tick.label2}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_visible() and text.get_text() and text not in unseen:
            yield text


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_on_the_page_and_apart(shape: str) -> None:
    drawings = drawings_of(shape)
    assert [drawing.number for drawing in drawings] == [1, 2, 3, 4, 5, 6, 7]
    for drawing in drawings:
        seen = list(texts(drawing.figure))
        boxes = np.array([text.get_window_extent().extents for text in seen])
        low, high = boxes[:, :2], boxes[:, 2:]
        width, height = drawing.figure.bbox.size
        outside = (low < -1).any(1) | (high > [width + 1, height + 1]).any(1)
        assert not outside.any(), (drawing.stem, [str(seen[i]) for i in outside.nonzero()[0]])
        # Boxes that share more than a pixel's width and height lie on each other.
        shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        pairs = np.argwhere(np.triu((shared > 2).all(2), k=1))
        assert not pairs.size, (drawing.stem, [(str(seen[i]), str(seen[j])) for i, j in pairs])
        # The width that they say they are made for, and the text that they promise for it.
        assert drawing.figure.get_figwidth() == DOUBLE_COLUMN
        assert min(text.get_fontsize() for text in seen) >= SMALLEST_TEXT


@pytest.mark.parametrize(
    ("shape", "missing"),
    [
        ("three seeds", {}),
        ("one seed", {}),
        ("later conditions", {2: 2, 5: 1, 6: 2, 7: 2}),
        ("no Transformer", {2: 2, 3: 2, 4: 4, 5: 1, 6: 1, 7: 2}),
        ("no LIF", {2: 3, 3: 2, 4: 2, 5: 1, 6: 2, 7: 2}),
        ("no Standard", {2: 3, 3: 1, 4: 2, 5: 1, 6: 1, 7: 4}),
        ("nothing", {2: 4, 3: 2, 4: 4, 5: 2, 6: 2, 7: 4}),
    ],
)
def test_panels_say_what_was_not_run(shape: str, missing: dict[int, int]) -> None:
    counts = {d.number: words(d.figure).count("not run") for d in drawings_of(shape)}
    assert {number: count for number, count in counts.items() if count} == missing


@pytest.mark.parametrize("shape", ["three seeds", "six layers", "later conditions"])
def test_no_marker_of_figure_7_hides_another(shape: str) -> None:
    figure = figure_7_parameters(FinishedRuns(SHAPES[shape]))
    means = [line for line in figure.axes[0].lines if line.get_markersize() == 6]
    places = sorted(float(line.get_xdata()[0]) for line in means if line.get_label()[0] != "_")
    variants = {run.variant for run in SHAPES[shape] if run.backbone == "transformer"} - {"null"}
    assert len(places) == len(variants)
    assert min(np.diff(places)) > 0.11


def test_captions_name_the_runs() -> None:
    captions = {drawing.number: drawing.caption for drawing in drawings_of("three seeds")}
    assert captions[3].endswith("Runs: Transformer Standard × 3, LIF × 3.")
    assert "CfC Standard × 3, LIF × 3, Standard again × 3." in captions[2]
    assert "Transformer not run" in drawings_of("no Transformer")[2].caption


def test_loss_curves_and_crossovers(finished: FinishedRuns) -> None:
    figure = figure_2_loss_curves(finished)
    for column, backbone in enumerate(("transformer", "cfc")):
        losses, differences = figure.axes[column], figure.axes[2 + column]
        for variant in ("standard", "lif"):
            curves = [run.curve(MAIN_LOSS)[1] for run in finished.runs(backbone, variant)]
            color = LOOKS[variant].color
            drawn = [line.get_ydata() for line in losses.lines if line.get_color() == color]
            np.testing.assert_allclose(drawn, [*curves, np.mean(curves, axis=0)])
        lasting = next(
            line for line in differences.lines if line.get_label() == "ahead from here on"
        )
        assert list(lasting.get_xdata()) == [1600] * 3
        assert "ends ahead: 3 of 3" in words(figure)
        assert {c.get_label() for c in differences.collections} == {
            "null pairs: largest",
            "null pairs: RMS",
        }


def test_a_lost_lead_is_no_crossover() -> None:
    effects = {"lif": Effect(loss=0.01, since=1600, early=-0.01)}
    figure = figure_2_loss_curves(FinishedRuns(synthetic_results(effects, seeds=[42])))
    labels = [str(line.get_label()) for line in figure.axes[2].lines]
    assert "first lead, lost again" in labels
    assert "ahead from here on" not in labels
    assert "ends ahead: 0 of 1" in words(figure)


def test_every_triangle_is_whole() -> None:
    """Also before the losses that the axes are made for, and at the last step."""
    base, lif = synthetic_results(variants=["standard", "lif"], seeds=[42])
    for before, after in zip(base.evaluations, lif.evaluations, strict=True):
        ahead = {200: 0.5, 3000: 0.001}.get(before["step"], -0.001)
        after[MAIN_LOSS] = before[MAIN_LOSS] - ahead
    axes = figure_2_loss_curves(FinishedRuns([base, lif])).axes[2]
    triangles = {str(line.get_label()): line for line in axes.lines if line.get_marker() == "v"}
    for label, step, difference in (
        ("first lead, lost again", 200, -0.5),
        ("ahead from here on", 3000, -0.001),
    ):
        (x,), (y,) = triangles[label].get_data()
        assert (x, y) == (step, pytest.approx(difference))
        assert axes.get_ylim()[0] < y < axes.get_ylim()[1]
        assert not triangles[label].get_clip_on()


def test_variants_are_told_apart_without_colours(finished: FinishedRuns) -> None:
    for axes in figure_2_loss_curves(finished).axes[:2]:
        styles = {
            LOOKS[variant].color: {
                str(line.get_linestyle())
                for line in axes.lines
                if line.get_color() == LOOKS[variant].color
            }
            for variant in ("standard", "lif")
        }
        standard, lif = styles.values()
        assert len(standard) == len(lif) == 1
        assert standard != lif
    for axes in figure_4_roles(FinishedRuns(SHAPES["six layers"])).axes[2:4]:
        hatches = {bar.get_facecolor(): bar.get_hatch() for bar in axes.patches}
        assert len(hatches) == len(set(hatches.values())) == 4
    for axes in figure_6_thresholds(FinishedRuns(SHAPES["six layers"])).axes[:1]:
        legend = axes.get_legend()
        assert legend is not None
        markers = [line.get_marker() for line in legend.get_lines()]
        assert len(markers) == len(set(markers)) == 6


def test_captions_say_whether_a_noise_floor_is_known() -> None:
    def captions(results: list[RunResult]) -> list[str]:
        drawings = draw_figures(FinishedRuns(results))
        return [
            d.caption
            for d in drawings
            if "up to rounding" in d.caption or "by rounding" in d.caption
        ]

    assert len(captions(synthetic_results())) == 2
    assert all("Grey shows the RMS" in caption for caption in captions(synthetic_results()))
    without = captions(synthetic_results(variants=("standard", "lif")))
    assert len(without) == 2
    assert not any("Grey" in caption for caption in without)


@pytest.mark.parametrize(("noise", "unseen"), [(0.0004, 0), (1e-8, 2)])
def test_bands_that_are_too_thin_are_said_to_be(noise: float, unseen: int) -> None:
    effects = {v: Effect(noise=noise) for v in ("standard", "null")} | {"lif": Effect(loss=0.01)}
    finished = FinishedRuns(synthetic_results(effects, variants=["standard", "lif", "null"]))
    for draw in (figure_2_loss_curves, figure_7_parameters):
        assert words(draw(finished)).count("too thin to see") == unseen


def test_text_contrasts_with_what_it_stands_on() -> None:
    assert [text_color(c) for c in ("white", "#FFFF00", "black", "#0072B2")] == [
        "black",
        "black",
        "white",
        "white",
    ]
    # Teal in the middle of the colour map, of luminance .23: black has 5.6 : 1, white 3.7 : 1.
    assert text_color("#21918C") == "black"
    figure = figure_3_entropy(FinishedRuns(synthetic_results(variants=["standard"], seeds=[1])))
    by_value = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    colors = {float(value): color for value, color in by_value.items()}
    assert (colors[min(colors)], colors[max(colors)]) == ("white", "black")


def test_numbers_of_the_heatmap_fit_their_cells() -> None:
    written = {
        shape: {
            text.get_text() for text in figure_3_entropy(FinishedRuns(SHAPES[shape])).axes[1].texts
        }
        for shape in ("three seeds", "six layers")
    }
    assert all(len(text) == 4 for text in written["three seeds"])
    # With 24 heads in a row: two digits, and no 0 before the point.
    assert all(len(text) == 3 for text in written["six layers"])
    assert any(text.startswith(".0") for text in written["six layers"])
    assert any(text[1] == "." for text in written["six layers"])


def test_entropy_panels_hold_each_head_on_one_scale(finished: FinishedRuns) -> None:
    figure = figure_3_entropy(finished)
    runs = [
        run
        for pair in zip(
            *(finished.runs("transformer", v) for v in ("standard", "lif")), strict=True
        )
        for run in pair
    ]
    images = [axes.images[0] for axes in figure.axes if axes.images]
    for run, image in zip(runs, images, strict=True):
        expected = run.evaluations[-1]["attention_entropy"]
        np.testing.assert_array_equal(np.asarray(image.get_array()), expected)
        assert image.get_clim() == (0, pytest.approx(3.878, abs=1e-3))


def test_role_bars_hold_every_head(finished: FinishedRuns) -> None:
    figure = figure_4_roles(finished)
    for bars in figure.axes[2:4]:
        for layer in range(2):
            widths = [bar.get_width() for bar in bars.patches if round(bar.get_y() + 0.36) == layer]
            assert sum(widths) == pytest.approx(4)
    for scatter in figure.axes[:2]:
        points = [line for line in scatter.lines if line.get_marker() in "vDos"]
        assert sum(len(np.atleast_1d(line.get_xdata())) for line in points) == 3 * 2 * 4


def test_depth_compares_through_one_virtual_gate(finished: FinishedRuns) -> None:
    transformer, cfc = figure_5_depth(finished).axes
    labels = [text.get_text() for text in cfc.get_legend().get_texts()]
    assert labels == ["Standard, virtual gate", "LIF, own gate", "LIF, virtual gate"]
    lif = next(line for line in transformer.lines if line.get_label() == "LIF")
    expected = [
        np.mean(
            [
                run.evaluations[-1]["attention_entropy"][i]
                for run in finished.runs("transformer", "lif")
            ]
        )
        for i in range(2)
    ]
    np.testing.assert_allclose(lif.get_ydata(), expected)
    assert cfc.get_ylim()[0] == 0


def test_thresholds_keep_presets_apart(finished: FinishedRuns) -> None:
    figure = figure_6_thresholds(finished)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split("  ")[1] for title in titles] == [
        "Transformer, released preset",
        "CfC, released preset",
        "Transformer, text preset",
        "CfC, text preset",
    ]
    ends = {round(float(np.ravel(line.get_ydata())[-1]), 6) for line in figure.axes[0].lines}
    assert ends == {0.001, 0.02, 0.05}  # the start (dashed), and both layers


def test_losses_stand_at_their_parameters(finished: FinishedRuns) -> None:
    figure = figure_7_parameters(finished)
    losses, differences = figure.axes[0], figure.axes[2]
    places = {}
    for line in losses.lines:
        if str(line.get_label()) in {look.label for look in LOOKS.values()}:
            places[line.get_label()] = (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
    assert places["LIF-refractory"][0] == pytest.approx(np.log10(40))
    assert places["Qwen-gate"][0] == pytest.approx(np.log10(2 * 128**2))
    assert places["Standard"][0] < places["LIF-fixed"][0] < 1 < places["LIF"][0]
    mean = np.mean([best_loss(run) for run in finished.runs("transformer", "lif")])
    assert places["LIF"][1] == pytest.approx(mean)
    comparison = compare(finished, "transformer", "lif")
    assert comparison is not None
    assert comparison.t_interval is not None
    intervals = [line.get_ydata() for line in differences.lines if len(line.get_xdata()) == 2]
    expected = 100 * np.array(comparison.t_interval) / comparison.base.mean
    assert any(np.allclose(interval, expected) for interval in intervals)


def test_files_are_equal_for_equal_runs(tmp_path: Path) -> None:
    def write(folder: Path) -> list[Path]:
        drawing = Drawing(
            5, "depth", "", "", figure_5_depth(FinishedRuns(SHAPES["no Transformer"]))
        )
        (folder / "depth.svg").write_bytes(rendered(drawing.figure, "svg"))
        return [*write_figures(folder, [drawing]), folder / "depth.svg"]

    for name in "ab":
        (tmp_path / name).mkdir()
    first = write(tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "pdf.fonttype": 3}):
        second = write(tmp_path / "b")
    assert [path.name for path in first] == ["depth.pdf", "depth.png", "depth.svg"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    pdf = first[0].read_bytes()
    assert b"/FontFile2" in pdf
    assert b"CreationDate" not in pdf
    assert b"<dc:date>" not in first[2].read_bytes()
    for path in first[1:]:
        assert MADE_FOR.encode() in path.read_bytes()
