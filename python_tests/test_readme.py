"""The README says what was measured and judged, and is short enough to be read."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def comparisons() -> tuple[Any, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        import picture
    return tuple(picture.COMPARISONS)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_its_table_has_the_numbers_of_the_measurements(comparisons: tuple[Any, ...]) -> None:
    import measurements

    for comparison in comparisons:
        times = [
            f"{measurements.duration(comparison.milliseconds(contender))}, {name}"
            for name, contender in comparison.before
        ]
        ours = measurements.duration(comparison.milliseconds(comparison.ours))
        gains = [comparison.gain(contender) for _, contender in comparison.before]
        line = f"| {comparison.title}, {comparison.size} | {'; '.join(times)} | {ours} | "
        line += f"{'; '.join(gains)} |"
        assert line in README.replace("`torch.compile`", "torch.compile").splitlines()


def test_it_names_the_machines_of_the_measurements(comparisons: tuple[Any, ...]) -> None:
    devices = [comparison.row(comparison.ours)["device"] for comparison in comparisons]
    assert devices == ["Intel(R) Xeon(R) Processor", "AMD EPYC", "AMD EPYC"]
    assert "The LTC was timed on an Intel Xeon, the others on an AMD EPYC." in README
    assert {comparison.row(comparison.ours)["threads"] for comparison in comparisons} == {"2"}


def test_its_picture_is_drawn_from_the_measurements(comparisons: tuple[Any, ...]) -> None:
    from matplotlib import pyplot as plt

    import picture

    for dark in (False, True):
        figure = picture.picture(dark)
        for comparison, axis in zip(comparisons, figure.axes, strict=True):
            bars = [*(contender for _, contender in comparison.before), comparison.ours]
            assert axis.get_xlim()[0] == 0
            assert [bar.get_width() for bar in axis.patches] == [
                comparison.milliseconds(bar) for bar in bars
            ]
            gain = f"{comparison.gain(bars[0])} as fast"
            assert [text.get_text() for text in axis.texts if gain in text.get_text()]
        plt.close(figure)


def test_it_says_how_many_claims_hold() -> None:
    numbers = json.loads((ROOT / "bench/results/xs/numbers.json").read_text(encoding="utf-8"))
    verdicts = Counter(claim["verdict"] for claim in numbers["claims"])
    assert " ".join(README.split()).count(
        f"Of {len(numbers['claims'])} claims, {verdicts['supported']} are supported, "
        f"{verdicts['not supported']} are not, and {verdicts['not testable at this scale']} cannot "
        "be tested"
    ) == 1  # fmt: skip


def test_its_counts_of_instructions_are_those_of_the_files() -> None:
    import measurements

    def instructions(file: str, where: str) -> float:
        rows = measurements.select(measurements.read(file), where)
        assert len(rows) == 3
        return sum(float(row["instructions"]) for row in rows)

    shape = "shape=attention [64, 6, 256, 64], causal; kernel~bfloat16; kernel!~refractory"
    now = instructions("kernel_instructions.csv", f"{shape}; gpu~H200; kernel~_half_")
    before = instructions("h200/kernel_instructions.csv", shape)
    text = " ".join(README.split())
    assert f"{now:.0f} instructions a score, where the kernels that ran issued {before:.0f}" in text


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r'\]\(([^)#]+)|(?:src|srcset)="([^"]+)"', README)
    files = [link or source for link, source in links]
    files = [file for file in files if not file.startswith("https://")]
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file).exists()] == []
