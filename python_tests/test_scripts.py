"""The command lines of scripts/: flags, files, exit codes and messages."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ember_ext.paper.data import sources
from ember_ext.paper.reproduce import reproduce_main
from ember_ext.paper.training.cli import sample_main, train_main

pytestmark = pytest.mark.usefixtures("no_pictures")

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
    path.write_bytes((ROOT / "ember_ext" / "paper" / "data" / "lighthouse.txt").read_bytes())
    return path


@pytest.fixture(scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    text = ROOT / "ember_ext" / "paper" / "data" / "lighthouse.txt"
    assert train_main([*SIZES, "--data", str(text), "--steps", "1", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(_trained: Path, text: Path) -> Path:
    """The folder of a finished run, `run` in the working folder."""
    return Path(shutil.copytree(_trained, "run"))


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


def test_a_liquid_time_constant_model_trains_resumes_and_samples(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [*SIZES, "--backbone", "cfc", "--cell", "ltc", "--cfc-units", "20"]
    assert train_main([*sizes, "--data", "text.txt", "--steps", "1", "--out", "run"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["cell"] == "ltc"
    capsys.readouterr()
    assert sample_main(["run", "--prompt", "Keeper:", "--length", "5"]) == 0
    assert capsys.readouterr().out.startswith("Keeper:")
    assert train_main(["--resume", "run", "--steps", "2", "--cell", "cfc"]) == 1
    assert "cell is 'ltc' there and 'cfc' here" in capsys.readouterr().err
    assert train_main(["--resume", "run"]) == 0
    # A run of a version that knew no other cell.
    assert train_main([*SIZES, "--data", "text.txt", "--steps", "1", "--out", "old"]) == 0
    config = json.loads(Path("old/config.json").read_text())
    del config["cell"]
    Path("old/config.json").write_text(json.dumps(config))
    assert train_main(["--resume", "old"]) == 0


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
        *(
            ([flag, ""], f"{flag} must not be empty, got ''")
            for flag in (
                *("--out", "--data", "--config", "--resume", "--device", "--steps", "--backbone"),
            )
        ),
        (["--out="], "--out must not be empty, got ''"),
        (["--n-embd", "99999999999"], "n_embd must be at most 2147483647, got 99999999999"),
        (["--n-layer", "-1"], "n_layer must be at least 1, got -1"),
        (["--n-embd", "2147483646"], "a model of .*n_embd 2147483646.* must fit the memory, got"),
        (["--learning-rate", "nan"], "learning_rate must be a finite number, got nan"),
        (["--checkpoint-seconds", "-1"], "checkpoint_seconds must be at least 0, got -1"),
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


def test_too_little_memory_is_one_clear_line(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ember_ext.paper.training.cli.train", lambda *_, **__: torch.empty(2**50))
    assert train_main([*SIZES, "--data", "text.txt"]) == 1
    assert re.match("error: out of memory: .*smaller --batch-size", capsys.readouterr().err)


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


def test_sample_errors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample_main(["nowhere"]) == 1
    assert "holds no run" in capsys.readouterr().err
    capsys.readouterr()
    assert sample_main(["run", "--prompt", "é"]) == 1
    output = capsys.readouterr()
    assert "not in the vocabulary: 'é'" in output.err
    assert output.out == ""
    assert sample_main(["run", "--prompt", "the", "--length", "0"]) == 0
    assert capsys.readouterr().out == "the\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["run", "--seed", "99999999999999999999"], r"--seed must be from -2\*\*63 to 2\*\*64 - 1"),
        (["run", "--seed", str(-(2**63) - 1)], "--seed must be .*, got -9223372036854775809"),
        (["run", "--length", "-1"], "--length must be finite and at least 0, got -1"),
        (["run", "--temperature", "nan"], "--temperature must be finite and at least 0, got nan"),
        (["run", "--temperature", "inf"], "--temperature must be finite and at least 0, got inf"),
        (["run", "--top-k", "0"], "--top-k must be finite and at least 1, got 0"),
        (["run", "--prompt", ""], "--prompt must not be empty"),
        ([""], "an argument must not be empty"),
    ],
)
def test_sample_looks_at_its_flags_first(
    text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert not Path("run").exists()
    assert sample_main(flags) == 1
    assert re.match(f"error: {message}", capsys.readouterr().err)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_sample_takes_every_seed_of_torch(run: Path, seed: int) -> None:
    assert sample_main(["run", "--seed", str(seed), "--length", "3"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", ""], "--out must not be empty"),
        (["--data", ""], "--data must not be empty"),
        (["--conditions", ""], "--conditions must not be empty"),
        (["--jobs", "0"], "--jobs must be finite and at least 1, got 0"),
        (["--seeds", "1", "2", "1"], "--seeds must be without repeats, got 1 more than once"),
        (["--slurm", "a=1"], "slurm options need --executor slurm"),
        (["--executor", "slurm", "--slurm", "=1"], "--slurm must be NAME=VALUE, got '=1'"),
        (["--executor", "slurm", "--slurm", "a"], "--slurm must be NAME=VALUE, got 'a'"),
        (["--conditions", "liff"], "variant must be one of"),
    ],
)
def test_reproduce_looks_at_its_flags_first(
    text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert reproduce_main(flags) == 1
    assert re.match(f"error: {message}", capsys.readouterr().err)
    assert not Path("runs").exists()


BENCHES = (
    "attention_bench",
    "cfc_bench",
    "gate_bench",
    "kernel_times",
    "ltc_bench",
    "train_profile",
)


def run_script(
    script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("bench", "flags", "message"),
    [
        (
            "attention_bench",
            ["--seconds", "nan"],
            "--seconds must be finite and at least 0, got na",
        ),
        ("attention_bench", ["--tokens", "128", "7"], "--tokens must be one of 128, .*, got 7"),
        ("cfc_bench", ["--seconds", "-1"], "--seconds must be finite and at least 0, got -1"),
        ("gate_bench", ["--seconds", "inf"], "--seconds must be finite and at least 0, got inf"),
        ("gate_bench", ["--out", ""], "--out must not be empty, got ''"),
        ("kernel_times", ["--scale", "0"], "--scale must be from 1 to 64, got 0"),
        ("kernel_times", ["--shown", "-2"], "--shown must be finite and at least 1, got -2"),
        ("train_profile", ["--steps", "0"], "--steps must be finite and at least 1, got 0"),
    ],
)
def test_benches_look_at_their_flags_first(
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bench: str,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [bench, *flags])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        runpy.run_path(str(ROOT / "bench" / f"{bench}.py"), run_name="__main__")
    assert not Path("bench").exists()


def test_a_terminal_that_knows_ascii_only(text: Path) -> None:
    """Training ends well, and what the terminal cannot show is escaped."""
    terminal = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    text.write_text("Où êtes-vous, gardien?\n" * 60, encoding="utf-8")
    flags = [*SIZES, "--data", "text.txt", "--steps", "2", "--out", "rün"]
    result = run_script("scripts/train.py", *flags, **terminal)
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    assert b"\\" in result.stdout
    assert json.loads(Path("rün/summary.json").read_text())["steps"] == 2
    result = run_script("scripts/sample.py", "rün", "--prompt", "gardien", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode("ascii").startswith("gardien")


def test_other_command_lines_on_an_ascii_terminal(text: Path) -> None:
    """All of them prepare their output; a path stands for what they print."""
    for script in ("scripts/reproduce.py", *(f"bench/{bench}.py" for bench in BENCHES)):
        source = (ROOT / script).read_text(encoding="utf-8")
        assert "reproduce_main" in source or "parse_options(" in source
    result = run_script("scripts/reproduce.py", "--data", "dé.txt", PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert rb"d\xe9.txt: No such file" in result.stderr
    result = run_script("scripts/cuda_report.py", PATH="", PYTHONIOENCODING="ascii")
    assert result.stderr == b"error: nvcc is not on the path\n"


def test_a_reader_that_leaves_early_is_no_error(run: Path) -> None:
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


def run_two_processes(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / "scripts" / "train.py"), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_processes_that_cannot_have_the_folder_all_say_why(run: Path) -> None:
    """The first of them alone tries, and the others do not end in a torn connection."""
    flags = [*SIZES, *["--data", "text.txt", "--steps", "6", "--out", "run"]]
    result = run_two_processes(*flags)
    assert result.returncode != 0
    assert result.stderr.count("error: run holds a run already") == 2
    assert "gloo" not in result.stderr


def test_two_processes_train_like_one(text: Path) -> None:
    """Without dropout, halves of a batch in two processes give the whole batch's loss curve."""
    flags = [*SIZES, *["--data", "text.txt", "--steps", "6", "--dropout", "0"]]
    assert train_main([*flags, "--out", "one"]) == 0
    result = run_two_processes(*flags, "--out", "two")
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
