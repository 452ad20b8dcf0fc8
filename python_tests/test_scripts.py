"""The command lines of scripts/: flags, files, exit codes and messages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ember_ext.data import sources
from ember_ext.training.cli import sample_main, train_main

ROOT = Path(__file__).parents[1]
SIZES = [
    *("--backbone", "transformer", "--device", "cpu", "--n-layer", "1", "--n-embd", "16"),
    *("--n-head", "2", "--block-size", "16", "--batch-size", "4", "--eval-iters", "1"),
    *("--eval-interval", "4", "--sample-length", "30"),
]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text file, in a folder that is the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_bytes((ROOT / "ember_ext" / "data" / "lighthouse.txt").read_bytes())
    return path


def test_train_resume_and_sample(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([*SIZES, "--data", "text.txt", "--steps", "4"]) == 0
    folder = Path("runs/transformer-lif-quick-seed0")
    output = capsys.readouterr().out
    assert re.search(r"step 4/4  loss \d\.\d+  [\d,]+ tokens/s  0 min 0 s left", output)
    assert re.search(r"val loss +\d\.\d{4} nats per character", output)
    assert str(folder / "loss.png") in output
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4

    assert sample_main([str(folder), "--prompt", "Keeper:", "--length", "9", "--seed", "1"]) == 0
    sample = capsys.readouterr().out
    assert sample.startswith("Keeper:")
    assert len(sample) == len("Keeper:") + 9 + 1

    # A second run of the same command does not touch the first.
    assert train_main([*SIZES, "--data", "text.txt", "--max-iters", "1"]) == 0
    assert Path("runs/transformer-lif-quick-seed0-2/summary.json").exists()


def test_flags_come_before_the_file_and_the_file_before_the_preset(text: Path) -> None:
    Path("mine.json").write_text('{"steps": 1, "seed": 3, "learning_rate": 0.5}')
    flags = ["--data", "text.txt", "--config", "mine.json", "--seed", "4", "--out", "r"]
    assert train_main([*SIZES, *flags]) == 0
    config = json.loads(Path("r/config.json").read_text())
    assert (config["steps"], config["seed"], config["learning_rate"]) == (1, 4, 0.5)
    assert config["warmup_steps"] == 50


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.txt"], "cannot read --data .*nowhere.txt: No such file"),
        (["--data", "text.txt", "--block-size", "5000"], "needs a training text of more"),
        (["--data", "text.txt", "--steps", "0"], "steps must be at least 1"),
        (["--data", "text.txt", "--n-head", "3"], "n_head must be a divisor of n_embd = 16"),
        (["--data", "text.txt", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["--config", "nowhere.json"], "cannot read nowhere.json"),
        (["--resume", "nowhere"], "nowhere holds no run"),
        (["--data", "text.txt", "--out", "text.txt"], "cannot write text.txt"),
    ],
)
def test_errors_are_one_clear_line(
    text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert train_main([*SIZES, *flags]) == 1
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--backbone", "rnn"], ["--preset", "huge"], ["--condition", "x"], ["--speed", "1"]]
)
def test_unknown_flag_values(
    text: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train_main(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_resuming_as_something_else_names_the_fields(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*SIZES, *["--data", "text.txt", "--steps", "1", "--out", "run"]]) == 0
    assert train_main(["--resume", "run", "--n-embd", "32"]) == 1
    assert "another configuration: n_embd is 16 there and 32 here" in capsys.readouterr().err
    assert train_main([*SIZES, *["--data", "text.txt", "--steps", "1", "--out", "run"]]) == 1
    assert "continue it with --resume run" in capsys.readouterr().err
    assert train_main(["--resume", "run"]) == 0
    for flag, value in (("--preset", "quick"), ("--config", "nowhere.json")):
        assert train_main(["--resume", "run", flag, value]) == 1
        assert f"the run's own configuration: leave {flag} away" in capsys.readouterr().err


def test_no_text_anywhere(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable() -> bytes:
        raise sources.SourceError("out of reach")

    monkeypatch.setenv("EMBER_EXT_CACHE", str(text.parent / "cache"))
    monkeypatch.setattr(sources, "fetch_tiny", unreachable)
    monkeypatch.setattr(sources, "fetch_plays", unreachable)
    assert train_main(SIZES) == 1
    assert "--data PATH" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_sample_errors(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample_main(["nowhere"]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert train_main([*SIZES, *["--data", "text.txt", "--steps", "1", "--out", "run"]]) == 0
    capsys.readouterr()
    assert sample_main(["run", "--prompt", "é"]) == 1
    output = capsys.readouterr()
    assert "not in the vocabulary: 'é'" in output.err
    assert output.out == ""
    assert sample_main(["run", "--prompt", "the", "--length", "0"]) == 0
    assert capsys.readouterr().out == "the\n"
    assert sample_main(["run", "--temperature", "-1"]) == 1
    assert "temperature" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(text: Path) -> None:
    assert train_main([*SIZES, *["--data", "text.txt", "--steps", "1", "--out", "run"]]) == 0
    script = [sys.executable, str(ROOT / "scripts" / "sample.py"), "run", "--length", "4000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_script_stopped_by_a_signal(text: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *SIZES]
    process = subprocess.Popen(
        [*command, *["--data", "text.txt", "--steps", "1000000", "--out", "run"]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 128 + number
    assert "continue with: python scripts/train.py --resume run" in rest
    assert Path("run/last.safetensors").exists()


def test_two_processes_train_like_one(text: Path) -> None:
    """Without dropout, halves of a batch in two processes give the whole batch's loss curve."""
    flags = [*SIZES, *["--data", "text.txt", "--steps", "6", "--dropout", "0"]]
    assert train_main([*flags, "--out", "one"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(ROOT / "scripts" / "train.py"), *flags, "--out", "two"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("run folder two\n") == 1
    one, two = (
        [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert [record["event"] for record in one] == [record["event"] for record in two]
    for alone, together in zip(one, two, strict=True):
        key = "loss" if alone["event"] == "step" else "val_loss"
        assert together[key] == pytest.approx(alone[key], rel=1e-5)
