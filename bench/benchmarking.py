"""Shared by the scripts in `bench/`: timing, the machine's limits, tables and CSV rows.

A script makes `Case`s; `run_cases` first holds our results to the exact ones, then times the
contenders of the case in turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ember_ext
from ember_ext import _native
from ember_ext._command_line import Expectation, FlagError, prepare_output, refuse_empty, require
from ember_ext._machine import machine, processor

Call = Callable[[], object]
Options = TypeVar("Options")


@dataclass(frozen=True)
class Case:
    """One configuration that several contenders compute.

    Attributes:
        config: what is computed, for the table.
        mode: "forward" or "forward+backward".
        contenders: by name; the first is the baseline of the speed-up.
        verify: raises AssertionError if ours is wrong; returns the largest error of each contender
            that computes the same, relative to the largest entry of the exact result.
        gigabytes: of memory traffic that the work cannot do without, or 0.
        gigaflops: of arithmetic that the work cannot do without, or 0.
        dtype: of that arithmetic.
        factors: what to multiply the times of some contenders by, which do a part of the work only.
    """

    config: str
    mode: str
    contenders: dict[str, Call]
    verify: Callable[[], dict[str, float]]
    gigabytes: float = 0.0
    gigaflops: float = 0.0
    dtype: torch.dtype = torch.float32
    factors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table and of the CSV file. Times are in milliseconds."""

    op: str
    config: str
    mode: str
    contender: str
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float
    error: float
    rate: float
    rate_unit: str
    limit_share: float
    device: str
    threads: int
    isa: str
    torch: str
    ember_ext: str
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat("T", "seconds"))


class Clock:
    """Times calls on the CPU."""

    def seconds(self, call: Call) -> float:
        """The time of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class EventClock(Clock):
    """Times calls on a CUDA device, by events on its current stream.

    What is measured is the time from the first kernel to the last, waits for the host between them
    included. The host hands all of a call over before it waits.

    Args:
        cuda: `torch.cuda`, or what stands in for it.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda

    def seconds(self, call: Call) -> float:
        """The time of one call on the device."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return EventClock() if device.type == "cuda" else Clock()


def parse_options(kind: type[Options], description: str | None, **expected: Expectation) -> Options:
    """The options of a script from its command line.

    Args:
        kind: a dataclass.
        description: what `--help` opens with.
        expected: what some of its fields must be.

    Raises:
        SystemExit: a flag is unknown, or its value makes no sense.
    """
    prepare_output()
    try:
        refuse_empty(sys.argv[1:])
        options = tyro.cli(kind, description=description)
        for name, expectation in expected.items():
            require(f"--{name.replace('_', '-')}", getattr(options, name), expectation)
    except FlagError as error:
        raise SystemExit(f"error: {error}") from None
    return options


def open_device(name: str) -> torch.device:
    """The device that a script's --device names, as the current one.

    Raises:
        SystemExit: there is no such device here.
    """
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --device {name}: {reason}") from None
    return device


def time_in_turns(
    calls: dict[str, Call], clock: Clock, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of each call, timed one after the other, again and again.

    Args:
        calls: what to time, by name; each is called twice beforehand.
        clock: of the device that they run on.
        seconds: how long to go on.
        least: the fewest rounds.
    """
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            times[name].append(clock.seconds(call))
        rounds += 1
    return times


def copy_call(megabytes: float, device: torch.device) -> tuple[Call, float]:
    """A copy between two buffers, and the GB that it reads and writes."""
    source = torch.ones(int(megabytes * 1e6 / 4), device=device)
    target = torch.zeros_like(source)
    return (lambda: target.copy_(source)), 2 * source.numel() * 4 / 1e9


def matmul_call(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None
) -> tuple[Call, float]:
    """A square matrix product, by default of a size that fills the device, and its GFLOP."""
    size = size or (4096 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), 2 * size**3 / 1e9


def training_step(model: nn.Module, idx: Tensor, dtype: torch.dtype = torch.float32) -> Call:
    """A step of AdamW on a language model that predicts `idx`, [B, T], from itself.

    With another dtype than fp32, under autocast to it, without a scaler of gradients.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
            _, loss, _ = model(idx, idx)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest |value - exact|, relative to the largest |exact|."""
    scale = float(exact.abs().max()) or 1.0
    return float((value.detach().double() - exact).abs().max()) / scale


