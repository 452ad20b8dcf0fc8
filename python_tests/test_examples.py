"""The examples in scripts/examples run, and print what they promise."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "scripts" / "examples").glob("*.py"))
SHORT = {"streaming": ["--steps", "20"]}
"""The flags that make an example short, for those that take no --updates."""


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)  # examples set them as a script may


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert f"python scripts/examples/{path.name}\n" in text.split('"""')[1]
    if path.stem == "policy" and importlib.util.find_spec("gymnasium") is None:
        pytest.skip("no gymnasium")
    monkeypatch.chdir(tmp_path)  # pictures are saved there
    run(path, monkeypatch, *SHORT.get(path.stem, ["--updates", "2"]))
    CHECKS[path.stem](capsys.readouterr().out.splitlines())


def check_sine(lines: list[str]) -> None:
    assert {line.split(",")[0] for line in lines[1:]} == {"CfC", "LTC"}
    losses = [line.split()[-2:] for line in lines if "loss" in line]
    assert len(losses) == 2
    for ncps, accelerated in losses:
        assert float(accelerated) == pytest.approx(float(ncps), rel=1e-3)


def check_irregular(lines: list[str]) -> None:
    assert [line.split(":")[0] for line in lines] == ["CfC", "LTC"]


def check_streaming(lines: list[str]) -> None:
    assert [line.split()[0] for line in lines[1:]] == ["ncps", "step", "streamer"]
    for line in lines[1:]:
        marks = [float(mark) for mark in line.split()[1:]]
        assert marks == sorted(marks)
    assert Path("streaming.png").stat().st_size > 1000


def check_attention(lines: list[str]) -> None:
    shares = [line.rpartition("update")[2] for line in lines if "right" in line]
    assert len(shares) == 2
    assert shares[0] == shares[1]  # before the first step the gates hardly matter
    assert lines[-1].startswith("thresholds")


def check_policy(lines: list[str]) -> None:
    steps = [int(line.split()[-4]) for line in lines]
    assert len(steps) == 3
    assert all(0 < count < 100 for count in steps)


CHECKS = {path.stem: globals()[f"check_{path.stem}"] for path in EXAMPLES}
