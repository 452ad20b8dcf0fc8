"""scripts/gpu_check.py goes on after parts that fail or hang, and says how each of them ended."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

import gpu_check


def python(code: str, name: str, limit: float = 30.0) -> gpu_check.Part:
    return gpu_check.Part(name, [sys.executable, "-c", code], limit)


def test_every_part_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs = "import os, time; os.fork(); time.sleep(60)"
    todo = [
        python("import sys; print('half'); sys.exit(3)", "fails"),
        python(f"print('begins', flush=True); {hangs}", "hangs", 1.0),
        gpu_check.Part("missing", ["no-such-program"], 30.0),
        python("print('all well'); print('───')", "works"),
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda *_: todo)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["result"]) for row in rows] == [
        ("fails", "failed"),
        ("hangs", "timed out"),
        ("missing", "failed"),
        ("works", "passed"),
    ]
    assert [row["last_line"] for row in rows][::3] == ["half", "all well"]
    assert "no-such-program" in rows[2]["last_line"]
    assert (tmp_path / "out" / "hangs.log").read_text() == "begins\n"
    assert "1 of 4 parts passed" in capsys.readouterr().out
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--only", "works"]) == 0


def test_two_runs_fit_into_fifteen_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--dry-run", "--out", "anywhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" (")[0] for line in lines[:-1]]
    assert names[1:4] == ["tests", "memcheck", "racecheck"]
    assert {"kernel_times", "attention", "gate", "cfc"} <= set(names)
    assert sum(part.limit for part in gpu_check.parts("cuda", Path("anywhere"))) <= 7 * 60
    assert not Path("anywhere").exists()


def test_wrong_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--only", "attenton"]) == 2
    assert "--only must be one of environment, tests" in capsys.readouterr().err
    assert gpu_check.main(["--minutes", "0"]) == 2
    assert "--minutes must be finite and at least 1" in capsys.readouterr().err
