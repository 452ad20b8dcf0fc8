"""The examples in scripts/examples run, and print what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "scripts" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    assert f"python scripts/examples/{path.name}\n" in path.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(path), "--updates", "2"])
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    for kind in ("CfC", "LTC"):
        assert any(line.startswith(kind) for line in lines)
    if path.stem == "sine":
        losses = [line.split()[-2:] for line in lines if "loss" in line]
        assert len(losses) == 2
        for ncps, accelerated in losses:
            assert float(accelerated) == pytest.approx(float(ncps), rel=1e-3)
