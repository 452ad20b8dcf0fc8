"""Tests and times everything that needs a GPU, within the minutes for which one is lent.

    python scripts/gpu_check.py --out gpu-results             # all parts, 7 minutes at most
    python scripts/gpu_check.py --only tests --only memcheck
    python scripts/gpu_check.py --dry-run                     # says what would run
    python scripts/gpu_check.py --device cpu --out rehearsal  # the same parts, tiny, without a GPU

The package must be installed with its CUDA kernels. `CUDAARCHS=90 pip install .` builds them for
one architecture only. Each part is a program of its own with a limit of its own, so one that fails
or hangs costs the others nothing. What the parts print goes into a .log file each, and the tables
and pictures of the benches into folders beside these. summary.csv is written anew after each part.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ember_ext._command_line import FlagError, at_least, prepare_output, refuse_empty, require

ROOT = Path(__file__).resolve().parents[1]

SANITIZED = (
    "test_every_size_of_team or test_scores_in_registers or test_several_tiles "
    "or test_networks_of_any_size or test_wide_and_deep_cells"
)
"""A test or two of each operator, which between them take all ways through its kernels."""


@dataclass(frozen=True)
class Part:
    """A program to run.

    Attributes:
        name: of the part and of its log.
        command: with arguments.
        limit: how long it may take, in seconds.
    """

    name: str
    command: Sequence[str]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed", "timed out" or "skipped", and its last line."""

    part: str
    result: str
    seconds: float
    last_line: str


def sanitizer() -> str:
    """The path of compute-sanitizer, or its name alone where it cannot be found."""
    found = shutil.which("compute-sanitizer")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        place = Path(os.environ.get(variable) or "/usr/local/cuda") / "bin" / "compute-sanitizer"
        if found is None and place.exists():
            found = str(place)
    return found or "compute-sanitizer"


def parts(device: str, out: Path) -> list[Part]:
    """All parts in their order; on a CPU they show no more than that they run."""
    python, on_gpu = sys.executable, device.startswith("cuda")
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    files = sorted(str(file) for file in (ROOT / "python_tests").glob("test_cuda_*.py"))
    check = [sanitizer(), "--error-exitcode", "99", "--tool"]
    chosen = [*pytest, "-x", "-n", "0", "-k", SANITIZED, *files]
    on = ["--device", device]

    def bench(name: str, *flags: str) -> list[str]:
        folder = out / "-".join([name, *(flag for flag in flags if flag == "bfloat16")])
        return [python, str(ROOT / "bench" / f"{name}.py"), *on, *flags, "--out", str(folder)]

    if not on_gpu:
        tiny = ["--seconds", "0.01", "--no-compiled"]
        return [
            Part("tests", [*pytest, "--collect-only", *files], 240),
            Part("kernel_times", bench("kernel_times", "--scale", "64"), 240),
            Part(
                "attention", bench("attention_bench", "--tokens", "128", "--no-memory", *tiny), 240
            ),
            Part("gate", bench("gate_bench", "--sizes", "small", *tiny), 240),
        ]
    attention = ["--tokens", "256", "4096", "--seconds", "1", "--no-compiled"]
    return [
        Part("environment", [python, "-m", "ember_ext"], 60),
        Part("tests", [*pytest, str(ROOT / "python_tests")], 120),
        Part("memcheck", [*check, "memcheck", *chosen], 45),
        Part("racecheck", [*check, "racecheck", *chosen], 45),
        Part("kernel_times", bench("kernel_times"), 45),
        Part("attention", bench("attention_bench", *attention), 30),
        Part("attention bf16", bench("attention_bench", *attention, "--dtype", "bfloat16"), 30),
        Part("gate", bench("gate_bench", "--sizes", "huge", "--seconds", "0.3"), 25),
        Part("cfc", bench("cfc_bench", "--what", "layer", "--seconds", "1", "--no-compare"), 20),
    ]


def run(part: Part, out: Path) -> Outcome:
    """Run a part to its end or its limit, with what it prints in a file."""
    log = out / f"{part.name.replace(' ', '-')}.log"
    start = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                part.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(part.name, "failed", 0.0, str(error))
        try:
            code = process.wait(part.limit)
            result = "passed" if code == 0 else "failed"
        except BaseException as error:
            # The part's own children as well, which would keep the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            result = "timed out"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    printed = [line.strip() for line in lines if re.search(r"\w", line)]
    seconds = round(time.monotonic() - start, 1)
    return Outcome(part.name, result, seconds, printed[-1] if printed else "")


def write_summary(outcomes: Sequence[Outcome], out: Path) -> None:
    """Write what is known so far."""
    with (out / "summary.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)])
        writer.writeheader()
        writer.writerows(asdict(outcome) for outcome in outcomes)


def main(arguments: Sequence[str]) -> int:
    """Run the parts one after the other, and return 1 if one of them has not passed."""
    prepare_output()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", help="a part; may be repeated (default: all)")
    parser.add_argument(
        "--minutes", type=float, help="limit of all parts (default: 7, and 16 without a GPU)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    try:
        refuse_empty(arguments)
        options = parser.parse_args(arguments)
        require("--minutes", options.minutes, at_least(1))
        out = options.out.absolute()
        todo = parts(options.device, out)
        names = [part.name for part in todo]
        for name in options.only or ():
            if name not in names:
                raise FlagError(f"--only must be one of {', '.join(names)}, got {name}")
    except FlagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    todo = [part for part in todo if not options.only or part.name in options.only]
    if options.dry_run:
        for part in todo:
            print(f"{part.name} ({part.limit:.0f} s): {' '.join(part.command)}")
        print(f"all: {sum(part.limit for part in todo):.0f} s at most")
        return 0

    out.mkdir(parents=True, exist_ok=True)
    minutes = options.minutes or (7.0 if options.device.startswith("cuda") else 16.0)
    end = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for part in todo:
        left = end - time.monotonic()
        if left < 5:
            outcome = Outcome(part.name, "skipped", 0.0, "no time left")
        else:
            outcome = run(Part(part.name, part.command, min(part.limit, left)), out)
        outcomes.append(outcome)
        write_summary(outcomes, out)
        print(
            f"{outcome.part:16} {outcome.result:10} {outcome.seconds:6.1f} s  {outcome.last_line}",
            flush=True,
        )
    passed = sum(outcome.result == "passed" for outcome in outcomes)
    print(f"{passed} of {len(outcomes)} parts passed; {out}")
    return int(passed < len(outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