def _keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the kernel.

    Otherwise whichever contender's result ends up at the top of the heap pays for paging it in
    anew at every call: 10 ms for 25 MB, three times what the gate takes.
    """
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def run_cases(
    op: str, cases: Iterable[Case], *, device: torch.device, seconds: float, least: int = 5
) -> list[Row]:
    """Verify and time each case, print the table, and return its rows.

    The limit of a case is measured in the same turns: a copy of as many bytes, or a matrix product.

    Args:
        op: the operator, for the table's title.
        cases: made one by one, so that each may hold large tensors.
        device: where they run.
        seconds: how long to time each case.
        least: the fewest times that each contender is timed.

    Raises:
        AssertionError: our result is not the exact one; it is not timed then.
    """
    _keep_freed_memory()
    # A file or a pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("config", "mode", "contender", "ms", "20-80 %", "speed-up", "rate",
                  "of copy or product", "error", title=f"{op}: {machine(device)}")  # fmt: skip
    for column in table.columns[3:]:
        column.justify = "right"
    rows: list[Row] = []
    for case in cases:
        errors = case.verify()
        for row in _time_case(op, case, errors, device, seconds, least):
            rows.append(row)
            first = row.contender == next(iter(case.contenders))
            what = (row.config, row.mode) if first else ("", "")
            table.add_row(
                *what, row.contender, f"{row.median_ms:.3g}",
                f"{row.low_ms:.3g}-{row.high_ms:.3g}", f"{row.speedup:.2f}",
                f"{row.rate:.3g} {row.rate_unit}",
                f"{row.limit_share:.0%}" if row.limit_share else "", f"{row.error:.1e}",
            )  # fmt: skip
        table.add_section()
        console.print(f"verified and timed: {case.config} {case.mode}")
    console.print(table)
    return rows


def _time_case(
    op: str,
    case: Case,
    errors: dict[str, float],
    device: torch.device,
    seconds: float,
    least: int,
) -> Iterator[Row]:
    limit: tuple[Call, float] | None = None
    unit = ""
    if case.gigabytes:
        limit, unit = copy_call(case.gigabytes * 500, device), "GB/s"
    elif case.gigaflops:
        limit, unit = matmul_call(device, case.dtype), "GFLOP/s"
    calls = case.contenders | ({"limit": limit[0]} if limit else {})
    times = time_in_turns(calls, clock_of(device), seconds, least)
    for name, factor in case.factors.items():
        times[name] = [factor * seconds for seconds in times[name]]
    medians = {name: statistics.median(values) for name, values in times.items()}
    baseline = medians[next(iter(case.contenders))]
    for name in case.contenders:
        low, _, _, high = statistics.quantiles(times[name], n=5)
        rate = (case.gigabytes or case.gigaflops) / medians[name]
        share = rate * medians["limit"] / limit[1] if limit else 0.0
        yield Row(
            op, case.config, case.mode, name, 1e3 * medians[name], 1e3 * low, 1e3 * high,
            baseline / medians[name], errors.get(name, 0.0), rate, unit, share, processor(device),
            torch.get_num_threads(), _native.isa, torch.__version__, ember_ext.__version__,
        )  # fmt: skip


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `write_csv` wrote."""
    types = get_type_hints(Row)
    with path.open(encoding="utf-8", newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    return [Row(**{name: types[name](value) for name, value in line.items()}) for line in lines]


def with_earlier(rows: Sequence[Row], path: Path) -> list[Row]:
    """The rows that a file has of other measurements or devices, if any, and then `rows`."""

    def key(row: Row) -> tuple[str, str, str, str]:
        return row.config, row.mode, row.contender, row.device

    measured = {key(row) for row in rows}
    earlier = read_csv(path) if path.exists() else []
    return [*(row for row in earlier if key(row) not in measured), *rows]


def _resident_bytes(field: str) -> int:
    """VmRSS, this process's memory in use, or VmHWM, the most that ever was; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _measure_peak(make: Callable[..., Call], arguments: tuple[Any, ...]) -> int:
    call = make(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - allocated
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = _resident_bytes("VmRSS")
    call()
    return _resident_bytes("VmHWM") - before


def peak_megabytes(make: Callable[..., Call], *arguments: Any) -> float:
    """Measure how far a call drives the memory of a fresh process beyond what it had before.

    Where `make` uses a GPU, what torch allocates there; else of the process, on Linux only. What a
    script calls at its top level runs in that process too, so a script must call this under
    `if __name__ == "__main__"`.

    Args:
        make: a function of a module, which returns the call; what it allocates, and what it runs
            so that threads and libraries are there, does not count.
        arguments: of `make`; pickled, like `make`.

    Raises:
        Exception: whatever `make` or the call raises.
        BrokenProcessPool: the process died.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as fresh:
        return fresh.submit(_measure_peak, make, arguments).result() / 1e6
