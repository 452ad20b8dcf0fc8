"""The reader of `bench/results`, and that pages have no measurement typed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import measurements  # noqa: E402

WIRED = "config=wired [64, 256, 128] -> 192; mode=forward"


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.0357, "35.7 µs"),
        (0.943, "943 µs"),
        (0.9996, "1.00 ms"),
        (1, "1.00 ms"),
        (29.844, "29.8 ms"),
        (999.6, "1.00 s"),
        (7323.6, "7.32 s"),
        (123456, "123 s"),
    ],
)
def test_durations_have_three_digits_and_a_unit(milliseconds: float, text: str) -> None:
    assert measurements.duration(milliseconds) == text


def test_factors_and_shares() -> None:
    assert [measurements.factor(ratio) for ratio in (1.04, 8.896, 9.96, 93.7)] == [
        "1.0x",
        "8.9x",
        "10x",
        "94x",
    ]
    assert measurements.share(0.906) == "91 %"


def test_a_row_is_found_by_its_conditions() -> None:
    row = measurements.find("cfc.csv", f"{WIRED}; contender=ncps")
    assert row["config"] == "wired [64, 256, 128] -> 192"
    assert measurements.machine(row) == f"{row['device']}, {row['threads']} threads"
    some = measurements.select(measurements.read("cfc.csv"), f"{WIRED}; contender~ember_ext")
    assert some
    assert all(row["contender"].startswith("ember_ext") for row in some)
    others = measurements.select(measurements.read("cfc.csv"), f"{WIRED}; contender!~ember_ext")
    assert {row["contender"] for row in others} >= {"ncps"}
    assert not any(row["contender"].startswith("ember_ext") for row in others)


def test_a_value_may_contain_the_signs_of_conditions() -> None:
    row = measurements.find(
        "attention.csv", "config=[64, 6, 256, 64] dropout=0.0; mode=forward; contender=ember_ext"
    )
    assert row["mode"] == "forward"


def test_conditions_that_fit_several_rows_or_none_are_errors() -> None:
    with pytest.raises(LookupError, match=r"cfc.csv has \d+ rows with 'mode=forward', expected 1"):
        measurements.find("cfc.csv", "mode=forward")
    with pytest.raises(LookupError, match="has 0 rows"):
        measurements.find("cfc.csv", "mode=sideways")
    with pytest.raises(ValueError, match="'forward' is none of column=, column~ and column!~"):
        measurements.find("cfc.csv", "forward")
    with pytest.raises(KeyError, match="color"):
        measurements.find("cfc.csv", "color=red")


@pytest.mark.parametrize(
    "path",
    [path for path in measurements.RESULTS.rglob("*.csv") if "instruction" not in path.name],
    ids=lambda path: path.relative_to(measurements.RESULTS).as_posix(),
)
def test_every_measurement_names_its_machine(path: Path) -> None:
    rows = measurements.read(path.relative_to(measurements.RESULTS).as_posix())
    assert rows
    if path.parent.name != "h200":  # a folder of one machine
        assert all(measurements.machine(row) for row in rows)


@pytest.mark.parametrize("page", ["speed.md", "paper.md", "mathematics/attention.md"])
def test_pages_take_measurements_from_the_files(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    typed = re.findall(r"\b\d[\d.]*(?: ?(?:ms|µs|ns|MB|GB|GFLOP/s|GB/s)|x)\b", text)
    assert not typed, f"docs/{page} has measurements that nothing holds to bench/results: {typed}"
